"""Bus: carries what was committed, and tickets to whoever is free."""

import asyncio

import pytest

from spellq.events import Logged
from spellq.lifecycle import create
from spellq.ports import Bus, Committed, Delivery, Ticket
from spellq.runs import RunSpec
from tests.clocks import HandClock

TICKETS = [Ticket(number, 1, "cpu") for number in range(1, 6)]


async def take(bus: Bus, queue: str) -> Delivery:
    async with bus.consume(queue) as source:
        delivery = await source.take()
        await delivery.ack()
        return delivery


def committed(number: int) -> Committed:
    made = create(number, "ada", RunSpec("true"), HandClock().now())
    return Committed(made.run, tuple(Logged("", event) for event in made.events))


async def test_tickets_come_in_order_each_to_one_consumer(bus: Bus) -> None:
    await bus.offer(TICKETS)
    assert [(await take(bus, "cpu")).ticket for _ in TICKETS] == TICKETS
    await bus.offer(TICKETS)
    deliveries = await asyncio.gather(*(take(bus, "cpu") for _ in TICKETS))
    assert sorted(delivery.ticket.run for delivery in deliveries) == [1, 2, 3, 4, 5]


async def test_a_consumer_waits_for_its_own_queue_only(bus: Bus) -> None:
    waiting = asyncio.create_task(take(bus, "t4"))
    await bus.offer([TICKETS[0], Ticket(9, 1, "t4")])
    assert (await waiting).ticket == Ticket(9, 1, "t4")
    assert (await take(bus, "cpu")).ticket == TICKETS[0]


async def test_a_consumer_that_gives_up_takes_no_ticket(bus: Bus) -> None:
    async with bus.consume("cpu") as source:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.take(), 0.01)
    await bus.offer(TICKETS[:1])
    assert (await take(bus, "cpu")).ticket == TICKETS[0]


async def test_what_a_failed_consumer_had_not_acknowledged_is_offered_again(bus: Bus) -> None:
    await bus.offer(TICKETS[:2])

    async def dies() -> None:
        async with bus.consume("cpu") as source:
            await source.take()
            raise RuntimeError("the agent dies")

    with pytest.raises(RuntimeError):
        await dies()
    assert (await take(bus, "cpu")).ticket == TICKETS[0]


async def test_consumers_that_leave_together_give_their_tickets_back(bus: Bus) -> None:
    """One that leaves puts its ticket back while the other, leaving too, still waits."""
    await bus.offer(TICKETS[:1])
    taken = asyncio.Event()

    async def hold() -> None:
        async with bus.consume("cpu") as source:
            await source.take()
            taken.set()
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    await taken.wait()
    waiting = asyncio.create_task(take(bus, "cpu"))
    await asyncio.sleep(0)
    holding.cancel()
    waiting.cancel()
    results = await asyncio.gather(holding, waiting, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert (await take(bus, "cpu")).ticket == TICKETS[0]


async def test_a_delivery_can_be_acknowledged_after_its_consumer_left(bus: Bus) -> None:
    await bus.offer(TICKETS[:2])
    async with bus.consume("cpu") as source:
        delivery = await source.take()
    await delivery.ack()
    assert (await take(bus, "cpu")).ticket == TICKETS[1]


async def test_every_listener_hears_what_is_published_from_then_on(bus: Bus) -> None:
    await bus.publish([committed(1)])
    async with bus.listen() as one, bus.listen() as other:
        await bus.publish([committed(2), committed(3)])
        for listener in (one, other):
            heard: list[int] = []
            while 3 not in heard:
                heard += [logged.event.run for logged in await anext(listener)]
            assert heard[-2:] == [2, 3]  # what was on its way before may come, too


async def test_hints_reach_their_agent_and_nobody_else(bus: Bus) -> None:
    async with bus.hints("box.1") as mine, bus.hints("box.2") as others:
        await bus.hint("box.1")
        await anext(mine)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(others), 0.01)


async def test_growing_logs_are_heard_of(bus: Bus) -> None:
    async with bus.log_lengths() as lengths:
        bus.log_grew(7, 1)
        bus.log_grew(7, 3)
        number, length = await anext(lengths)
        while length < 3:
            number, length = await anext(lengths)
        assert (number, length) == (7, 3)
