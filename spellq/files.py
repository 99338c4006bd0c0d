"""Files of an installation, written whole: a reader, or a crash, sees the old or the new."""

import errno
import os
from pathlib import Path


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write to the disk of `folder`. Raises OSError."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def is_full(error: OSError) -> bool:
    """Whether it says that the disk, or what this user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(folder: Path) -> str:
    """What is said to whoever tried to use a full disk."""
    return f"No space is left where {folder} lies. Free some, then try again."


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads (0600); durable when this returns.

    One process at a time may write it.
    """
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # a crash's, with whatever mode it has
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
