"""A command's raw output, a file that grows, as the pieces that become log entries."""

import asyncio
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

    A context manager, to be left in the loop it was used in.
    """

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._wakers: dict[int, Callable[[], None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def watch(self, path: Path, wake: Callable[[], None]) -> Watch:
        """Call `wake` after every change of the file from now on. One watch a file."""
        if self._inotify is None:
            self._inotify = Inotify(sync_timeout=0)
            asyncio.get_running_loop().add_reader(self._inotify.fd, self._read)
        watch = self._inotify.add_watch(path, Mask.MODIFY)
        self._wakers[watch.wd] = wake
        return watch

    def unwatch(self, watch: Watch) -> None:
        if self._wakers.pop(watch.wd, None) is not None and self._inotify is not None:
            self._inotify.rm_watch(watch)

    def close(self) -> None:
        """Let go of everything."""
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        self._wakers.clear()

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
        try:
            while True:
                finished = self._finished
                self._grown.clear()
                while data := os.read(file, _READ_BYTES):
                    for batch in self._split(data):
                        yield batch
                if finished:
                    break
                if watch is None and (watch := self._watch()) is not None:
                    continue
                if not self._finished:
                    await self._grown.wait()
            if self._pending:
                end = self._delivered + len(self._pending)
                yield [Piece(_text(self._pending.removesuffix(b"\r")), end)]
        finally:
            if watch is not None:
                self._watcher.unwatch(watch)
            os.close(file)

    def _watch(self) -> Watch | None:
        """Without a watch (the machine's limit is reached) the rest is read at the end."""
        try:
            return self._watcher.watch(self._path, self._grown.set)
        except OSError as error:
            _log.warning("%s is not followed: %s", self._path, error)
            return None

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
            os.lseek(file, self._delivered, os.SEEK_SET)
            return file

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
