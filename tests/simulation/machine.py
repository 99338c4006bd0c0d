"""A simulated machine: helpers that outlive the agent, commands, their files, and the boot.

It keeps what really happened: which command was executed when, what it said, and how it ended. That
is the truth the store's words are compared with.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct, json

from spellq.ports import Adopted, Execution, ExecutionLost, Exit, Job, WorldError
from spellq.trees import Tree, TreeEntry
from spellq_workers.machine import Incarnation
from spellq_workers.outputs import FoundFile, Scan
from spellq_workers.rawlog import Piece
from spellq_workers.room import Room, Say
from tests.simulation.loop import Process
from tests.simulation.world import Signal, SimClock, World

_TERM: Final = 143
_KILL: Final = 137


class Script(Struct, frozen=True, omit_defaults=True):
    """What a simulated command does. Times are in seconds.

    `lines` are the times between what it says. Asked to end, it does so after `heeds` seconds, or
    (None) only when it is killed. A `master` launches workers, with `endless` one without an end.
    """

    seconds: float = 0.0
    code: int = 0
    lines: tuple[float, ...] = ()
    heeds: float | None = 0.0
    outputs: int = 0
    master: bool = False
    endless: bool = False

    def command(self) -> str:
        return json.encode(self).decode()


class Folder:
    """What is on the disk of one attempt, and what truly became of its command."""

    def __init__(self, machine: "SimMachine", job: Job) -> None:
        self.run = job.run
        self.attempt = job.attempt
        self.slot = job.slot
        self.script = json.decode(job.command, type=Script)
        self.held = True
        self.marked = False
        self.exit: Exit | None = None
        self.natural = False
        self.lost = False
        self.said: list[Piece] = []
        self.process: Process | None = None
        self.changed = Signal(machine.world.loop)
        self._machine = machine
        self._doom: int | None = None

    @property
    def name(self) -> str:
        return f"{self.run}.{self.attempt}"

    @property
    def is_executing(self) -> bool:
        return self.process is not None and self.exit is None and self.held

    def execute(self) -> None:
        """The helper's `start`."""
        if self.exit is not None or self.process is not None or not self.held:
            return
        if self._doom is not None:
            self._finish(self._doom)
            return
        self.marked = True
        world = self._machine.world
        world.tell(f"run {self.run}: executed, attempt {self.attempt} in {self.slot}")
        self._machine.note_start(self)
        self.process = world.process(f"run {self.name}")
        self.process.spawn(self._work())

    async def _work(self) -> None:
        for seconds in self.script.lines:
            await asyncio.sleep(seconds)
            self._say()
        await asyncio.sleep(self.script.seconds)
        code = self.script.code
        if self.script.master:
            code = await self._machine.as_master(self.run, endless=self.script.endless)
        self.natural = True
        self._finish(code)

    def _say(self) -> None:
        text = f"line {len(self.said)} of run {self.run}"
        place = self.said[-1].raw_end if self.said else 0
        self.said.append(Piece(text, place + len(text) + 1))
        self.changed.give()

    def _finish(self, code: int, by: int | None = None) -> None:
        if self.exit is not None:
            return
        at = self._machine.clock.now()
        self.exit = Exit(code=code, signal=by, started_at=at, ended_at=at)
        self._machine.world.tell(f"run {self.run}: the command ended with {code}")
        if self.process is not None:
            self.process.kill()
        self.changed.give()

    def end(self, code: int) -> None:
        """Kill what there is (from outside), or see to it that there never will be anything."""
        if self.is_executing:
            self._finish(code, code - 128)
        elif self.exit is None and self.held:
            self._doom = _KILL if _KILL in (code, self._doom) else code

    def ask_to_end(self, grace_seconds: float) -> None:
        if not self.is_executing:
            self.end(_TERM)
            return
        heeds = self.script.heeds
        asyncio.get_running_loop().call_later(
            grace_seconds if heeds is None else min(heeds, grace_seconds),
            self.end,
            _KILL if heeds is None or heeds > grace_seconds else _TERM,
            context=self._machine.outside,
        )

    def lose(self) -> None:
        """The helper is gone, and every process of the world with it."""
        self.held = False
        if self.process is not None:
            self.process.kill()
        if self.exit is None:
            self.lost = True
            self._machine.world.tell(f"run {self.run}: its helper is gone")
        self.changed.give()


class AsMaster(Protocol):
    """What a master's script does; returns its exit code."""

    def __call__(self, number: int, *, endless: bool) -> Coroutine[Any, Any, int]: ...


class SimMachine:
    """The durable part of a machine; agents come and go on it."""

    def __init__(self, world: World, name: str, slots: dict[str, int]) -> None:
        self.world = world
        self.name = name
        self.slots = slots
        self.clock = SimClock(world)
        self.boots = 1
        self.reserve_bytes = 0
        self.record: tuple[Incarnation, ...] = ()
        self.folders: dict[tuple[str, int, int], Folder] = {}
        self.starts: list[Folder] = []
        self.every_folder: list[Folder] = []
        self.as_master: AsMaster
        self.outside = Context()

    def note_start(self, folder: Folder) -> None:
        for other in self.starts:
            if other.slot == folder.slot and other.is_executing:
                self.world.violated(
                    "faults", f"runs {other.name} and {folder.name} at once in {folder.slot}"
                )
        self.starts.append(folder)
        self.world.note_start(folder.run)

    def kill_helper(self, slot: str) -> None:
        for folder in list(self.folders.values()):
            if folder.slot == slot and folder.held:
                folder.lose()

    def reboot(self) -> None:
        self.boots += 1
        for folder in list(self.folders.values()):
            if folder.held:
                folder.lose()

    def slots_in_use(self) -> list[str]:
        return [folder.slot for folder in self.folders.values() if folder.held]


class SimExecution:
    """Implements `spellq.ports.Execution`."""

    def __init__(self, machine: SimMachine, folder: Folder) -> None:
        self.run = folder.run
        self.attempt = folder.attempt
        self.slot = folder.slot
        self.output = Path("output")
        self.files = Path("files")
        self.folder = folder
        self._world = machine.world
        self._machine = machine

    async def start(self) -> None:
        await self._world.point(f"start of run {self.run}, before")
        await self._world.take_time(0.0001, 0.01)
        if self.folder.exit is not None:
            return
        if not self.folder.held:
            raise ExecutionLost(f"The slot helper of run {self.run} is gone.")
        self.folder.execute()
        await self._world.point(f"start of run {self.run}, after")
        await self._world.take_time(0.0001, 0.01)

    async def ended(self) -> Exit:
        folder = self.folder
        await folder.changed.until(lambda: folder.exit is not None or not folder.held)
        await self._world.point(f"end of run {self.run}")
        await self._world.take_time(0.0001, 0.01)
        if folder.exit is None:
            raise ExecutionLost(f"The slot helper of run {self.run} is gone, and left no journal.")
        return folder.exit

    async def stop(self, grace_seconds: float) -> None:
        await self._world.point(f"stop of run {self.run}")
        await self._world.take_time(0.0001, 0.01)
        self.folder.ask_to_end(grace_seconds)

    async def kill(self) -> None:
        await self._world.point(f"kill of run {self.run}")
        await self._world.take_time(0.0001, 0.01)
        self.folder.end(_KILL)

    async def discard(self) -> None:
        await self._world.point(f"discard of run {self.run}, before")
        await self._world.take_time(0.0001, 0.01)
        folder = self.folder
        folder.end(_KILL)
        folder.held = False
        folder.changed.give()
        self._machine.folders.pop((folder.slot, folder.run, folder.attempt), None)
        await self._world.point(f"discard of run {self.run}, after")


class SimExecutor:
    """Implements `spellq.ports.Executor` for one incarnation of an agent."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine
        self._world = machine.world

    async def prepare(self, job: Job) -> SimExecution:
        world, machine = self._world, self._machine
        await world.point(f"world of run {job.run}, before")
        await world.take_time(0.0005, 4.0 if world.chance(0.1) else 0.01)
        if world.chance(0.02) and not world.faults_are_over:
            raise WorldError("No world today.", mount=bool(job.mounts))
        for other in list(machine.folders.values()):
            if other.slot == job.slot and other.is_executing:
                world.violated("faults", f"{other.name} still executes in {job.slot}")
        folder = Folder(machine, job)
        machine.folders[job.slot, job.run, job.attempt] = folder
        machine.every_folder.append(folder)
        try:
            await world.point(f"world of run {job.run}, after")
            await world.take_time(0.0005, 0.01)
        except asyncio.CancelledError:
            folder.end(_KILL)
            folder.held = False
            machine.folders.pop((job.slot, job.run, job.attempt), None)
            raise
        return SimExecution(machine, folder)

    async def adopt(self) -> list[Adopted]:
        await self._world.point("adopt")
        await self._world.take_time(0.001, 0.05)
        return [
            Adopted(
                SimExecution(self._machine, folder),
                folder.marked,
                folder.held or folder.exit is not None,
                folder.exit,
            )
            for folder in self._machine.folders.values()
        ]

    async def close(self) -> None:
        pass


class _Output:
    """Implements `spellq_workers.machine.Output`."""

    def __init__(self, folder: Folder, start: int) -> None:
        self._folder = folder
        self._delivered = start
        self._finished = False

    def finish(self) -> None:
        self._finished = True
        self._folder.changed.give()

    async def batches(self) -> AsyncIterator[list[Piece]]:
        while True:
            finished = self._finished
            pieces = [piece for piece in self._folder.said if piece.raw_end > self._delivered]
            if pieces:
                self._delivered = pieces[-1].raw_end
                yield pieces
            elif finished:
                return
            else:
                await self._folder.changed.until(lambda: self._finished or self._has_more())

    def _has_more(self) -> bool:
        said = self._folder.said
        return bool(said) and said[-1].raw_end > self._delivered


class AgentsMachine:
    """Implements `spellq_workers.machine.Machine` for one incarnation of an agent."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine
        self._world = machine.world
        self.boot_id = f"boot {machine.boots}"
        self.room = Room(Path("/"), machine.reserve_bytes)

    async def recall(self) -> tuple[Incarnation, ...]:
        await self._world.point("recall")
        return self._machine.record

    async def remember(self, incarnations: Sequence[Incarnation]) -> None:
        await self._world.point("remember, before")
        self._machine.record = tuple(incarnations)
        await self._world.point("remember, after")

    async def code(self, tree_id: str) -> Path:
        return Path("code")

    def look(self) -> None:
        self.room.look()

    async def content(self, tree_id: str, subpath: str) -> Path:
        await self._world.take_time(0.001, 1.0)
        if self._world.chance(0.1) and not self._world.faults_are_over:
            raise WorldError("No such tree.", mount=True)
        return Path("content")

    def output(self, execution: Execution, start: int) -> _Output:
        assert isinstance(execution, SimExecution)
        return _Output(execution.folder, start)

    async def scan(
        self, execution: Execution, snapshot: str | None, mount_targets: Sequence[str]
    ) -> Scan:
        assert isinstance(execution, SimExecution)
        script = execution.folder.script
        if not script.outputs:
            return Scan()
        await self._world.take_time(0.001, 2.0)
        if self._world.chance(0.02) and not self._world.faults_are_over:
            raise OSError("a bad disk")
        return Scan(tuple(FoundFile(f"output{n}", 1, False) for n in range(script.outputs)))

    async def save(self, found: Scan, say: Say) -> Tree:
        entries = []
        for file in found.files:
            await say([f"Saving {file.path!r}"])
            await self._world.point("save")
            await self._world.take_time(0.001, 2.0)
            entries.append(TreeEntry(file.path, 1, hashlib.sha256(file.path.encode()).hexdigest()))
        return Tree(tuple(entries))
