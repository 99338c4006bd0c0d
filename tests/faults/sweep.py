"""The sweep: a process of the reference workflow dies at each of its crash points in turn."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from anyio import to_thread

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import ensure_daemon, find_daemon, stop_daemon
from spellq_sdk.doors import Address
from tests.faults.armed_daemon import REPORT
from tests.faults.evidence import Starts, Tally, examine
from tests.faults.home import home_of_its_own
from tests.faults.reference import check_undisturbed, play

_IN_THE_MIDDLE: Final = 180
"""A point of the daemon by which every kind of run is under way."""


@dataclass(frozen=True)
class Arm:
    """A daemon that dies at its point number `at`, or the helper of `slot` at its own."""

    at: int
    slot: str | None = None

    def __str__(self) -> str:
        return f"{self.slot or 'daemon'}:{self.at}"


SWEEPS: Final[dict[str, Callable[[int], tuple[Arm, ...]]]] = {
    "the daemon": lambda at: (Arm(at),),
    "the daemon that comes after one": lambda at: (Arm(_IN_THE_MIDDLE), Arm(at)),
    "a worker's slot helper": lambda at: (Arm(at, "cpu-0"),),
    "a master's slot helper": lambda at: (Arm(at, "masters-0"),),
}
"""Who dies: given the number of the point, the armed daemons in the order they are started."""


@dataclass(frozen=True)
class Crash:
    """What came of one play. `points` are those somebody died at, in order."""

    arms: tuple[Arm, ...]
    points: tuple[str, ...]
    tally: Tally

    @property
    def is_complete(self) -> bool:
        """Whether every armed process died, so that there may be later points."""
        return len(self.points) == len(self.arms)


class ArmedDoor:
    """A client's way to the local daemon; those that are started are armed as long as arms last."""

    def __init__(self, home: Path, arms: Sequence[Arm]) -> None:
        self._home = home
        self._arms = list(arms)
        self._started: list[asyncio.subprocess.Process] = []
        self._one_at_a_time = asyncio.Lock()

    async def locate(self) -> Address:
        async with self._one_at_a_time:
            daemon = await to_thread.run_sync(find_daemon, self._home)
            while daemon is None and self._arms:
                await self._start(self._arms.pop(0))
                daemon = await to_thread.run_sync(find_daemon, self._home)
            if daemon is None:
                daemon = await to_thread.run_sync(ensure_daemon, self._home)
            return Address(daemon.url, daemon.token)

    async def close(self) -> None:
        """Wait for those that were started, and were asked to leave by now."""
        await asyncio.gather(*(armed.wait() for armed in self._started))

    async def _start(self, arm: Arm) -> None:
        """Start one, and return when it serves, or is dead already."""
        reading, writing = os.pipe()
        arguments = [str(self._home), arm.slot or "daemon", str(arm.at), str(writing)]
        with (self._home / "log").open("ab") as log:
            armed = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.faults.armed_daemon", *arguments,
                stdout=log, stderr=log, pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            await to_thread.run_sync(ready.readline)
        self._started.append(armed)


async def crash(*arms: Arm) -> Crash:
    """Play the reference workflow over armed daemons, one after the other; look at what is left."""
    tally = Tally()
    with home_of_its_own("spellq-crash-") as home:
        (home / "config.toml").write_text(f'machine_types = "cpu=4"\nport = {_free_port()}\n')
        door = ArmedDoor(home, arms)
        async with Starts.listening() as starts:
            async with AsyncClient.at(door) as client:
                witness = await play(client, starts, tally)
            await to_thread.run_sync(stop_daemon, home)
            await door.close()
            await examine(home, witness.launched.values(), starts, tally)
        if not any(arm.slot for arm in arms):
            check_undisturbed(witness, tally)
        report = home / REPORT
        points = tuple(report.read_text().splitlines()) if report.exists() else ()
        if tally.faults:
            tally.faults.append((home / "log").read_text()[-4000:])
    tally.kills += len(points)
    return Crash(arms, points, tally)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def sweep(
    arms: Callable[[int], tuple[Arm, ...]], at_once: int, seen: Callable[[Crash], None]
) -> int:
    """Every point, from the first to where nobody dies any more; returns how many there were."""
    numbers: Iterator[int] = iter(range(1, 1_000_000))
    points = 0
    over = False

    async def work() -> None:
        nonlocal over, points
        while not over:
            done = await crash(*arms(next(numbers)))
            over = over or not done.is_complete
            points += done.is_complete
            seen(done)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(work())
    return points
