"""The feed: within a run in order, nothing missed, nobody held up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio
import pytest
from anyio.abc import TaskStatus

from spellq.control.feed import Feed
from spellq.events import Event, EventFilter, Logged
from spellq.lifecycle import Advance, Claim, End, Label
from spellq.ports import Committed, NewRun
from spellq.runs import RunSpec, Status
from spellq_brokers.embedded import InProcessBus, SqliteStore
from tests.clocks import HandClock


class Started(TaskStatus[None]):
    """Tells that a task has started; a fixture is taken down in another task than it was set up."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def started(self, value: None = None) -> None:
        self.event.set()


class World:
    """A store, a bus and a feed; what is committed reaches the bus when the test says so."""

    def __init__(self, store: SqliteStore, bus: InProcessBus, feed: Feed) -> None:
        self.store = store
        self.bus = bus
        self.feed = feed

    async def whole_run(self) -> list[Committed]:
        """A run from start to end, one step a status, published by nobody yet."""
        (number,) = await self.store.allot("run", 1, HandClock().fresh_id())
        steps = await self.store.create([NewRun(number, "ada", RunSpec("true"))])
        for command in (
            Claim(1, "agent", "cpu-0", "claim"),
            Advance(1, Status.RUNNING),
            Advance(1, Status.SAVING),
            Advance(1, Status.PUSHING),
            End(1, user_exit_code=0),
        ):
            steps.append(await self.store.apply(number, [command]))
        return steps

    async def seen(self, number: int, versions: int) -> list[int]:
        """The versions a watcher sees, until it has seen that many."""
        seen: list[int] = []
        enough = anyio.Event()

        def watch(event: Event) -> None:
            seen.append(event.version)
            if len(seen) >= versions:
                enough.set()

        self.feed.add_watcher(number, watch)
        await enough.wait()
        self.feed.remove_watcher(number, watch)
        return seen


@pytest.fixture
async def world() -> AsyncIterator[World]:
    store = await SqliteStore.in_memory(HandClock())
    bus = InProcessBus()
    feed = Feed(store, store, bus, HandClock())
    running = asyncio.create_task(feed.run(task_status=(started := Started())))
    await started.event.wait()
    yield World(store, bus, feed)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await store.close()


async def test_events_out_of_order_are_put_in_order(world: World) -> None:
    steps = await world.whole_run()
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    for place in (0, 2, 1, 5, 4, 3):
        await world.bus.publish([steps[place]])
    assert await watching == [1, 2, 3, 4, 5, 6]


async def test_what_never_comes_is_read_from_the_runs_history(world: World) -> None:
    steps = await world.whole_run()
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    await world.bus.publish([steps[0]])
    await world.bus.publish([steps[5]])
    assert await watching == [1, 2, 3, 4, 5, 6]


async def test_what_comes_while_the_history_is_on_its_way_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer was true when it was sent; the last event overtakes it."""
    steps = await world.whole_run()
    read = world.store.history

    async def slow(number: int, after_version: int = 0) -> list[Event]:
        monkeypatch.undo()
        answer = await read(number, after_version)
        await world.bus.publish([steps[5]])
        await asyncio.sleep(0.01)
        return answer[:-1]

    monkeypatch.setattr(world.store, "history", slow)
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    await world.bus.publish([steps[2]])
    assert await watching == [1, 2, 3, 4, 5, 6]


async def test_what_lacked_may_come_while_the_history_is_on_its_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = await world.whole_run()
    read = world.store.history

    async def slow(number: int, after_version: int = 0) -> list[Event]:
        await world.bus.publish(steps[:2])
        await asyncio.sleep(0.01)
        return await read(number, after_version)

    monkeypatch.setattr(world.store, "history", slow)
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    await world.bus.publish([steps[2]])
    async with asyncio.timeout(5):
        async for logged in world.feed.events(EventFilter(), None):
            if logged.event.version == 3:
                break
    await world.bus.publish(steps[3:])
    assert await watching == [1, 2, 3, 4, 5, 6]


async def test_what_comes_twice_is_seen_once(world: World) -> None:
    steps = await world.whole_run()
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    for step in steps[:3]:
        await world.bus.publish([step])
    for step in steps:
        await world.bus.publish([step])
    assert await watching == [1, 2, 3, 4, 5, 6]


async def test_a_run_whose_first_event_comes_late_is_told_from_the_start(world: World) -> None:
    steps = await world.whole_run()
    watching = asyncio.create_task(world.seen(1, 6))
    async with contextlib.aclosing(world.feed.events(EventFilter(), None)) as events:
        reading = asyncio.create_task(first(events, 6))
        await asyncio.sleep(0)
        await world.bus.publish(steps[1:])
        await world.bus.publish(steps[:1])
        assert await watching == [1, 2, 3, 4, 5, 6]
        assert await reading == [(1, version) for version in range(1, 7)]


async def test_what_was_read_from_the_history_is_told_to_readers_too(world: World) -> None:
    steps = await world.whole_run()
    async with contextlib.aclosing(world.feed.events(EventFilter(), None)) as events:
        reading = asyncio.create_task(first(events, 6))
        await asyncio.sleep(0)
        await world.bus.publish([steps[0]])
        await world.bus.publish(steps[2:])
        assert await reading == [(1, version) for version in range(1, 7)]


async def test_a_cursor_is_never_ahead_of_an_event_that_is_held(world: World) -> None:
    steps = await world.whole_run()
    other = await world.whole_run()
    async with contextlib.aclosing(world.feed.events(EventFilter(), None)) as events:
        begin = asyncio.create_task(first(events, 1))
        await asyncio.sleep(0)
        await world.bus.publish([steps[0]])
        assert await begin == [(1, 1)]
        await world.bus.publish([steps[2]])
        await world.bus.publish(other)
        cursors = [(await anext(events)).cursor for _ in range(6)]
    again = world.feed.events(EventFilter(runs=frozenset({1})), cursors[-1])
    async with contextlib.aclosing(again):
        reading = asyncio.create_task(first(again, 2))
        await world.bus.publish([steps[1]])
        assert await reading == [(1, 2), (1, 3)]


async def first(events: AsyncIterator[Logged], count: int) -> list[tuple[int, int]]:
    found = []
    async for logged in events:
        found.append((logged.event.run, logged.event.version))
        if len(found) == count:
            break
    return found


async def test_a_reader_with_a_cursor_misses_nothing_wherever_it_was(world: World) -> None:
    steps = await world.whole_run()
    old = steps[2].logged[0].cursor
    await world.bus.publish(steps)
    later = await world.whole_run()
    async with contextlib.aclosing(world.feed.events(EventFilter(), old)) as events:
        reading = asyncio.create_task(first(events, 9))
        await world.bus.publish(later)
        assert await reading == [(1, 4), (1, 5), (1, 6), *((2, n) for n in range(1, 7))]


async def test_a_reader_without_a_cursor_begins_now(world: World) -> None:
    steps = await world.whole_run()
    watching = asyncio.create_task(world.seen(1, 6))
    await asyncio.sleep(0)
    await world.bus.publish(steps)
    await watching
    async with contextlib.aclosing(world.feed.events(EventFilter(), None)) as events:
        reading = asyncio.create_task(first(events, 1))
        await asyncio.sleep(0)
        await world.bus.publish(await world.whole_run())
        assert await reading == [(2, 1)]


async def test_a_reader_that_comes_back_at_once_misses_nothing_read_from_a_history(
    world: World,
) -> None:
    """The cursor stands still at an event of a run that had ended before there was this feed."""
    steps = await world.whole_run()
    await world.bus.publish(steps)
    clock = HandClock()
    clock.pass_seconds(1)
    feed = Feed(world.store, world.store, world.bus, clock)
    running = asyncio.create_task(feed.run(task_status=(started := Started())))
    await started.event.wait()
    cursor = feed.newest
    async with contextlib.aclosing(feed.events(EventFilter(), cursor)) as events:
        reading = asyncio.create_task(first(events, 1))
        await asyncio.sleep(0)
        await world.bus.publish([await world.store.apply(1, [Label(add=("late",))])])
        assert await reading == [(1, 7)]
    async with contextlib.aclosing(feed.events(EventFilter(), cursor)) as events:
        assert await first(events, 1) == [(1, 7)]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_filters(world: World) -> None:
    begin = await world.store.head()
    for _ in range(3):
        await world.bus.publish(await world.whole_run())
    wanted = EventFilter(runs=frozenset({2, 3}), statuses=frozenset({Status.COMPLETE}))
    async with contextlib.aclosing(world.feed.events(wanted, begin)) as events:
        assert await first(events, 2) == [(2, 6), (3, 6)]


async def test_a_cursor_of_nobody_is_refused(world: World) -> None:
    async with contextlib.aclosing(world.feed.events(EventFilter(), "nonsense")) as events:
        with pytest.raises(ValueError, match="nonsense"):
            await anext(events)
