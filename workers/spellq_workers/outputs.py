"""A run's outputs: which files below /spell are new or changed, and their way into the store."""

import errno
import hashlib
import os
import posixpath
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from anyio import from_thread, to_thread
from msgspec import Struct

from spellq import sparse
from spellq.resources import RUN_DIRECTORY
from spellq.trees import (
    MAX_ENTRIES,
    Tree,
    TreeEntry,
    link_stays_inside,
    make_tree,
    on_one_line,
)
from spellq_workers.checkouts import follow_links
from spellq_workers.copies import read_copied, state
from spellq_workers.folders import open_file, open_folder
from spellq_workers.runfolder import may_be_held

OUTPUTS_BYTES: Final = 100 << 30
"""How much one run may save."""

MAX_PATH_BYTES: Final = 3584
"""Of an output below /spell: with the folder it will once be mounted from, it stays below 4096."""

MAX_NOTES: Final = 256
"""About what cannot be saved; what goes beyond is counted."""

_SAID_AT_ONCE: Final = 256
_FILES_AT_ONCE: Final = 32
_BYTES_AT_ONCE: Final = 8 << 20
_OURS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
"""Faults for which no file of the run can be blamed: none is left out because of them."""

_WHITEOUT: Final = os.makedev(0, 0)
"""The device by which an overlay marks what was deleted."""

_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class OutputsTooLarge(ValueError):
    """A run made more than it may save; nothing of it is saved, and the message names the limit."""


class Keeper(Protocol):
    """Keeps contents, as an artifact store does."""

    async def adopt(
        self, files: Sequence[BinaryIO], *, copy: bool = False
    ) -> list[tuple[str, int]]:
        """As `ArtifactStore.adopt`."""


class FoundFile(Struct, frozen=True):
    """A regular file to be saved, by its path below /spell; `size` in bytes."""

    path: str
    size: int
    executable: bool


class Scan(Struct, frozen=True):
    """What a run made in `folder`. `notes` are log lines about what cannot be saved.

    `held`: somebody outside may still change what is in the folder.
    """

    files: tuple[FoundFile, ...] = ()
    links: tuple[TreeEntry, ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path = Path()
    held: bool = True

    def __bool__(self) -> bool:
        return bool(self.files or self.links)


def is_untouched(files: Path) -> bool:
    """Whether the run's folder holds nothing at all: one system call, no thread."""
    try:
        with os.scandir(files) as entries:
            return next(entries, None) is None
    except PermissionError:  # the command closed it, even to its own user
        return False


async def scan(files: Path, snapshot: Tree | None, mount_targets: Sequence[str]) -> Scan:
    """Look through the folder an execution's `files` names, after its last process is dead.

    New or changed against the snapshot by content or by the executable bit; of what is no file
    and no link, of deletions and of the run's own mount points nothing is an output. What the
    run's own user may not read is made readable. Can be cancelled.

    Raises:
        OutputsTooLarge: beyond 100 GiB, or 2,000,000 files and links.
    """
    return await to_thread.run_sync(_scan, files, snapshot, mount_targets)


async def save(
    found: Scan, artifacts: Keeper, say: Callable[[Sequence[str]], Awaitable[None]]
) -> Tree:
    """Move what was found into the store; `say` gets the log lines, before their files move.

    What somebody has taken away since, or made something else, is left out. Can be cancelled
    between two files, and between two pieces of one; what was moved until then is whole.
    """
    entries = list(found.links)
    names = [file.path for file in found.files] + [link.path for link in found.links]
    lines = [f"Saving '{_shown(name)}'" for name in sorted(names)]
    for at in range(0, len(lines), _SAID_AT_ONCE):
        await say(lines[at : at + _SAID_AT_ONCE])
    for files in _batches(found.files):
        with ExitStack() as stack:
            opened, notes = await to_thread.run_sync(_open_all, found.folder, files, stack)
            stored = await artifacts.adopt(list(opened.values()), copy=found.held)
        for file, (sha256, size) in zip(opened, stored, strict=True):
            entries.append(
                TreeEntry(path=file.path, size=size, sha256=sha256, executable=file.executable)
            )
        if notes:
            await say(notes)
    return make_tree(entries)


def _batches(files: Sequence[FoundFile]) -> Iterator[list[FoundFile]]:
    batch: list[FoundFile] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file.size
        if len(batch) == _FILES_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_all(
    folder: Path, files: Sequence[FoundFile], stack: ExitStack
) -> tuple[dict[FoundFile, BinaryIO], list[str]]:
    """Those files that are there as such, and lines about the others."""
    opened: dict[FoundFile, BinaryIO] = {}
    notes = _Notes()
    root = open_folder(str(folder))
    try:
        for file in files:
            try:
                opened[file] = stack.enter_context(_open(root, file.path))
            except OSError as error:
                if error.errno in _OURS:
                    raise
                notes.skip(file.path, error.strerror or str(error))
    finally:
        os.close(root)
    return opened, notes.lines


def _open(root: int, path: str) -> BinaryIO:
    """Only ever a regular file below `root`, whatever was put in its place since the scan."""
    parent = open_folder(posixpath.dirname(path), root)
    try:
        return os.fdopen(open_file(posixpath.basename(path), parent), "rb", buffering=0)
    finally:
        os.close(parent)


class _Notes:
    """Log lines about what cannot be saved, as many as anybody reads."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    def skip(self, path: str, why: str) -> None:
        if len(self._lines) < MAX_NOTES:
            self._lines.append(f"Skipping '{_shown(path)}': {why}")
        else:
            self._more += 1

    @property
    def lines(self) -> list[str]:
        more = [f"Skipping {self._more} more"] if self._more else []
        return sorted(self._lines) + more


def _scan(folder: Path, snapshot: Tree | None, mount_targets: Sequence[str]) -> Scan:
    before = {entry.path: entry for entry in snapshot.entries} if snapshot else {}
    copied = read_copied(str(folder.parent))
    files: list[FoundFile] = []
    links: list[TreeEntry] = []
    notes = _Notes()
    room = OUTPUTS_BYTES
    for parent, entry, path in _walk(folder, _mount_points(before, mount_targets), notes):
        if not _is_text(path):
            notes.skip(path, "its name is not UTF-8")
        elif entry.is_symlink():
            target = os.readlink(entry.name, dir_fd=parent)
            _look_at_link(target, path, before.get(path), links, notes)
        elif entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            if path in copied and state(status) == copied[path]:
                continue
            file = _look_at_file(parent, entry, path, before.get(path), notes)
            if file is not None:
                files.append(file)
                room -= file.size
        else:
            _look_at_special(entry, path, notes)
        if room < 0:
            raise OutputsTooLarge(
                f"they are larger than {OUTPUTS_BYTES >> 30} GiB, the limit of one run"
            )
        if len(files) + len(links) > MAX_ENTRIES:
            raise OutputsTooLarge(f"they are more than {MAX_ENTRIES} files, the limit of one run")
    files.sort(key=lambda file: file.path)
    links = _leading_inside(sorted(links, key=lambda link: link.path), before, notes)
    held = may_be_held(str(folder.parent))
    return Scan(tuple(files), tuple(links), tuple(notes.lines), folder, held)


def _walk(
    folder: Path, mount_points: set[str], notes: _Notes
) -> Iterator[tuple[int, "os.DirEntry[str]", str]]:
    """All that is no folder, as (its folder's descriptor, entry, path below `folder`)."""
    root = open_folder(str(folder))
    try:
        pending = [""]
        while pending:
            from_thread.check_cancelled()
            prefix = pending.pop()
            parent = open_folder(prefix, root)
            try:
                with os.scandir(parent) as entries:
                    found = list(entries)
                for entry in found:
                    path = prefix + entry.name
                    if path in mount_points:
                        continue
                    if len(os.fsencode(path)) > MAX_PATH_BYTES:
                        notes.skip(path, "its path is too long")
                    elif not entry.is_dir(follow_symlinks=False):
                        yield parent, entry, path
                    elif _is_open(parent, entry, stat.S_IRWXU, path, notes):
                        pending.append(path + "/")
            finally:
                os.close(parent)
    finally:
        os.close(root)


def _is_open(parent: int, entry: "os.DirEntry[str]", wanted: int, path: str, notes: _Notes) -> bool:
    """Whether its owner may use it, which is seen to; a run may have shut out its own user."""
    mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
    if mode & wanted == wanted:
        return True
    try:
        place = os.open(entry.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{place}", mode | wanted)
        finally:
            os.close(place)
    except OSError as error:
        if error.errno in _OURS:
            raise
        notes.skip(path, error.strerror or str(error))
        return False
    return True


def _mount_points(before: dict[str, TreeEntry], targets: Sequence[str]) -> set[str]:
    """The run's own mount points below /spell, where they really are: code may hold links."""
    links = {path: entry.link for path, entry in before.items() if entry.link is not None}
    inside = [target[len(RUN_DIRECTORY) + 1 :] for target in targets if _is_inside(target)]
    return {follow_links(links, path) or path for path in inside}


def _is_inside(target: str) -> bool:
    return target.startswith(RUN_DIRECTORY + "/")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str) -> str:
    return on_one_line(os.fsencode(f"{RUN_DIRECTORY}/{path}").decode(errors="backslashreplace"))


def _look_at_link(
    target: str, path: str, before: TreeEntry | None, links: list[TreeEntry], notes: _Notes
) -> None:
    if target == RUN_DIRECTORY or _is_inside(target):
        inside = posixpath.join("/", posixpath.dirname(path))
        target = posixpath.relpath(target[len(RUN_DIRECTORY) :] or "/", inside)
    if not _is_text(target):
        notes.skip(path, "where the link leads is not UTF-8")
    elif not link_stays_inside(path, target):
        notes.skip(path, f"the link leads out of {RUN_DIRECTORY}")
    elif before is None or before.link != target:
        links.append(TreeEntry(path=path, link=target))


def _leading_inside(
    links: Sequence[TreeEntry], before: dict[str, TreeEntry], notes: _Notes
) -> list[TreeEntry]:
    """Those that do so also by way of other links."""
    known = {entry.path: entry.link for entry in (*before.values(), *links) if entry.link}
    kept = []
    for link in links:
        if follow_links(known, link.path) is None:
            notes.skip(link.path, f"the link leads out of {RUN_DIRECTORY}, or in circles")
        else:
            kept.append(link)
    return kept


def _look_at_file(
    parent: int,
    entry: "os.DirEntry[str]",
    path: str,
    before: TreeEntry | None,
    notes: _Notes,
) -> FoundFile | None:
    """The file, if it is an output."""
    if not _is_open(parent, entry, stat.S_IRUSR, path, notes):
        return None
    state = entry.stat(follow_symlinks=False)
    file = FoundFile(path, state.st_size, bool(state.st_mode & stat.S_IXUSR))
    return file if _is_changed(parent, entry.name, file, before) else None


def _look_at_special(entry: "os.DirEntry[str]", path: str, notes: _Notes) -> None:
    """What is neither file nor link nor folder; where something was deleted nothing is said."""
    state = entry.stat(follow_symlinks=False)
    kind = stat.S_IFMT(state.st_mode)
    if kind != stat.S_IFCHR or state.st_rdev != _WHITEOUT:
        notes.skip(path, f"it is {_KINDS.get(kind, 'no file')}")


def _is_changed(parent: int, name: str, file: FoundFile, before: TreeEntry | None) -> bool:
    if before is None or (before.executable, before.size) != (file.executable, file.size):
        return True
    try:
        descriptor = open_file(name, parent)
    except OSError:
        return True  # `save` will see what it is
    digest = hashlib.sha256()
    try:
        for piece in sparse.pieces(descriptor):
            digest.update(piece)
            from_thread.check_cancelled()
    finally:
        os.close(descriptor)
    return digest.hexdigest() != before.sha256
