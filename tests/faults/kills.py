"""Kills at random: whatever belongs to a busy installation dies, again and again, by kill -9."""

import asyncio
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from anyio import to_thread

from spellq.runs import Run, Status
from spellq_sdk import AsyncClient
from spellq_sdk.daemon import find_daemon, stop_daemon
from spellq_sdk.doors import LocalDoor
from tests.faults.evidence import Starts, Tally, examine
from tests.faults.home import end, home_of_its_own, is_helper
from tests.faults.reference import SCRIPT

SPELLQ: Final = Path(sys.executable).parent / "spellq"
AT_ONCE: Final = 10
WAIT_SECONDS: Final = 60.0
BETWEEN_SECONDS: Final = (0.02, 0.5)
_VICTIMS: Final = {"daemon": 30, "helper": 25, "command": 25, "master": 10, "cli": 10}
"""Who dies, and how often in a hundred."""


@dataclass
class _Expected:
    """A run the campaign launched: how it ends and what it says if nobody touches it."""

    code: int
    lines: list[str]
    said: list[str] = field(default_factory=list)


class Campaign:
    """One busy installation under fire. `shown` is told of every kill."""

    def __init__(
        self, home: Path, starts: Starts, kills: int, seed: int, shown: Callable[[str], None]
    ) -> None:
        self.tally = Tally()
        self._home = home
        self._starts = starts
        self._kills = kills
        self._random = random.Random(seed)
        self._shown = shown
        self._client = AsyncClient.at(LocalDoor(home))
        self._expected: dict[int, _Expected] = {}
        self._hit: set[int] = set()
        self._launched: set[int] = set()
        self._over = False
        self._cli: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        async with self._client:
            await self._client.me()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_ONCE):
                    tasks.create_task(self._keep_running())
                tasks.create_task(self._keep_a_workflow_going())
                tasks.create_task(self._kill_away())
            await self._wait_for_the_rest()
        await to_thread.run_sync(stop_daemon, self._home)
        for run in await examine(self._home, self._launched, self._starts, self.tally):
            self._compare(run)

    # Work

    async def _keep_running(self) -> None:
        while not self._over:
            seconds = self._random.choice((0, 0.05, 0.2, 0.7, 1.5))
            expected = _Expected(self._random.randrange(4), ["a", "b", "c"])
            run = await self._client.runs.new(
                command=f"{self._starts.words} echo a; echo b; sleep {seconds}; echo c; "
                f"exit {expected.code}"
            )
            self._launched.add(run.id)
            self._expected[run.id] = expected
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    async for line in run.logs(follow=True):
                        if line.status == "running" and not line.status_event:
                            expected.said.append(line.log)
                    await run.wait_status(*self._client.runs.FINAL)
            except TimeoutError:
                self._miss(f"run {run.id} keeps its waiter waiting")

    async def _keep_a_workflow_going(self) -> None:
        project = self._home.with_name("project")
        project.mkdir()
        await to_thread.run_sync(shutil.copy, SCRIPT, project)
        while not self._over:
            self._cli = await asyncio.create_subprocess_exec(
                SPELLQ, "workflow", "create", "--env", f"START={self._starts.words}",
                f"{self._starts.words} python {SCRIPT.name}",
                cwd=project, env={**os.environ, "SPELLQ_HOME": str(self._home)},
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._cli.wait()
            except TimeoutError:
                self._miss("`spellq workflow` does not come back")
            finally:
                await end(self._cli)

    async def _wait_for_the_rest(self) -> None:
        """What a killed workflow left running, and what it launched."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                for run in await self._client.runs.list(1_000_000, live=True):
                    await run.wait_status(*self._client.runs.FINAL)
        except TimeoutError:
            self._miss("runs are left that do not end")

    def _miss(self, what: str) -> None:
        self.tally.waits_missed += 1
        self.tally.faults.append(what)

    # Death

    async def _kill_away(self) -> None:
        names, weights = list(_VICTIMS), list(_VICTIMS.values())
        while self.tally.kills < self._kills:
            await asyncio.sleep(self._random.uniform(*BETWEEN_SECONDS))
            (name,) = self._random.choices(names, weights)
            if await getattr(self, f"_kill_{name}")():
                self.tally.kills += 1
                self._shown(name)
        self._over = True

    async def _kill_daemon(self) -> bool:
        daemon = await to_thread.run_sync(find_daemon, self._home)
        if daemon is None or not _kill(daemon.pid):
            return False
        died = time.monotonic()
        await self._client.me()
        self.tally.recoveries.append(time.monotonic() - died)
        return True

    async def _kill_helper(self) -> bool:
        slots = [file.parent for file in self._home.glob("agent/slots/*/helper.pid")]
        slot = self._random.choice(slots) if slots else None
        if slot is None or not is_helper(pid := int((slot / "helper.pid").read_text()), slot):
            return False
        self._note_runs_in(slot)
        killed = _kill(pid)
        self._note_runs_in(slot)
        return killed

    def _note_runs_in(self, slot: Path) -> None:
        """Whatever has a folder there may be interrupted by its helper's death."""
        for folder in slot.glob("*-*"):
            number = folder.name.removeprefix("discarded-").partition("-")[0]
            if number.isdigit():
                self._hit.add(int(number))

    async def _kill_command(self) -> bool:
        return self._kill_one_of("cpu-*")

    async def _kill_master(self) -> bool:
        return self._kill_one_of("masters-*")

    def _kill_one_of(self, pattern: str) -> bool:
        slots = self._home.glob(f"agent/slots/{pattern}")
        commands = [pid for slot in slots for pid in _commands(slot)]
        if not commands:
            return False
        pid = self._random.choice(commands)
        run = _run_of(pid)
        if run is None:
            return False
        self._hit.add(run)
        return _kill(pid)

    async def _kill_cli(self) -> bool:
        return self._cli is not None and self._cli.returncode is None and _kill(self._cli.pid)

    # Judgement

    def _compare(self, run: Run) -> None:
        expected = self._expected.get(run.id)
        if run.id in self._hit:
            lawful = (Status.COMPLETE, Status.INTERRUPTED, Status.STOPPED, Status.KILLED)
            if run.status not in lawful:
                self.tally.faults.append(f"run {run.id}, hit: {run.status}, {run.reason}")
            return
        if expected is None:
            return
        if (run.status, run.user_exit_code) != (Status.COMPLETE, expected.code):
            self.tally.faults.append(
                f"run {run.id}: {run.status} {run.user_exit_code}, {run.reason}"
            )
        if expected.said != expected.lines:
            self.tally.faults.append(f"run {run.id} said {expected.said}")


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _commands(slot: Path) -> Iterator[int]:
    """The shells that the slot's helper is the parent of."""
    with suppress(OSError, ValueError):
        pid = int((slot / "helper.pid").read_text())
        if is_helper(pid, slot):
            yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def _run_of(pid: int) -> int | None:
    with suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"SPELL_RUN="):
                return int(variable.partition(b"=")[2])
    return None


async def kill_at_random(kills: int, seed: int, shown: Callable[[str], None]) -> Tally:
    """So many kills; the victims are drawn by seed, the moments are the machine's."""
    with home_of_its_own("spellq-kills-") as home:
        (home / "config.toml").write_text('machine_types = "cpu=6"\n')
        async with Starts.listening() as starts:
            campaign = Campaign(home, starts, kills, seed, shown)
            await campaign.run()
        if campaign.tally.faults:
            campaign.tally.faults.append((home / "log").read_text()[-4000:])
        return campaign.tally
