"""A process that somebody starts again whenever it has ended, however it ended."""

import asyncio
from collections.abc import Awaitable, Callable

from spellq.ports import StoreUnavailable
from tests.simulation.loop import Process
from tests.simulation.world import World

Live = Callable[[Process, asyncio.Event], Awaitable[None]]
"""One life: serves until the event (leave in good order) is set."""


class Service:
    """A daemon, an agent or a gateway, through all of its lives."""

    def __init__(self, world: World, name: str, live: Live, *, away_seconds: float) -> None:
        self.name = name
        self._world = world
        self._live = live
        self._away_seconds = away_seconds
        self._process: Process | None = None
        self._leave = asyncio.Event()
        self._lives = 0
        self._next_away: float | None = None

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.alive

    def start(self) -> None:
        """Start it unless it lives."""
        if self.lives or self._world.told_to_the_end:
            return
        self._lives += 1
        self._process = process = self._world.process(f"{self.name}#{self._lives}")
        self._world.tell(f"{process.name} starts")
        if self._world.chance(0.5):
            shortly = self._world.chance(0.25)
            points = self._world.moment(1, 10) if shortly else self._world.moment(8, 150)
            self._world.doom(process, int(points))
        process.when_dead(self._come_back)
        self._leave = asyncio.Event()
        process.spawn(self._serve(process))

    def kill(self, away_seconds: float | None = None) -> None:
        """SIGKILL; it comes back after so long."""
        self._next_away = away_seconds
        if self.lives and self._process is not None:
            self._world.tell(f"kill -9 {self._process.name}")
            self._world.crashes += 1
            self._process.kill()

    def leave(self) -> None:
        """SIGTERM."""
        if self.lives and self._process is not None:
            self._world.tell(f"{self._process.name} is asked to leave")
            self._leave.set()

    def when_dead(self, tell: Callable[[], None]) -> None:
        """Call `tell` once its present life is over."""
        assert self._process is not None
        self._process.when_dead(tell)

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        process = self._process
        if process is not None and process.runs:
            self._world.tell(f"{process.name} is stopped for {seconds:.2f} s")
            process.pause()
            self._world.loop.call_later(seconds, self._go_on, process)

    def have_peace(self) -> None:
        """No faults any more: stopped, it goes on; dead, it is started."""
        if self._process is not None:
            self._go_on(self._process)
        self.start()

    def _go_on(self, process: Process) -> None:
        if process.alive and process.paused:
            self._world.tell(f"{process.name} goes on")
            process.resume()

    def _come_back(self) -> None:
        world = self._world
        wait = 0.1 if world.faults_are_over else world.moment(0.01, self._away_seconds)
        if self._next_away is not None:
            wait, self._next_away = self._next_away, None
        world.loop.call_later(wait, self.start)

    async def _serve(self, process: Process) -> None:
        try:
            await self._live(process, self._leave)
        except* StoreUnavailable as group:
            self._world.tell(f"{process.name} cannot go on: {group.exceptions[0]!r}")
        except* Exception as group:
            self._world.violated("faults", f"{process.name} fell: {group.exceptions!r}")
        self._world.tell(f"{process.name} has left")
        process.kill()
