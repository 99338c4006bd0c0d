"""An agent's machine, as far as it is files: code and mounts, output, outputs, its own record."""

import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec
from anyio import to_thread
from msgspec import Struct

from spellq.ports import ArtifactStore, Execution
from spellq.trees import Tree, decode_tree
from spellq_workers import folders
from spellq_workers.checkouts import Checkouts
from spellq_workers.outputs import Scan, is_untouched, save, scan
from spellq_workers.rawlog import OutputWatcher, Piece, RawLog
from spellq_workers.room import Room, Say

_SCRATCH: Final = ("tmp", "home")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)


class Incarnation(Struct, frozen=True):
    """One life of an agent: its id, and the machine's boot it was in."""

    agent: str
    boot_id: str


class Output(Protocol):
    """What a command writes, from some place on."""

    def finish(self) -> None:
        """The command has ended: nothing more will be written."""

    def batches(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, never an empty batch; ends after `finish` with the last one."""


class Machine(Protocol):
    """What an agent finds on its machine beside the executor."""

    @property
    def boot_id(self) -> str:
        """New whenever the machine was started anew."""

    @property
    def room(self) -> Room:
        """Of its disk; without it nothing is claimed."""

    def look(self) -> None:
        """With every heartbeat: see to what no event tells of."""

    async def recall(self) -> tuple[Incarnation, ...]:
        """What `remember` was given last; empty on a new machine."""

    async def remember(self, incarnations: Sequence[Incarnation]) -> None:
        """Keep this, durably, in place of what was there."""

    async def code(self, tree_id: str) -> Path:
        """A stored tree as the folder a command's /spell is laid over.

        Raises:
            WorldError: there is no such tree.
        """

    async def content(self, tree_id: str, subpath: str) -> Path:
        """A stored tree, or what is at `subpath` in it, to be mounted read-only.

        Raises:
            WorldError: there is no such tree, or nothing there.
        """

    def output(self, execution: Execution, start: int) -> Output:
        """The command's stdout and stderr from byte `start` on."""

    async def scan(
        self, execution: Execution, snapshot: str | None, mount_targets: Sequence[str]
    ) -> Scan:
        """What the ended command made or changed, against the code it was given."""

    async def save(self, found: Scan, say: Say) -> Tree:
        """Store what was found, while there is room; `say` gets the log lines."""


class LocalMachine:
    """Implements `Machine` for the one this process runs on; `folder` is the agent's own."""

    def __init__(
        self,
        folder: Path,
        artifacts: ArtifactStore,
        watcher: OutputWatcher,
        room: Room | None = None,
    ) -> None:
        self.boot_id = _BOOT_ID.read_text().strip()
        self.room = room or Room(folder, 0)
        self._record = folder / "incarnations.json"
        self._artifacts = artifacts
        self._checkouts = Checkouts(folder / "checkouts", artifacts)
        self._watcher = watcher

    def look(self) -> None:
        self.room.look()
        self._watcher.look()

    async def recall(self) -> tuple[Incarnation, ...]:
        try:
            data = await to_thread.run_sync(self._record.read_bytes)
            return msgspec.json.decode(data, type=tuple[Incarnation, ...])
        except (FileNotFoundError, msgspec.DecodeError):
            return ()

    async def remember(self, incarnations: Sequence[Incarnation]) -> None:
        await to_thread.run_sync(_replace, self._record, msgspec.json.encode(incarnations))

    async def code(self, tree_id: str) -> Path:
        return await self._checkouts.code(tree_id)

    async def content(self, tree_id: str, subpath: str) -> Path:
        return await self._checkouts.path(tree_id, subpath)

    def output(self, execution: Execution, start: int) -> Output:
        return RawLog(Path(execution.output), start, self._watcher)

    async def scan(
        self, execution: Execution, snapshot: str | None, mount_targets: Sequence[str]
    ) -> Scan:
        files = Path(execution.files)
        if is_untouched(files):
            return Scan()
        before = None
        if snapshot is not None:
            before = decode_tree(await self._artifacts.get_bytes(snapshot))
        return await scan(files, before, mount_targets)

    async def save(self, found: Scan, say: Say) -> Tree:
        if self.room.lack():
            await to_thread.run_sync(_empty_scratch, found.folder.parent)
        return await save(found, _PatientKeeper(self._artifacts, self.room, say), say)


class _PatientKeeper:
    """Keeps contents in the store once there is room for them."""

    def __init__(self, artifacts: ArtifactStore, room: Room, say: Say) -> None:
        self._artifacts = artifacts
        self._room = room
        self._say = say

    async def adopt(
        self, files: Sequence[BinaryIO], *, copy: bool = False
    ) -> list[tuple[str, int]]:
        return await self._room.spend(lambda: self._artifacts.adopt(files, copy=copy), self._say)


def _empty_scratch(folder: Path) -> None:
    """Nobody needs what an ended run left in its /tmp and home; it may be what takes the room."""
    for name in _SCRATCH:
        try:
            scratch = folders.open_folder(str(folder / name))
            try:
                folders.empty(scratch)
            finally:
                os.close(scratch)
        except OSError as error:
            _log.warning("%s cannot be emptied: %s", folder / name, error)


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, as it was or as it shall be."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
