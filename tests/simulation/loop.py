"""An event loop whose time is virtual, and the processes that live in it.

Nothing is ever waited for: when nobody can go on, time jumps to the next timer. Whatever a
simulated process does runs in a context that names it, so that the loop can hold the process up
(SIGSTOP) or never let it do anything again (SIGKILL): no `finally`, no answer, no cleanup.
"""

import asyncio
import contextvars
import heapq
import itertools
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

STEPS_AT_ONE_MOMENT: Final = 100_000
"""More steps than this without time going on are a loop that never ends."""

_ROUNDS_OF_BURIAL: Final = 60

_process: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Stuck(Exception):
    """Nothing can ever happen again, or time stands still."""


class Process:
    """All that runs in the name of one simulated process."""

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.held: list[asyncio.Handle] = []
        self._loop = loop
        self._when_dead: list[Callable[[], None]] = []

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Begin a task of this process."""
        context = contextvars.Context()
        context.run(_process.set, self)
        return self._loop.create_task(work, context=context)

    def when_dead(self, tell: Callable[[], None]) -> None:
        """Call `tell`, outside of every process, once this one is dead."""
        self._when_dead.append(tell)

    def kill(self) -> None:
        """From now on nothing of it happens any more."""
        if self.alive:
            self.alive = False
            for tell in self._when_dead:
                self._loop.call_soon(tell, context=contextvars.Context())

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """What came up meanwhile happens now, in its order."""
        self.paused = False
        held, self.held = self.held, []
        self._loop.hand_back(held)


def current_process() -> Process | None:
    """In whose name the present step runs; None is the world itself."""
    return _process.get()


class _Task(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks have the same order in every replay."""

    _number = 0

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """One history's time. It has no selector, no threads and no signals."""

    _ready: deque[asyncio.Handle]
    _asyncgens: "weakref.WeakSet[AsyncGenerator[Any, Any]]"

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count(1)
        self._steps = 0
        self._tasks: list[_Task] = []
        self._burying = False

    def time(self) -> float:
        return self._now

    def create_task(
        self, coro: Any, *, name: Any = None, context: Any = None
    ) -> "asyncio.Task[Any]":
        task = _Task(coro, loop=self, name=name, context=context)
        task._number = next(self._numbers)
        self._tasks.append(task)
        return task

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def hand_back(self, handles: list[asyncio.Handle]) -> None:
        """Let these happen after all."""
        self._ready.extend(handles)

    def bury(self, processes: list[Process]) -> None:
        """The history is told: end every task that is left, those of the dead included."""
        self._burying = True
        self._steps = 0
        self._timers.clear()
        for process in processes:
            self.hand_back(process.held)
            process.held = []
        asyncio._set_running_loop(self)
        try:
            self._end_tasks()
        finally:
            asyncio._set_running_loop(None)

    def _end_tasks(self) -> None:
        for _ in range(_ROUNDS_OF_BURIAL):
            left = [task for task in self._tasks if not task.done()]
            if not left:
                self._tasks.clear()
                return
            for task in left:
                task.cancel()
            for _ in range(3):
                self.call_soon(int)
                self._run_once()
        raise Stuck(f"tasks that do not end: {left}")

    def _run_once(self) -> None:
        ready = self._ready
        if not ready:
            self._advance()
        self._steps += len(ready)
        if self._steps > STEPS_AT_ONE_MOMENT:
            raise Stuck(f"time stands still at {self._now}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            process = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is None or process.runs or self._burying:
                handle._run()
            else:
                process.held.append(handle)

    def _advance(self) -> None:
        """Go to the next moment at which something happens."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise Stuck("nothing can ever happen again")
        self._now = max(self._now, timers[0][0])
        self._steps = 0
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                self._ready.append(timer)

    # What a simulated world does not have

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _process_events(self, event_list: object) -> NoReturn:
        raise AssertionError("there is no selector")

    def _write_to_self(self) -> NoReturn:
        raise AssertionError("there are no threads")

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Called where the last reference goes, which is in the loop."""
        self._asyncgens.discard(agen)
        if not self.is_closed():
            self.call_soon(self.create_task, agen.aclose())

    def run_in_executor(self, *_: object) -> NoReturn:
        raise AssertionError("there are no threads")
