"""Files of an installation, written whole: a reader, or a crash, sees the old or the new."""

import os
from pathlib import Path


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
