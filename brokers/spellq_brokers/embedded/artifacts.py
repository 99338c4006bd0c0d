"""Artifacts on disk: each content once, in a read-only file named by its SHA-256."""

import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from anyio import CancelScope, from_thread, to_thread

from spellq.files import free_bytes, is_full
from spellq.ports import StoreFull, StoreUnavailable
from spellq.sizes import human_size

T = TypeVar("T")

_PIECE: Final = 1024 * 1024
_CANNOT_BE_LINKED: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT)
"""Another file system, one without links, too many of them; a file without a name."""


class DiskArtifacts:
    """Implements `spellq.ports.ArtifactStore` in `folder`.

    A content is written to a temporary name, synced, and renamed: what is there under its name is
    whole and was verified. `reserve_bytes` of the disk are not used for contents of any size.
    """

    def __init__(self, folder: Path, reserve_bytes: int = 0) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._incoming = folder / "incoming"
        self._names = count()

    @classmethod
    async def make(cls, folder: Path, reserve_bytes: int = 0) -> "DiskArtifacts":
        """The store in `folder`, made if there is none; what a crash left half-written is gone."""
        artifacts = cls(folder, reserve_bytes)
        await to_thread.run_sync(artifacts._prepare)
        return artifacts

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        return await to_thread.run_sync(
            lambda: [sha256 for sha256 in hashes if not self._path(sha256).exists()]
        )

    async def put(self, sha256: str, content: AsyncIterator[bytes]) -> int:
        with _writing():
            return await self._put(sha256, content)

    async def put_bytes(self, data: bytes) -> str:
        with _writing():
            return await to_thread.run_sync(self._write_whole, data)

    async def put_all(self, contents: Sequence[bytes]) -> list[str]:
        def write_all() -> list[str]:
            self._check_room(sum(map(len, contents)))
            return [self._write_whole(data) for data in contents]

        with _writing():
            return await to_thread.run_sync(write_all)

    async def adopt(self, file: BinaryIO, *, copy: bool = False) -> tuple[str, int]:
        """Where it is this store's file system, the file itself becomes the stored one, unless it
        is an executable: a stored file's mode says nothing of its content.
        """
        with _writing():
            return await to_thread.run_sync(self._adopt, file, copy)

    async def get_bytes(self, sha256: str) -> bytes:
        return await to_thread.run_sync(_found, sha256, self._path(sha256).read_bytes)

    async def open(self, sha256: str) -> AsyncIterator[bytes]:
        path = self._path(sha256)
        file = await to_thread.run_sync(_found, sha256, lambda: path.open("rb", buffering=0))

        async def pieces() -> AsyncIterator[bytes]:
            with file:
                while piece := await to_thread.run_sync(file.read, _PIECE):
                    yield piece

        return pieces()

    async def local_path(self, sha256: str) -> Path:
        path = self._path(sha256)
        await to_thread.run_sync(_found, sha256, path.stat)
        return path

    def _prepare(self) -> None:
        self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self._incoming.iterdir():
            left_over.unlink()

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    async def _put(self, sha256: str, content: AsyncIterator[bytes]) -> int:
        temporary = self._temporary()
        digest = hashlib.sha256()
        size = 0
        try:
            with await to_thread.run_sync(lambda: temporary.open("xb", buffering=0)) as file:
                async for piece in content:
                    self._check_room(len(piece))
                    digest.update(piece)
                    size += len(piece)
                    await to_thread.run_sync(_write, file.fileno(), piece)
            if digest.hexdigest() != sha256:
                raise ValueError(f"the content's SHA-256 is {digest.hexdigest()}, not {sha256}")
            await to_thread.run_sync(self._place, temporary, sha256)
        finally:
            await _shielded(lambda: temporary.unlink(missing_ok=True))
        return size

    def _check_room(self, size: int) -> None:
        """Raises StoreFull where `size` more bytes would use up what is kept for the store."""
        if not self._reserve_bytes:
            return
        free = free_bytes(self._folder)
        if free < self._reserve_bytes + size:
            raise StoreFull(
                f"The disk is full: {human_size(free)} free where {self._folder} lies, of which "
                f"{human_size(self._reserve_bytes)} (SPELLQ_MIN_FREE_BYTES) are kept for what "
                "spellq notes about runs. Free some space, then try again.",
                size,
            )

    def _temporary(self) -> Path:
        """A name nobody else has: asked for in many threads at once."""
        return self._incoming / f"{os.getpid()}-{next(self._names)}"

    def _write_whole(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if self._path(sha256).exists():
            return sha256
        temporary = self._temporary()
        try:
            with temporary.open("xb", buffering=0) as file:
                _write(file.fileno(), data)
            self._place(temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256

    def _adopt(self, file: BinaryIO, copy: bool) -> tuple[str, int]:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("what is to be stored is no regular file")
        if copy or before.st_mode & 0o111:
            return self._copy(file)
        file.seek(0)
        sha256, size = _pass_on(file, None)
        if not self._path(sha256).exists() and not self._link(file, before, sha256):
            return self._copy(file)
        return sha256, size

    def _copy(self, file: BinaryIO) -> tuple[str, int]:
        """What is read is what is hashed and stored, whoever writes to the file meanwhile."""
        self._check_room(os.fstat(file.fileno()).st_size)
        temporary = self._temporary()
        try:
            with temporary.open("xb", buffering=0) as target:
                file.seek(0)
                sha256, size = _pass_on(file, target.fileno())
            if not self._path(sha256).exists():
                self._place(temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256, size

    def _link(self, file: BinaryIO, before: os.stat_result, sha256: str) -> bool:
        """Make the open file itself the stored one; False where it has to be copied.

        It is linked by its descriptor, and changed only if ours is then its one other name.
        """
        if before.st_nlink != 1:
            return False
        temporary = self._temporary()
        descriptor = file.fileno()
        try:
            # Only with a dir_fd, which an absolute path makes no use of, does Python call linkat.
            os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_BE_LINKED:
                raise
            return False
        try:
            now = os.fstat(descriptor)
            unchanged = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            if now.st_nlink != 2 or not unchanged:
                return False
            self._place(temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _place(self, temporary: Path, sha256: str) -> None:
        path = self._path(sha256)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)


def _found(sha256: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError as error:
        raise KeyError(sha256) from error


@contextmanager
def _writing() -> Iterator[None]:
    """What the disk refuses comes through the port as its own error."""
    try:
        yield
    except ConnectionError:
        raise  # who sends the content went away
    except OSError as error:
        message = f"The artifact store cannot be written: {error}"
        if is_full(error):
            raise StoreFull(f"{message}. Free some space, then try again.") from error
        raise StoreUnavailable(message) from error


async def _shielded(action: Callable[[], None]) -> None:
    """Do it in a thread even when the task is being cancelled."""
    with CancelScope(shield=True):
        await to_thread.run_sync(action)


def _pass_on(file: BinaryIO, target: int | None) -> tuple[str, int]:
    """Hash and size of the rest of a file, which is written to `target`; can be cancelled."""
    digest = hashlib.sha256()
    size = 0
    while piece := file.read(_PIECE):
        digest.update(piece)
        size += len(piece)
        if target is not None:
            _write(target, piece)
        from_thread.check_cancelled()
    return digest.hexdigest(), size


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
