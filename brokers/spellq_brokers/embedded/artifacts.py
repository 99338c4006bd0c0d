"""Artifacts on disk: each content once, in a read-only file named by its SHA-256."""

import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from anyio import CancelScope, from_thread, to_thread

from spellq import sparse
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
            return (await to_thread.run_sync(self._write_all, [data]))[0]

    async def put_all(self, contents: Sequence[bytes]) -> list[str]:
        def write_all() -> list[str]:
            self._check_room(sum(map(len, contents)))
            return self._write_all(contents)

        with _writing():
            return await to_thread.run_sync(write_all)

    async def adopt(
        self, files: Sequence[BinaryIO], *, copy: bool = False
    ) -> list[tuple[str, int]]:
        """Where it is this store's file system, a file itself becomes the stored one, unless it
        is an executable: a stored file's mode says nothing of its content.
        """
        with _writing():
            return await to_thread.run_sync(self._adopt, files, copy)

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

    async def local_paths(self, hashes: Sequence[str]) -> list[Path]:
        def look() -> list[Path]:
            paths = [self._path(sha256) for sha256 in hashes]
            for sha256, path in zip(hashes, paths, strict=True):
                _found(sha256, path.stat)
            return paths

        return await to_thread.run_sync(look)

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
                    await to_thread.run_sync(sparse.write, file.fileno(), piece)
                sparse.end(file.fileno())
            if digest.hexdigest() != sha256:
                raise ValueError(f"the content's SHA-256 is {digest.hexdigest()}, not {sha256}")
            await to_thread.run_sync(self._place, {sha256: temporary})
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

    def _write_all(self, contents: Sequence[bytes]) -> list[str]:
        with self._arrivals() as arrivals:
            return [self._write_whole(data, arrivals) for data in contents]

    def _write_whole(self, data: bytes, arrivals: "_Arrivals") -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._is_here(sha256, arrivals):
            temporary = arrivals.temporary()
            temporary.write_bytes(data)
            arrivals.whole[sha256] = temporary
        return sha256

    def _adopt(self, files: Sequence[BinaryIO], copy: bool) -> list[tuple[str, int]]:
        with self._arrivals() as arrivals:
            return [self._adopt_one(file, copy, arrivals) for file in files]

    def _adopt_one(self, file: BinaryIO, copy: bool, arrivals: "_Arrivals") -> tuple[str, int]:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("what is to be stored is no regular file")
        if copy or before.st_mode & 0o111:
            return self._copy(file, arrivals)
        sha256, size = _pass_on(file, None)
        if not self._is_here(sha256, arrivals) and not _link(file, before, sha256, arrivals):
            return self._copy(file, arrivals)
        return sha256, size

    def _copy(self, file: BinaryIO, arrivals: "_Arrivals") -> tuple[str, int]:
        """What is read is what is hashed and stored, whoever writes to the file meanwhile."""
        self._check_room(os.fstat(file.fileno()).st_blocks * 512)
        temporary = arrivals.temporary()
        with temporary.open("xb", buffering=0) as target:
            sha256, size = _pass_on(file, target.fileno())
        if not self._is_here(sha256, arrivals):
            arrivals.whole[sha256] = temporary
        return sha256, size

    def _is_here(self, sha256: str, arrivals: "_Arrivals") -> bool:
        return sha256 in arrivals.whole or self._path(sha256).exists()

    @contextmanager
    def _arrivals(self) -> Iterator["_Arrivals"]:
        arrivals = _Arrivals(self._temporary)
        try:
            yield arrivals
            self._place(arrivals.whole)
        finally:
            arrivals.remove_temporaries()

    def _place(self, whole: Mapping[str, Path]) -> None:
        """Sync whole contents and give them their names.

        In this order: what is changed, written out and linked before the first sync is on disk
        with it, so that the others find little to do. Many small files take a quarter of the time.
        """
        for temporary in whole.values():
            with _opened(temporary) as descriptor:
                os.fchmod(descriptor, 0o444)
                if len(whole) > 1:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for temporary in whole.values():
            with _opened(temporary) as descriptor:
                os.fsync(descriptor)
        for sha256, temporary in whole.items():
            _rename(temporary, self._path(sha256))


class _Arrivals:
    """Contents on their way in, under temporary names; `whole` are those that are complete."""

    def __init__(self, fresh_name: Callable[[], Path]) -> None:
        self.whole: dict[str, Path] = {}
        self._fresh_name = fresh_name
        self._temporaries: list[Path] = []

    def temporary(self) -> Path:
        """A name for one more."""
        self._temporaries.append(self._fresh_name())
        return self._temporaries[-1]

    def remove_temporaries(self) -> None:
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)


def _link(file: BinaryIO, before: os.stat_result, sha256: str, arrivals: _Arrivals) -> bool:
    """Make the open file itself the stored one; False where it has to be copied.

    It is linked by its descriptor, and taken only if ours is then its one other name.
    """
    if before.st_nlink != 1:
        return False
    temporary = arrivals.temporary()
    descriptor = file.fileno()
    try:
        # Only with a dir_fd, which an absolute path makes no use of, does Python call linkat.
        os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_BE_LINKED:
            raise
        return False
    now = os.fstat(descriptor)
    unchanged = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    if now.st_nlink != 2 or not unchanged:
        return False
    arrivals.whole[sha256] = temporary
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, exist_ok=True)
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
    """Hash and size of a file, which is written to `target`; can be cancelled."""
    digest = hashlib.sha256()
    size = 0
    for piece in sparse.pieces(file.fileno()):
        digest.update(piece)
        size += len(piece)
        if target is not None:
            sparse.write(target, piece)
        from_thread.check_cancelled()
    if target is not None:
        sparse.end(target)
    return digest.hexdigest(), size
