"""What a command writes to stdout and stderr, on its way into its file. Only the standard library.

Through a pipe: with the file itself as its stdout, a command that opens that anew, as
`echo oops > /dev/stderr` does, would cut short what it has said before. The slot helper holds the
pipe, which lives as long as the command does, whatever becomes of the agent.
"""

import array
import errno
import fcntl
import os
import select
import termios
import threading
from contextlib import suppress

from spellq_workers.mounts import CLONE_FS, unshare

_CAPACITY_BYTES = 1 << 18


class OutputPipe:
    """Carries bytes from `writer`, which commands get, into an open file, which it closes itself.

    What a full disk cannot take is lost, and holds nobody up; how much, the output says where it
    goes on.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._lost_bytes = 0
        self._carrier: threading.Thread | None = None
        try:
            self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(file)
            raise
        try:
            self._closing = os.eventfd(0)
        except OSError:
            self._close_descriptors()
            raise
        os.set_blocking(self._reader, False)
        with suppress(OSError):
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, _CAPACITY_BYTES)

    def start(self) -> None:
        """Carry, from now until `close`, in a thread of its own.

        Whoever has the writer can make each reader wait as long as they like, non-blocking or not:
        a splice from a socket on which nothing comes keeps the pipe locked. Once they are dead it
        is free.

        Raises:
            OSError: no thread can be started.
        """
        ready = threading.Event()
        carrier = threading.Thread(target=self._carry_on, args=(ready,), daemon=True)
        try:
            carrier.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        self._carrier = carrier
        ready.wait()

    def _carry_on(self, ready: threading.Event) -> None:
        try:
            unshare(CLONE_FS)  # who shares a root and a working directory may enter no other mounts
        finally:
            ready.set()
        poll = select.poll()
        for descriptor in (self._reader, self._closing):
            poll.register(descriptor, select.POLLIN)
        while self._closing not in dict(poll.poll()):
            self.carry()

    def carry(self) -> None:
        """Carry some of what is there."""
        with suppress(BlockingIOError):
            self._write(os.read(self._reader, _CAPACITY_BYTES))

    def close(self) -> None:
        """Carry all that is there: for when those who wrote it are dead."""
        if self._carrier is not None:
            os.eventfd_write(self._closing, 1)
            self._carrier.join()
        left = array.array("i", [0])
        fcntl.ioctl(self._reader, termios.FIONREAD, left)
        with suppress(BlockingIOError):  # another reader was faster
            while left[0] > 0:
                data = os.read(self._reader, left[0])
                self._write(data)
                left[0] -= len(data)
        if self._lost_bytes:
            self._write(b"")
        os.close(self._closing)
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for descriptor in (self._reader, self.writer, self._file):
            os.close(descriptor)

    def _write(self, data: bytes) -> None:
        try:
            if self._lost_bytes:
                notice = f"\nspellq: {self._lost_bytes} bytes of output are missing here\n"
                os.write(self._file, notice.encode())
                self._lost_bytes = 0
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            self._lost_bytes += len(data)
