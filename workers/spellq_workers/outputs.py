"""A run's outputs: which files below /spell are new or changed, and their way into the store."""

import hashlib
import os
import posixpath
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from anyio import from_thread, to_thread
from msgspec import Struct

from spellq.resources import RUN_DIRECTORY
from spellq.trees import Tree, TreeEntry, link_stays_inside, make_tree
from spellq_workers.checkouts import follow_links
from spellq_workers.copies import read_copied, state
from spellq_workers.folders import open_file, open_folder
from spellq_workers.runfolder import may_be_held

MAX_PATH_BYTES: Final = 3584
"""Of an output below /spell: with the folder it will once be mounted from, it stays below 4096."""

_SAID_AT_ONCE: Final = 256


class Keeper(Protocol):
    """Keeps contents, as an artifact store does."""

    async def adopt(self, file: BinaryIO, *, copy: bool = False) -> tuple[str, int]:
        """As `ArtifactStore.adopt`."""


class FoundFile(Struct, frozen=True):
    """A regular file to be saved, by its path below /spell."""

    path: str
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
    and no link, of deletions and of the run's own mount points nothing is an output. Can be
    cancelled.
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
    for file in found.files:
        try:
            content = _open(found.folder, file.path)
        except OSError as error:
            await say([f"Skipping '{_shown(file.path)}': {error.strerror or error}"])
            continue
        with content:
            sha256, size = await artifacts.adopt(content, copy=found.held)
        entries.append(
            TreeEntry(path=file.path, size=size, sha256=sha256, executable=file.executable)
        )
    return make_tree(entries)


def _open(folder: Path, path: str) -> BinaryIO:
    """Only ever a regular file below `folder`, whatever was put in its place since the scan."""
    root = open_folder(str(folder))
    try:
        parent = open_folder(posixpath.dirname(path), root)
        try:
            return os.fdopen(open_file(posixpath.basename(path), parent), "rb", buffering=0)
        finally:
            os.close(parent)
    finally:
        os.close(root)


def _scan(folder: Path, snapshot: Tree | None, mount_targets: Sequence[str]) -> Scan:
    before = {entry.path: entry for entry in snapshot.entries} if snapshot else {}
    copied = read_copied(str(folder.parent))
    files: list[FoundFile] = []
    links: list[TreeEntry] = []
    notes: list[str] = []
    for parent, entry, path in _walk(folder, _mount_points(before, mount_targets), notes):
        if not _is_text(path):
            notes.append(f"Skipping '{_shown(path)}': its name is not UTF-8")
        elif entry.is_symlink():
            target = os.readlink(entry.name, dir_fd=parent)
            _look_at_link(target, path, before.get(path), links, notes)
        elif entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            executable = bool(status.st_mode & 0o100)
            if path in copied and state(status) == copied[path]:
                continue
            if _is_changed(parent, entry.name, executable, before.get(path)):
                files.append(FoundFile(path, executable))
    files.sort(key=lambda file: file.path)
    links.sort(key=lambda link: link.path)
    return Scan(
        tuple(files), tuple(links), tuple(sorted(notes)), folder, may_be_held(str(folder.parent))
    )


def _walk(
    folder: Path, mount_points: set[str], notes: list[str]
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
                        notes.append(f"Skipping '{_shown(path)}': its path is too long")
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(path + "/")
                    else:
                        yield parent, entry, path
            finally:
                os.close(parent)
    finally:
        os.close(root)


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
    """The path as a log line may hold it: one line, and nothing a terminal obeys."""
    text = os.fsencode(f"{RUN_DIRECTORY}/{path}").decode(errors="backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _look_at_link(
    target: str, path: str, before: TreeEntry | None, links: list[TreeEntry], notes: list[str]
) -> None:
    if target == RUN_DIRECTORY or _is_inside(target):
        inside = posixpath.join("/", posixpath.dirname(path))
        target = posixpath.relpath(target[len(RUN_DIRECTORY) :] or "/", inside)
    if not _is_text(target) or not link_stays_inside(path, target):
        notes.append(f"Skipping '{_shown(path)}': the link leads out of {RUN_DIRECTORY}")
    elif before is None or before.link != target:
        links.append(TreeEntry(path=path, link=target))


def _is_changed(parent: int, name: str, executable: bool, before: TreeEntry | None) -> bool:
    if before is None or before.executable != executable:
        return True
    try:
        descriptor = open_file(name, parent)
    except OSError:
        return True  # `save` will see what it is
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size != before.size:
            return True
        return hashlib.file_digest(file, "sha256").hexdigest() != before.sha256
