"""The feed: one reader of the bus a process, handed on in memory to everybody who waits.

Within a run events come in order of version: one that is early is held, and what lacks is read
from the run's own history after 50 ms. A reader that comes back with its cursor misses nothing;
what it saw in the last moments may come again, told by (run, version).
"""

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from spellq.events import Cursor, Event, EventFilter, Logged
from spellq.ports import Bus, Clock, EventLog, RunQuery, Store, StoreUnavailable

HOLD_SECONDS: Final = 0.05
AGAIN_SECONDS: Final = 1.0
MEMORY: Final = 100_000
PAGE: Final = 1000

Watcher = Callable[[Event], None]

_log = logging.getLogger(__name__)


class Feed:
    """What happens, for those who wait for it. Costs no broker object per waiter."""

    def __init__(self, store: Store, log: EventLog, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._log = log
        self._bus = bus
        self._clock = clock
        self._since: datetime = clock.now()
        self._watchers: dict[int, dict[Watcher, None]] = {}
        self._versions: OrderedDict[int, int] = OrderedDict()
        self._held: dict[int, dict[int, Event]] = {}
        self._recent = _Recent()
        self._grown = anyio.Event()
        self._logs: dict[int, dict[anyio.Event, None]] = {}

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Read the bus until cancelled; started once what is published next will be seen."""
        async with self._bus.listen() as batches, anyio.create_task_group() as tasks:
            self._since = self._clock.now()
            self._recent.begin(await self._log.head())
            for run in await self._store.find(RunQuery(limit=None, live=True)):
                self._versions[run.id] = run.version
            await tasks.start(self._run_logs)
            task_status.started()
            async for batch in batches:
                self._take(batch, tasks)

    async def _run_logs(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with self._bus.log_lengths() as lengths:
            task_status.started()
            async for number, _ in lengths:
                self._wake_followers(number)

    def _wake_followers(self, number: int) -> None:
        for event in self._logs.get(number, ()):
            event.set()

    # Watching one run

    def add_watcher(self, number: int, watcher: Watcher) -> None:
        """Call `watcher` with each event of the run from now on, in the loop, in order.

        Watch first, then read the run: nothing falls between.
        """
        self._watchers.setdefault(number, {})[watcher] = None

    def remove_watcher(self, number: int, watcher: Watcher) -> None:
        watchers = self._watchers.get(number)
        if watchers is not None:
            watchers.pop(watcher, None)
            if not watchers:
                del self._watchers[number]

    # Following logs

    @contextmanager
    def log_growth(self, number: int) -> Iterator[anyio.Event]:
        """An event that is set when the run's log grows. Ask for it first, then read the log.

        Hints of growth may be lost; at the latest the run's next event sets it.
        """
        event = anyio.Event()
        waiting = self._logs.setdefault(number, {})
        waiting[event] = None
        try:
            yield event
        finally:
            del waiting[event]
            if not waiting and self._logs.get(number) is waiting:
                del self._logs[number]

    # Following everything

    @property
    def newest(self) -> Cursor:
        """Where `events` begins when it is given no cursor."""
        return self._recent.newest

    async def check(self, cursor: Cursor) -> None:
        """Raises ValueError where `cursor` is none of this log."""
        await self._log.events_after(cursor, 1)

    async def events(
        self, wanted: EventFilter, after: Cursor | None
    ) -> AsyncGenerator[Logged, None]:
        """The events that match, from after the cursor (or from now on), without end.

        Raises:
            ValueError: no cursor of this log.
        """
        cursor = self.newest if after is None else after
        place = self._recent.end if after is None else self._recent.place_after(after)
        while True:
            grown = self._grown
            page = None if place is None else self._recent.page(place)
            if place is None or page is None:
                page, place = await self._page_of_log(cursor)
            else:
                place += len(page)
            for logged in page:
                cursor = logged.cursor
                if wanted.matches(logged.event):
                    yield logged
            if not page and place == self._recent.end:
                await grown.wait()

    async def _page_of_log(self, cursor: Cursor) -> tuple[Sequence[Logged], int | None]:
        """What the log has after a cursor, and where in memory it goes on (None: in the log)."""
        end = self._recent.end
        page = await self._log.events_after(cursor, PAGE)
        place = self._recent.place_after(page[-1].cursor if page else cursor)
        if place is None and len(page) < PAGE:
            place = end
        return page, place

    # Taking in

    def _take(self, batch: Sequence[Logged], tasks: TaskGroup) -> None:
        before = self._recent.end
        for logged in batch:
            since = self._recent.end
            self._sort_in(logged.event, tasks)
            if not self._held:
                self._recent.settle(logged.cursor, since)
        if self._recent.end > before:
            self._tell()

    def _sort_in(self, event: Event, tasks: TaskGroup) -> None:
        known = self._versions.get(event.run, 0)
        if event.version == known + 1 and event.run not in self._held:
            self._deliver(event)
        elif event.version > known:
            held = self._held.get(event.run)
            if held is None:
                held = self._held[event.run] = {}
                tasks.start_soon(self._fill, event.run)
            held[event.version] = event
            self._release(event.run)

    def _release(self, number: int) -> None:
        """Deliver what was held and follows now; what was delivered meanwhile is let go."""
        held = self._held[number]
        for version in sorted(held):
            known = self._versions.get(number, 0)
            if version == known + 1:
                self._deliver(held[version])
            if version <= known + 1:
                del held[version]
        if not held:
            del self._held[number]

    async def _fill(self, number: int) -> None:
        """After a moment, read what lacks from the run's own history.

        What arrives while its answer is on the way may be newer than that, and stays held.
        """
        await anyio.sleep(HOLD_SECONDS)
        while number in self._held:
            asked = tuple(self._held[number])
            try:
                history = await self._store.history(number, self._versions.get(number, 0))
            except StoreUnavailable as error:
                _log.warning("run %s: events are missing: %s", number, error)
                await anyio.sleep(AGAIN_SECONDS)
                continue
            held = self._held.get(number)
            if held is None:  # what lacked has arrived
                break
            if number not in self._versions and history and history[0].at < self._since:
                # A run of before this feed: what happened then was told by others.
                self._versions[number] = min(held) - 1
            for event in history:
                if event.version == self._versions.get(number, 0) + 1:
                    self._deliver(event)
            for version in asked:
                held.pop(version, None)
            self._release(number)
        self._tell()

    def _deliver(self, event: Event) -> None:
        self._versions[event.run] = event.version
        self._versions.move_to_end(event.run)
        if len(self._versions) > MEMORY:
            self._versions.popitem(last=False)
        self._recent.add(event)
        for watcher in tuple(self._watchers.get(event.run, ())):
            watcher(event)
        self._wake_followers(event.run)

    def _tell(self) -> None:
        grown, self._grown = self._grown, anyio.Event()
        grown.set()


class _Recent:
    """The latest events in the order they are told, each with a cursor to come back with.

    A cursor is never ahead of an event that is still held: while one is, it stands still.
    """

    def __init__(self) -> None:
        self.newest: Cursor = ""
        self._events: list[Logged] = []
        self._dropped = 0
        self._places: dict[Cursor, int] = {}

    def begin(self, head: Cursor) -> None:
        self.newest = head
        self._places[head] = self.end

    @property
    def end(self) -> int:
        return self._dropped + len(self._events)

    def add(self, event: Event) -> None:
        self._events.append(Logged(self.newest, event))
        if len(self._events) > MEMORY + PAGE:
            self._drop_oldest()

    def settle(self, cursor: Cursor, since: int) -> None:
        """All that arrived up to `cursor` has been told, the last of it from place `since` on."""
        if cursor in self._places:
            return
        self.newest = cursor
        if self.end > since:
            self._events[-1] = Logged(cursor, self._events[-1].event)
        self._places[cursor] = self.end

    def place_after(self, cursor: Cursor) -> int | None:
        """The place of the first event after a cursor, or None where only the log knows."""
        return self._places.get(cursor)

    def page(self, place: int) -> Sequence[Logged] | None:
        """Events from a place on; None when they are not in memory any more."""
        start = place - self._dropped
        return self._events[start : start + PAGE] if start >= 0 else None

    def _drop_oldest(self) -> None:
        for logged in self._events[:PAGE]:
            self._places.pop(logged.cursor, None)
        del self._events[:PAGE]
        self._dropped += PAGE
