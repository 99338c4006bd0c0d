"""What is RabbitMQ's own: a broker that dies under those who publish, consume and listen."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from anyio import to_thread

from spellq.events import Logged
from spellq.lifecycle import create
from spellq.ports import Committed, StoreUnavailable, Ticket
from spellq.runs import RunSpec
from spellq_brokers.cluster import RabbitBus
from tests.clocks import HandClock
from tests.services import RabbitServer, rabbit_server, working

TICKET = Ticket(1, 1, "cpu")
DECLARED_SECONDS = 6
"""RabbitMQ 3.10 keeps what a quorum queue knows of itself in memory for up to five seconds; killed
before, the queue has no leader any more, and consuming hangs."""


@pytest.fixture
def rabbit() -> Iterator[RabbitServer]:
    with rabbit_server() as server:
        yield server


@pytest.fixture
async def bus(rabbit: RabbitServer) -> AsyncIterator[RabbitBus]:
    async with working(RabbitBus(rabbit.url, "spellq", "epoch")) as bus:
        yield bus


def committed(number: int) -> Committed:
    made = create(number, "ada", RunSpec("true"), HandClock().now())
    return Committed(made.run, tuple(Logged("", event) for event in made.events))


async def until_it_is_back(bus: RabbitBus, entry: Committed) -> None:
    """As an agent repeats a step, or the relay what stays in the outbox."""
    async with asyncio.timeout(40):
        while True:
            try:
                return await bus.publish([entry])
            except StoreUnavailable:
                await bus.connected()


async def test_a_broker_that_is_killed_loses_nothing_that_was_confirmed(
    bus: RabbitBus, rabbit: RabbitServer
) -> None:
    before = await bus.log.head()
    await bus.offer([TICKET])
    async with bus.listen() as heard, bus.hints("box.1") as hints:
        await bus.publish([committed(1)])
        assert [logged.event.run for logged in await anext(heard)] == [1]
        await asyncio.sleep(DECLARED_SECONDS)
        await to_thread.run_sync(rabbit.kill)
        with pytest.raises(StoreUnavailable, match="RabbitMQ cannot be used now"):
            await bus.publish([committed(2)])
        await to_thread.run_sync(rabbit.start)
        await until_it_is_back(bus, committed(2))
        assert [logged.event.run for logged in await anext(heard)] == [2]
        await anext(hints)  # whatever was said meanwhile is lost: look again
    found = await bus.log.events_after(before)
    assert [logged.event.run for logged in found] == [1, 2]
    async with bus.consume("cpu") as source:
        delivery = await source.take()
        assert delivery.ticket == TICKET
        await delivery.ack()


async def test_a_consumer_that_waits_is_served_by_the_broker_that_comes_back(
    bus: RabbitBus, rabbit: RabbitServer
) -> None:
    async with bus.consume("cpu") as source:
        waiting = asyncio.create_task(source.take())
        await bus.offer([TICKET])
        delivery = await waiting
        await asyncio.sleep(DECLARED_SECONDS)
        await to_thread.run_sync(rabbit.kill)
        await delivery.ack()  # in vain: it comes again
        waiting = asyncio.create_task(source.take())
        await to_thread.run_sync(rabbit.start)
        async with asyncio.timeout(40):
            again = await waiting
        assert again.ticket == TICKET
        await again.ack()
