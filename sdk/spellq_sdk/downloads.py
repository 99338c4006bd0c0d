"""Saved files brought to this machine: never outside the destination, never half, never wrong."""

import asyncio
import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from spellq import sparse
from spellq.trees import Tree, TreeEntry
from spellq_sdk.backoff import backoff
from spellq_sdk.exceptions import ClientException
from spellq_sdk.gateway import Gateway
from spellq_sdk.transport import ConnectionLost

FILES_AT_ONCE: Final = 8
TRIES: Final = 8


async def download(gateway: Gateway, tree: Tree, destination: Path) -> None:
    """Copy the files of a tree (see `Gateway.tree`) into the folder `destination`.

    A file appears under its name when it is whole and its hash is right; one that is there already
    is replaced. Links are made last, and only those that stay inside.

    Raises:
        ClientException: a hash that does not match, a destination that is no folder, or a place
            in it that leads out of it or is taken.
    """
    root = await asyncio.to_thread(_prepare, destination)
    limit = asyncio.Semaphore(FILES_AT_ONCE)
    try:
        async with asyncio.TaskGroup() as group:
            for entry in tree.entries:
                if entry.sha256 is not None:
                    await limit.acquire()
                    group.create_task(_fetch(gateway, root, entry, limit))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    await asyncio.to_thread(_link, root, tree)


async def _fetch(gateway: Gateway, root: Path, entry: TreeEntry, limit: asyncio.Semaphore) -> None:
    try:
        for tried, delay in enumerate(backoff(), 1):
            try:
                await _fetch_once(gateway, root, entry)
            except ConnectionLost:
                if tried == TRIES:
                    raise
                await asyncio.sleep(delay)
            else:
                return
    finally:
        limit.release()


async def _fetch_once(gateway: Gateway, root: Path, entry: TreeEntry) -> None:
    file = _Incoming(root, entry)
    try:
        await asyncio.to_thread(file.open)
        pieces = gateway.transport.stream(f"/api/artifacts/{entry.sha256}")
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await asyncio.to_thread(file.write, piece)
        await asyncio.to_thread(file.finish)
    finally:
        await asyncio.to_thread(file.discard)


class _Incoming:
    """A file on its way, under a temporary name beside its place.

    Whoever is cancelled discards it while a thread may still be opening or writing it: one at a
    time, and what is discarded is not opened.
    """

    def __init__(self, root: Path, entry: TreeEntry) -> None:
        self._root = root
        self._entry = entry
        self._place = root / entry.path
        self._temporary = self._place.with_name(f".{uuid.uuid4().hex}.spellq")
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None
        self._discarded = False
        self._lock = threading.Lock()

    def open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = 0o777 if self._entry.executable else 0o666
        with self._lock, _named(self._place):
            if not self._discarded:
                _place(self._root, self._entry)
                self._file = os.fdopen(os.open(self._temporary, flags, mode), "wb", buffering=0)

    def write(self, piece: bytes) -> None:
        with self._lock, _named(self._place):
            if self._file is not None:
                self._digest.update(piece)
                sparse.write(self._file.fileno(), piece)

    def finish(self) -> None:
        with self._lock, _named(self._place):
            if self._file is None:
                return
            sparse.end(self._file.fileno())
            self._file.close()
            if self._digest.hexdigest() != self._entry.sha256:
                raise ClientException(f"{self._entry.path} arrived damaged: its hash is another.")
            os.replace(self._temporary, self._place)
            self._file = None

    def discard(self) -> None:
        """Leave nothing temporary behind."""
        with self._lock:
            self._discarded = True
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                with contextlib.suppress(OSError):
                    self._temporary.unlink()
                self._file = None


def _prepare(destination: Path) -> Path:
    if destination.exists() and not destination.is_dir():
        raise ClientException(f"{destination} is not a folder.")
    with _named(destination):
        destination.mkdir(parents=True, exist_ok=True)
        return destination.resolve(strict=True)


def _place(root: Path, entry: TreeEntry) -> Path:
    """Where the entry goes; its folder is made, and lies below `root` whatever links are there."""
    place = root / entry.path
    folder = root
    with _named(place):
        for name in Path(entry.path).parts[:-1]:
            folder = folder / name
            folder.mkdir(exist_ok=True)
            if not folder.resolve(strict=True).is_relative_to(root):
                raise ClientException(f"{folder} leads out of {root}; nothing is written there.")
    return place


def _link(root: Path, tree: Tree) -> None:
    made = []
    for entry in tree.entries:
        if entry.link is not None:
            place = _place(root, entry)
            temporary = place.with_name(f".{uuid.uuid4().hex}.spellq")
            with _named(place):
                os.symlink(entry.link, temporary)
                os.replace(temporary, place)
            made.append(place)
    for place in made:
        # One link alone stays inside by its text; several in a row may not.
        if not Path(os.path.realpath(place)).is_relative_to(root):
            place.unlink()
            raise ClientException(f"The link {place} leads out of {root}; it was removed.")


@contextlib.contextmanager
def _named(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClientException(
            f"Cannot write {place}: {error.strerror or error}.", None, error
        ) from error
