"""What the parts of a simulated world share: chance, time, the trace, and where one may die."""

import asyncio
import contextvars
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn, TypeVar

from spellq.ports import LEASE_SECONDS
from tests.simulation.loop import Process, VirtualLoop, current_process

T = TypeVar("T")

LEAST_SILENCE_SECONDS: Final = 2 * LEASE_SECONDS - 0.1
"""Until its lease has run out, and then as long as a supervisor has to miss it."""

_IDLE: Final = ("agents", "owners", "due", "unpublished", "renew", "find")
"""Points that an idle process passes all the time: it does not die at them."""

_BEGINNING: Final = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Violation(Exception):
    """A promise that was not kept. `kind` is a field of `Summary`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class World:
    """One history, all of it told by its seed."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.seed = seed
        self.loop = loop
        self.random = random.Random(seed)
        self.lines: list[str] = []
        self.violations: list[Violation] = []
        self.processes: list[Process] = []
        self.crashes = 0
        self.starts: dict[int, int] = {}
        self.renewed_at: dict[str, float] = {}
        self.faults_are_over = False
        self.told_to_the_end = False
        self._dies_after: dict[Process, int] = {}
        self._store_back_at = 0.0
        self._bus_back_at = 0.0

    # Telling

    def tell(self, text: str) -> None:
        """A line of the trace."""
        if self.told_to_the_end:
            return
        process = current_process()
        who = process.name if process is not None else "world"
        self.lines.append(f"{self.loop.time():11.4f}  {who:<14} {text}")

    def violated(self, kind: str, text: str) -> None:
        if self.told_to_the_end:
            return
        self.tell(f"VIOLATION ({kind}): {text}")
        self.violations.append(Violation(kind, text))

    def note_start(self, number: int) -> None:
        """A command is executed, truly."""
        self.starts[number] = self.starts.get(number, 0) + 1
        if self.starts[number] > 1:
            self.violated("started_twice", f"run {number} is executed again")

    def look_at_lost(self, number: int, agent: str) -> None:
        """A run of the agent is given up for lost: nobody may have heard it for long enough."""
        now = self.loop.time()
        silent = now - self.renewed_at.get(agent, now)
        if silent < LEAST_SILENCE_SECONDS:
            self.violated("lost", f"run {number}: {agent} was called lost, silent for {silent} s")

    # Chance

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def moment(self, shortest: float, longest: float) -> float:
        """Seconds between the two; short ones as likely as long ones by their order."""
        return shortest * math.exp(self.random.random() * math.log(longest / shortest))

    async def take_time(self, shortest: float, longest: float) -> None:
        await asyncio.sleep(self.moment(shortest, longest))

    # Processes

    def process(self, name: str) -> Process:
        process = Process(self.loop, name)
        self.processes.append(process)
        return process

    def doom(self, process: Process, points: int) -> None:
        """The process dies at the so-manieth point it passes."""
        self._dies_after[process] = points

    def dies_here(self, what: str) -> bool:
        """A numbered point: true when the process that passes it is dead from now on."""
        process = current_process()
        if self.told_to_the_end:
            raise asyncio.CancelledError
        if process is None or self.faults_are_over or process not in self._dies_after:
            return False
        if what.startswith(_IDLE):
            return False
        self._dies_after[process] -= 1
        if self._dies_after[process] > 0:
            return False
        del self._dies_after[process]
        self.tell(f"KILLED at {what}")
        self.crashes += 1
        process.kill()
        return True

    async def point(self, what: str) -> None:
        """Pass a point where the process may die."""
        if self.dies_here(what):
            await self.forever()

    async def forever(self) -> NoReturn:
        await self.loop.create_future()
        raise AssertionError("this never happens")

    def later(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        """Call that later, in nobody's name."""
        self.loop.call_later(seconds, call, *arguments, context=contextvars.Context())

    # The engines of the store and the bus

    def take_store_away(self, seconds: float) -> None:
        self._store_back_at = self.loop.time() + seconds

    @property
    def store_is_away(self) -> bool:
        return not self.faults_are_over and self.loop.time() < self._store_back_at

    def take_bus_away(self, seconds: float) -> None:
        self._bus_back_at = self.loop.time() + seconds

    @property
    def bus_is_away(self) -> bool:
        return not self.faults_are_over and self.loop.time() < self._bus_back_at

    def on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """What nobody caught."""
        self.violated("faults", f"{context['message']}: {context.get('exception')!r}")


class SimClock:
    """Implements `spellq.ports.Clock`. `jump` moves the wall clock only."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._offset = timedelta()

    def now(self) -> datetime:
        return _BEGINNING + timedelta(seconds=self._world.loop.time()) + self._offset

    def monotonic(self) -> float:
        return 1000.0 + self._world.loop.time()

    def fresh_id(self) -> str:
        return f"{self._world.random.getrandbits(128):032x}"

    def jump(self, seconds: float) -> None:
        self._offset += timedelta(seconds=seconds)


class Signal:
    """Wakes everybody who waits, each time it is given."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._waiting: list[asyncio.Future[None]] = []

    def give(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, holds: Callable[[], T]) -> T:
        """Wait for `holds` to give something true; returns that."""
        while not (found := holds()):
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(future)
            await future
        return found
