"""The feed: one reader of the bus a process, handed on in memory to everybody who waits.

Within a run events come in order of version: one that is early is held, and what lacks is read
from the run's own history after 50 ms. A reader that comes back with its cursor misses nothing.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from spellq.events import Cursor, Event, EventFilter, Logged
from spellq.ports import Bus, Committed, Store

HOLD_SECONDS: Final = 0.05
MEMORY: Final = 100_000

Watcher = Callable[[Event], None]


class Feed:
    """What happens, for those who wait for it. Costs no broker object per waiter."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store = store
        self._bus = bus
        self._watchers: dict[int, set[Watcher]] = {}
        self._versions: OrderedDict[int, int] = OrderedDict()
        self._held: dict[int, dict[int, Logged]] = {}
        self._recent: list[Logged] = []
        self._dropped = 0
        self._places: dict[Cursor, int] = {}
        self._newest: Cursor = ""
        self._grown = anyio.Event()
        self._logs: dict[int, set[anyio.Event]] = {}

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Read the bus until cancelled; started once what is published next will be seen."""
        async with self._bus.listen() as batches, anyio.create_task_group() as tasks:
            self._newest = await self._store.head()
            await tasks.start(self._run_logs)
            task_status.started()
            async for batch in batches:
                self._take(batch, tasks)

    async def _run_logs(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with self._bus.log_lengths() as lengths:
            task_status.started()
            async for number, _ in lengths:
                for event in self._logs.get(number, ()):
                    event.set()

    # Watching one run

    @contextmanager
    def watch(self, number: int, watcher: Watcher) -> Iterator[None]:
        """Call `watcher` with each event of the run from now on, in the loop, in order.

        Watch first, then read the run: nothing falls between.
        """
        self.add_watcher(number, watcher)
        try:
            yield
        finally:
            self.remove_watcher(number, watcher)

    def add_watcher(self, number: int, watcher: Watcher) -> None:
        self._watchers.setdefault(number, set()).add(watcher)

    def remove_watcher(self, number: int, watcher: Watcher) -> None:
        watchers = self._watchers.get(number)
        if watchers is not None:
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[number]

    # Following logs

    @contextmanager
    def log_growth(self, number: int) -> Iterator[anyio.Event]:
        """An event that is set when the run's log grows. Ask for it first, then read the log."""
        event = anyio.Event()
        waiting = self._logs.setdefault(number, set())
        waiting.add(event)
        try:
            yield event
        finally:
            waiting.discard(event)
            if not waiting and self._logs.get(number) is waiting:
                del self._logs[number]

    # Following everything

    @property
    def newest(self) -> Cursor:
        """Where `events` begins when it is given no cursor."""
        return self._newest

    async def events(
        self, wanted: EventFilter, after: Cursor | None
    ) -> AsyncGenerator[Logged, None]:
        """The events that match, from after the cursor (or from now on), without end.

        Raises:
            ValueError: no cursor of this log.
        """
        cursor = self._newest if after is None else after
        while True:
            grown = self._grown
            page, in_memory = await self._page(cursor)
            for logged in page:
                cursor = logged.cursor
                if wanted.matches(logged.event):
                    yield logged
            if not page and (in_memory or grown is self._grown):
                await grown.wait()

    async def _page(self, cursor: Cursor) -> tuple[Sequence[Logged], bool]:
        if cursor == self._newest:
            return (), True
        place = self._places.get(cursor)
        if place is not None:
            start = place - self._dropped + 1
            return self._recent[start : start + 1000], True
        return await self._store.events_after(cursor), False

    # Taking in

    def _take(self, batch: Sequence[Committed], tasks: TaskGroup) -> None:
        before = len(self._recent) + self._dropped
        for committed in batch:
            for logged in committed.logged:
                self._sort_in(logged, tasks)
        if len(self._recent) + self._dropped > before:
            self._tell()

    def _sort_in(self, logged: Logged, tasks: TaskGroup) -> None:
        event = logged.event
        known = self._versions.get(event.run)
        if known is None or event.version == known + 1:
            self._deliver(logged)
            self._release(event.run)
        elif event.version > known + 1:
            held = self._held.setdefault(event.run, {})
            if not held:
                tasks.start_soon(self._fill, event.run)
            held[event.version] = logged

    def _release(self, number: int) -> None:
        """Deliver what was held and follows now."""
        held = self._held.get(number)
        while held and (logged := held.pop(self._versions[number] + 1, None)) is not None:
            self._deliver(logged)
        if held is not None and not held:
            del self._held[number]

    async def _fill(self, number: int) -> None:
        """After a moment, read what lacks from the run's own history."""
        await anyio.sleep(HOLD_SECONDS)
        while number in self._held:
            known = self._versions.get(number, 0)
            for event in await self._store.history(number, known):
                if event.version == self._versions.get(number, 0) + 1:
                    held = self._held.get(number, {}).pop(event.version, None)
                    self._deliver(held or Logged(self._newest, event))
            self._held.pop(number, None)
        self._tell()

    def _deliver(self, logged: Logged) -> None:
        event = logged.event
        self._versions[event.run] = event.version
        self._versions.move_to_end(event.run)
        if len(self._versions) > MEMORY:
            self._versions.popitem(last=False)
        if logged.cursor not in self._places:
            self._places[logged.cursor] = self._dropped + len(self._recent)
            self._recent.append(logged)
            self._newest = logged.cursor
            if len(self._recent) >= 2 * MEMORY:
                self._drop_oldest()
        for watcher in tuple(self._watchers.get(event.run, ())):
            watcher(event)

    def _drop_oldest(self) -> None:
        for logged in self._recent[:MEMORY]:
            self._places.pop(logged.cursor, None)
        del self._recent[:MEMORY]
        self._dropped += MEMORY

    def _tell(self) -> None:
        grown, self._grown = self._grown, anyio.Event()
        grown.set()
