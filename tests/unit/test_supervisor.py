"""The supervisor: every deadline is kept, silence counts only where one could have heard."""

from collections.abc import AsyncIterator

import pytest

from spellq.control.feed import Feed
from spellq.control.supervisor import LOST_AFTER_SECONDS, Supervisor
from spellq.lifecycle import Advance, Claim, Command, Kill
from spellq.outbox import Outbox
from spellq.ports import LEASE_SECONDS, AgentInfo, NewRun, Ticket
from spellq.runs import Cause, Run, RunSpec, Status
from spellq_brokers.embedded import InProcessBus, SqliteStore
from tests.clocks import HandClock

AGENT = AgentInfo("box.1", "box", {"cpu": 1}, "0")
CLAIM = Claim(1, AGENT.id, "cpu-0", "claim")
RUNNING = Advance(1, Status.RUNNING)


class World:
    def __init__(self, store: SqliteStore, clock: HandClock) -> None:
        self.store = store
        self.clock = clock
        self.bus = InProcessBus()
        outbox = Outbox(store, self.bus)
        feed = Feed(store, store, self.bus, clock)
        self.supervisor = Supervisor(store, self.bus, outbox, feed, clock)

    async def run(self, *steps: Command, **spec: float) -> int:
        (number,) = await self.store.allot("run", 1, self.clock.fresh_id())
        committed = await self.store.create([NewRun(number, "ada", RunSpec("true", **spec))])  # type: ignore[arg-type]
        for step in steps:
            committed.append(await self.store.apply(number, [step]))
        await self.store.strike(committed)
        return number

    async def look_after(self, seconds: float) -> float:
        self.clock.pass_seconds(seconds)
        return await self.supervisor.look()

    async def state(self, number: int) -> Run:
        run = await self.store.get(number)
        assert run is not None
        return run

    async def next_ticket(self) -> Ticket:
        async with self.bus.consume("cpu") as source:
            return (await source.take()).ticket


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = HandClock()
    store = await SqliteStore.in_memory(clock)
    yield World(store, clock)
    await store.close()


async def test_it_sleeps_until_the_earliest_deadline_and_stops_the_run(world: World) -> None:
    number = await world.run(CLAIM, RUNNING, timeout_minutes=0.05)
    await world.store.renew(AGENT, 1000)
    assert await world.look_after(0) == pytest.approx(3.0)
    assert await world.look_after(2) == pytest.approx(1.0)
    await world.look_after(1)
    run = await world.state(number)
    assert (run.status, run.cause) == (Status.STOPPING, Cause.TIMEOUT)


async def test_without_a_deadline_the_net_looks_every_five_seconds(world: World) -> None:
    assert await world.look_after(0) == 5.0


async def test_a_silent_agent_is_lost_after_a_lease_and_its_runs_later(world: World) -> None:
    executed = await world.run(CLAIM, RUNNING)
    claimed = await world.run(CLAIM)
    await world.look_after(0)
    await world.look_after(LEASE_SECONDS - 1)
    assert (await world.state(executed)).lost_at is None
    await world.look_after(1)
    assert (await world.state(executed)).lost_at is not None
    await world.look_after(LOST_AFTER_SECONDS - 1)
    assert (await world.state(executed)).status is Status.RUNNING
    await world.look_after(1)
    run = await world.state(executed)
    assert (run.status, run.cause) == (Status.INTERRUPTED, Cause.AGENT_LOST)
    again = await world.state(claimed)
    assert (again.status, again.attempt) == (Status.MACHINE_REQUESTED, 2)
    assert await world.next_ticket() == Ticket(claimed, 2, "cpu")


async def test_an_agent_heard_again_keeps_its_runs(world: World) -> None:
    number = await world.run(CLAIM, RUNNING)
    await world.look_after(0)
    await world.look_after(LEASE_SECONDS)
    await world.store.renew(AGENT, 1000)
    await world.look_after(LOST_AFTER_SECONDS * 2)
    run = await world.state(number)
    assert (run.status, run.lost_at) == (Status.RUNNING, None)


async def test_a_supervisor_that_was_away_calls_nobody_lost(world: World) -> None:
    """It has to have listened for a whole lease itself."""
    number = await world.run(CLAIM, RUNNING)
    world.clock.pass_seconds(3600)
    await world.look_after(0)
    assert (await world.state(number)).lost_at is None


async def test_what_its_committer_did_not_publish_is_published(world: World) -> None:
    (number,) = await world.store.allot("run", 1, "crash")
    await world.store.create([NewRun(number, "ada", RunSpec("true"))])
    async with world.bus.listen() as heard:
        await world.look_after(2)
        assert [logged.event.run for logged in await anext(heard)] == [number]
    assert await world.next_ticket() == Ticket(number, 1, "cpu")
    assert await world.store.unpublished(0) == []


async def test_an_agent_is_told_of_what_its_committer_did_not_tell(world: World) -> None:
    number = await world.run(CLAIM, RUNNING)
    before = await world.store.renew(AGENT, 1000)
    await world.store.apply(number, [Kill()])
    async with world.bus.hints(AGENT.id) as hints:
        await world.look_after(2)
        await anext(hints)
    assert await world.store.renew(AGENT, 1000) != before


async def test_after_a_restart_every_waiting_run_is_offered_again(world: World) -> None:
    waiting = [await world.run(), await world.run()]
    await world.run(CLAIM)
    await world.supervisor.refill()
    assert [(await world.next_ticket()).run for _ in waiting] == waiting
