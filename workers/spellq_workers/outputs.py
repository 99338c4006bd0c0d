"""A run's outputs: which files below /spell are new or changed, and their way into the store."""

import hashlib
import os
import posixpath
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from anyio import to_thread
from msgspec import Struct

from spellq.ports import ArtifactStore
from spellq.resources import RUN_DIRECTORY
from spellq.trees import Tree, TreeEntry, link_stays_inside, make_tree

_SAID_AT_ONCE: Final = 256


class FoundFile(Struct, frozen=True):
    """A regular file to be saved: where it lies, and its path below /spell."""

    place: Path
    path: str
    executable: bool


class Scan(Struct, frozen=True):
    """What a run made. `notes` are log lines about what cannot be saved."""

    files: tuple[FoundFile, ...] = ()
    links: tuple[TreeEntry, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.links)


def is_untouched(files: Path) -> bool:
    """Whether the run's folder holds nothing at all: one system call, no thread."""
    with os.scandir(files) as entries:
        return next(entries, None) is None


async def scan(files: Path, snapshot: Tree | None, mount_targets: Sequence[str]) -> Scan:
    """Look through the folder an execution's `files` names, after its last process is dead.

    New or changed against the snapshot by content or by the executable bit; of what is no file
    and no link, of deletions and of the run's own mount points nothing is an output.
    """
    return await to_thread.run_sync(_scan, files, snapshot, frozenset(mount_targets))


async def save(
    found: Scan, artifacts: ArtifactStore, say: Callable[[Sequence[str]], Awaitable[None]]
) -> Tree:
    """Move what was found into the store; `say` gets the log lines, before their files move."""
    entries = list(found.links)
    names = [file.path for file in found.files] + [link.path for link in found.links]
    lines = [f"Saving '{RUN_DIRECTORY}/{name}'" for name in sorted(names)]
    for at in range(0, len(lines), _SAID_AT_ONCE):
        await say(lines[at : at + _SAID_AT_ONCE])
    for file in found.files:
        sha256, size = await artifacts.adopt(file.place)
        entries.append(
            TreeEntry(path=file.path, size=size, sha256=sha256, executable=file.executable)
        )
    return make_tree(entries)


def _scan(root: Path, snapshot: Tree | None, mount_targets: frozenset[str]) -> Scan:
    before = {entry.path: entry for entry in snapshot.entries} if snapshot else {}
    files: list[FoundFile] = []
    links: list[TreeEntry] = []
    notes: list[str] = []
    for entry, path in _walk(root, "", mount_targets):
        if not _is_text(path):
            shown = os.fsencode(path).decode(errors="backslashreplace")
            notes.append(f"Skipping '{RUN_DIRECTORY}/{shown}': its name is not UTF-8")
        elif entry.is_symlink():
            _look_at_link(entry.path, path, before.get(path), links, notes)
        else:
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(state.st_mode) and _is_changed(entry.path, state, before.get(path)):
                executable = bool(state.st_mode & stat.S_IXUSR)
                files.append(FoundFile(Path(entry.path), path, executable))
    return Scan(tuple(files), tuple(links), tuple(notes))


def _walk(
    folder: Path | str, prefix: str, mount_targets: frozenset[str]
) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = prefix + entry.name
        if f"{RUN_DIRECTORY}/{path}" in mount_targets:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, path + "/", mount_targets)
        else:
            yield entry, path


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _look_at_link(
    place: str, path: str, before: TreeEntry | None, links: list[TreeEntry], notes: list[str]
) -> None:
    target = os.readlink(place)
    if target == RUN_DIRECTORY or target.startswith(RUN_DIRECTORY + "/"):
        inside = posixpath.join("/", posixpath.dirname(path))
        target = posixpath.relpath(target[len(RUN_DIRECTORY) :] or "/", inside)
    if not _is_text(target) or not link_stays_inside(path, target):
        notes.append(f"Skipping '{RUN_DIRECTORY}/{path}': the link leads out of {RUN_DIRECTORY}")
    elif before is None or before.link != target:
        links.append(TreeEntry(path=path, link=target))


def _is_changed(place: str, state: os.stat_result, before: TreeEntry | None) -> bool:
    if before is None or before.size != state.st_size:
        return True
    if before.executable != bool(state.st_mode & stat.S_IXUSR):
        return True
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != before.sha256
