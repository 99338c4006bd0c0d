"""Files with holes: read without reading the holes, written so that zeros take no room."""

import errno
import os
from collections.abc import Iterator
from typing import Final

PIECE_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(PIECE_BYTES)


def pieces(descriptor: int) -> Iterator[bytes]:
    """A file's content from its beginning to where it ends now, in pieces of up to 1 MiB.

    Ends early where the file is cut short meanwhile.
    """
    end = os.fstat(descriptor).st_size
    at = 0
    while at < end:
        data = _next_data(descriptor, at, end)
        while at < data:
            zeros = _ZEROS[: data - at]
            at += len(zeros)
            yield zeros
        if at < end:
            piece = os.pread(descriptor, min(PIECE_BYTES, end - at), at)
            if not piece:
                return
            at += len(piece)
            yield piece


def write(descriptor: int, piece: bytes) -> None:
    """Write a piece where the file's position is; one of zeros leaves a hole. See `end`."""
    if piece == bytes(len(piece)):
        os.lseek(descriptor, len(piece), os.SEEK_CUR)
        return
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def end(descriptor: int) -> None:
    """The file ends where its position is: a hole at its end becomes part of it."""
    os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR))


def _next_data(descriptor: int, at: int, end: int) -> int:
    """Where the next byte is that is in no hole; where the file ends by now if there is none."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return min(end, max(at, os.fstat(descriptor).st_size))
        if error.errno == errno.EINVAL:
            return at  # a file system that knows of no holes
        raise
