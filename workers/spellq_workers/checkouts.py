"""Stored trees as folders of this machine, each made once and never changed."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread

from spellq import sparse
from spellq.ports import ArtifactStore, WorldError
from spellq.trees import Tree, TreeEntry, decode_tree

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_FICLONE: Final = 0x40049409
_MAX_LINKS: Final = 40


class Checkouts:
    """Materialises trees below `folder`. What it gives is whole, and stays as it is.

    Nothing is synced: what earlier boots of the machine left may be torn, and is removed.
    """

    def __init__(self, folder: Path, artifacts: ArtifactStore) -> None:
        self._folder = folder / _BOOT_ID.read_text().strip()
        self._is_tidy = False
        self._artifacts = artifacts
        self._building: dict[str, anyio.Event] = {}

    async def path(self, tree_id: str, subpath: str = "") -> Path:
        """The tree, or the folder or file at `subpath` in it, to be mounted read-only.

        Its files share their bytes with the store's where they can.

        Raises:
            WorldError: there is no such tree, or nothing at `subpath`; links in it are followed
                as far as they lead to places in the tree.
        """
        return await self._get(tree_id, subpath, writable=False)

    async def code(self, tree_id: str) -> Path:
        """The tree as the lower folder of an overlay.

        Its files have modes with which a command without capabilities may write to them.
        """
        return await self._get(tree_id, "", writable=True)

    async def _get(self, tree_id: str, subpath: str, *, writable: bool) -> Path:
        key = tree_id + (".code" if writable else "")
        if subpath:
            key += f".{hashlib.sha256(subpath.encode()).hexdigest()[:16]}"
        place = self._folder / key
        while not place.exists():
            if key in self._building:
                await self._building[key].wait()
                continue
            built = self._building[key] = anyio.Event()
            try:
                await self._build(place, tree_id, subpath, writable=writable)
            finally:
                del self._building[key]
                built.set()
        tree = place / "tree"
        return tree if tree.exists() else next((place / "file").iterdir())

    async def _build(self, place: Path, tree_id: str, subpath: str, *, writable: bool) -> None:
        if not self._is_tidy:
            self._is_tidy = True
            await to_thread.run_sync(_remove_others, self._folder)
        try:
            tree = decode_tree(await self._artifacts.get_bytes(tree_id))
            part, is_file = _part(tree, subpath)
            hashes = list({entry.sha256 for entry in part.entries if entry.sha256 is not None})
            paths = await self._artifacts.local_paths(hashes)
        except KeyError as error:
            raise WorldError(
                f"Stored content is missing: {error.args[0]}.", mount=not writable
            ) from error
        await to_thread.run_sync(
            _materialise,
            place,
            part.entries,
            dict(zip(hashes, paths, strict=True)),
            is_file,
            writable,
        )


def _remove_others(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def follow_links(links: Mapping[str, str], path: str) -> str | None:
    """Where `path` really is in a tree with these links; "" is the tree itself.

    Every part of the path may be a link. None: one leads out of the tree, or they go in circles.
    """
    done: list[str] = []
    todo = path.split("/")[::-1]
    followed = 0
    while todo:
        name = todo.pop()
        if name == "..":
            if not done:
                return None
            done.pop()
        elif name not in ("", "."):
            done.append(name)
            link = links.get("/".join(done))
            if link is not None:
                followed += 1
                if followed > _MAX_LINKS:
                    return None
                done.pop()
                todo += link.split("/")[::-1]
    return "/".join(done)


def _part(tree: Tree, subpath: str) -> tuple[Tree, bool]:
    """What is at `subpath`, links followed, and whether that is a single file."""
    links = {entry.path: entry.link for entry in tree.entries if entry.link is not None}
    path = follow_links(links, subpath)
    part = None if path is None else tree.subtree(path)
    if path is None or part is None:
        raise WorldError(f"There is no {subpath!r} in what is to be mounted.", mount=True)
    return part, bool(path) and tree.entry(path) is not None


def _materialise(
    place: Path,
    entries: Sequence[TreeEntry],
    contents: Mapping[str, Path],
    is_file: bool,
    writable: bool,
) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="new-") as temporary:
        whole = Path(temporary) / "whole"
        root = whole / ("file" if is_file else "tree")
        root.mkdir(parents=True)
        made = {str(root)}
        for entry in entries:
            target = f"{root}/{entry.path}"
            parent = os.path.dirname(target)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if entry.link is not None:
                os.symlink(entry.link, target)
            else:
                assert entry.sha256 is not None
                _place_file(contents[entry.sha256], target, entry.executable, writable)
        try:
            whole.rename(place)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


def _place_file(content: Path, target: str, executable: bool, writable: bool) -> None:
    if not executable and not writable:
        try:
            os.link(content, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                raise
        else:
            return
    _copy(content, target)
    mode = 0o755 if executable else 0o644
    os.chmod(target, mode if writable else mode & ~0o222)


def _copy(content: Path, target: str) -> None:
    with open(content, "rb") as source, open(target, "xb", buffering=0) as copy:
        try:
            fcntl.ioctl(copy, _FICLONE, source.fileno())
        except OSError:
            for piece in sparse.pieces(source.fileno()):
                sparse.write(copy.fileno(), piece)
            sparse.end(copy.fileno())
