"""A command's raw output, a file that grows, as the pieces that become log entries."""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, Self

from asyncinotify import Inotify, Mask, Watch
from msgspec import Struct

MAX_ENTRY_BYTES: Final = 1 << 20
BATCH_LINES: Final = 4096
_READ_BYTES: Final = 1 << 16

_log = logging.getLogger(__name__)


class Piece(Struct, frozen=True, gc=False):
    """One line, without its end, or (`continued`) a part of one that is too long for an entry.

    `raw_end` is the place in the file after it, in bytes.
    """

    text: str
    raw_end: int
    continued: bool = False


class OutputWatcher:
    """Tells when files grow: one inotify instance, shared by everyone who follows a file.

    Files that it cannot watch, as the machine's limit is reached, may have grown at every `look`.
    A context manager, to be left in the loop it was used in.
    """

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._wakers: dict[int, Callable[[], None]] = {}
        self._unwatched: set[Callable[[], None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def watch(self, path: Path, wake: Callable[[], None]) -> Watch | None:
        """Call `wake` after every change of the file from now on. One watch a file.

        None: it cannot be watched, and `wake` is called with every `look`.
        """
        try:
            if self._inotify is None:
                self._inotify = Inotify(sync_timeout=0)
                asyncio.get_running_loop().add_reader(self._inotify.fd, self._read)
            watch = self._inotify.add_watch(path, Mask.MODIFY)
        except OSError as error:
            if wake not in self._unwatched:
                _log.warning("%s is looked at with every heartbeat only: %s", path, error)
            self._unwatched.add(wake)
            return None
        self._unwatched.discard(wake)
        self._wakers[watch.wd] = wake
        return watch

    def wake_at_look(self, wake: Callable[[], None]) -> None:
        """Call `wake` with every `look`, until `unwatch`."""
        self._unwatched.add(wake)

    def unwatch(self, watch: Watch | None, wake: Callable[[], None]) -> None:
        self._unwatched.discard(wake)
        if watch is None or self._inotify is None:
            return
        if self._wakers.pop(watch.wd, None) is not None:
            self._inotify.rm_watch(watch)

    def look(self) -> None:
        """Wake whoever follows a file that is not watched; the agent's heartbeat does this."""
        for wake in tuple(self._unwatched):
            wake()

    def close(self) -> None:
        """Let go of everything."""
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        self._wakers.clear()
        self._unwatched.clear()

    def _read(self) -> None:
        assert self._inotify is not None
        while (event := self._inotify.sync_get()) is not None:
            if event.mask & Mask.Q_OVERFLOW:
                for wake in self._wakers.values():
                    wake()
            elif event.watch is not None and (waker := self._wakers.get(event.watch.wd)):
                waker()


class RawLog:
    """Follows the file at `path` from byte `start` on.

    Every byte is delivered exactly once, in order; a last line without an end after `finish`.
    """

    def __init__(self, path: Path, start: int, watcher: OutputWatcher) -> None:
        self._path = path
        self._watcher = watcher
        self._grown = asyncio.Event()
        self._finished = False
        self._delivered = start
        self._pending = b""

    def finish(self) -> None:
        """The file does not grow any more."""
        self._finished = True
        self._grown.set()

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, never an empty batch; ends after `finish`, at the file's end."""
        file = await self._open()
        if file is None:
            return
        watch = None
        wake = self._grown.set
        try:
            while True:
                finished = self._finished
                self._grown.clear()
                while data := os.read(file, _READ_BYTES):
                    for batch in self._split(data):
                        yield batch
                if finished:
                    break
                if watch is None and (watch := self._watcher.watch(self._path, wake)) is not None:
                    continue
                if not self._finished:
                    await self._grown.wait()
            if self._pending:
                end = self._delivered + len(self._pending)
                yield [Piece(_text(self._pending.removesuffix(b"\r")), end)]
        finally:
            self._watcher.unwatch(watch, wake)
            os.close(file)

    async def _open(self) -> int | None:
        """A command that was never executed has no output; that is known when it has ended."""
        while True:
            finished = self._finished
            try:
                file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if finished:
                    return None
                await self._grown.wait()
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                await self._next_look()
                continue
            os.lseek(file, self._delivered, os.SEEK_SET)
            return file

    async def _next_look(self) -> None:
        """Return with the watcher's next look, or once the file does not grow any more."""
        self._grown.clear()
        self._watcher.wake_at_look(self._grown.set)
        try:
            await self._grown.wait()
        finally:
            self._watcher.unwatch(None, self._grown.set)

    def _split(self, data: bytes) -> list[list[Piece]]:
        *lines, rest = (self._pending + data).split(b"\n")
        pieces: list[Piece] = []
        for line in lines:
            if len(line) > MAX_ENTRY_BYTES:
                line = self._cut(line, pieces)
            self._delivered += len(line) + 1
            pieces.append(Piece(_text(line.removesuffix(b"\r")), self._delivered))
        self._pending = self._cut(rest, pieces)
        return [pieces[at : at + BATCH_LINES] for at in range(0, len(pieces), BATCH_LINES)]

    def _cut(self, line: bytes, pieces: list[Piece]) -> bytes:
        """What of a line goes beyond one entry becomes pieces, in whole characters."""
        while len(line) > MAX_ENTRY_BYTES:
            end = MAX_ENTRY_BYTES
            while end > MAX_ENTRY_BYTES - 3 and line[end] & 0xC0 == 0x80:
                end -= 1
            self._delivered += end
            pieces.append(Piece(_text(line[:end]), self._delivered, continued=True))
            line = line[end:]
        return line


def _text(line: bytes) -> str:
    return line.decode(errors="replace").replace("\0", "\ufffd")
