"""What a command writes to stdout and stderr, on its way into its file. Only the standard library.

Through a pipe: with the file itself as its stdout, a command that opens that anew, as
`echo oops > /dev/stderr` does, would cut short what it has said before. The slot helper holds the
pipe, which lives as long as the command does, whatever becomes of the agent.
"""

import array
import fcntl
import os
import termios
from contextlib import suppress

_CAPACITY_BYTES = 1 << 18


class OutputPipe:
    """Carries bytes from `writer`, which commands get, into an open file, which it closes itself.

    `reader` is readable when there is something to carry. What a full disk cannot take is lost,
    and holds nobody up; how much, the output says where it goes on.
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
