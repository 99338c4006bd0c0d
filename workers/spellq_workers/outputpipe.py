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
        try:
            self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(file)
            raise
        os.set_blocking(self.reader, False)
        with suppress(OSError):
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, _CAPACITY_BYTES)

    def carry(self) -> None:
        """Carry some of what is there."""
        with suppress(BlockingIOError):
            self._write(os.read(self.reader, _CAPACITY_BYTES))

    def close(self) -> None:
        """Carry all that is there: for when those who wrote it are dead."""
        left = array.array("i", [0])
        fcntl.ioctl(self.reader, termios.FIONREAD, left)
        with suppress(BlockingIOError):  # another reader was faster
            while left[0] > 0:
                data = os.read(self.reader, left[0])
                self._write(data)
                left[0] -= len(data)
        if self._lost_bytes:
            self._write(b"")
        for descriptor in (self.reader, self.writer, self._file):
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


class Carrier:
    """A thread that carries the output of one command at a time.

    Not the helper's own: whoever has the writer can make each reader wait as long as they like,
    non-blocking or not. A splice from a socket on which nothing comes keeps the pipe locked, until
    they are dead.

    To be made before the first run's world is: a thread stays in the mount namespace it began in.
    """

    def __init__(self) -> None:
        """
        Raises:
            OSError: no thread can be started.
        """
        self._pipe: OutputPipe | None = None
        self._wake = os.eventfd(0)
        self._heard = threading.Event()
        thread = threading.Thread(target=self._serve, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            os.close(self._wake)
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        self._heard.wait()

    def begin(self, pipe: OutputPipe) -> None:
        """Carry that pipe's output from now on."""
        self._pipe = pipe
        os.eventfd_write(self._wake, 1)

    def end(self) -> None:
        """Let go of the pipe; nobody else touches it when this returns."""
        self._pipe = None
        self._heard.clear()
        os.eventfd_write(self._wake, 1)
        self._heard.wait()

    def _serve(self) -> None:
        unshare(CLONE_FS)  # who shares a root and a working directory may enter no other mounts
        self._heard.set()
        while True:
            pipe = self._pipe
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if pipe is not None:
                poll.register(pipe.reader, select.POLLIN)
            self._carry_until_woken(poll, pipe)
            if self._pipe is None:
                self._heard.set()

    def _carry_until_woken(self, poll: select.poll, pipe: OutputPipe | None) -> None:
        while self._wake not in dict(poll.poll()):
            if pipe is not None:
                pipe.carry()
        os.eventfd_read(self._wake)
