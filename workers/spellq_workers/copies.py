"""A run's own copy of its code, where overlays are refused. Only the standard library.

What was copied is noted beside it, so that the files nobody touched need not be read again.
"""

import errno
import fcntl
import json
import os

COPIED = "copied.json"
"""In a run's folder: the `state` of every file copied, by its path below /spell."""

_FICLONE = 0x40049409
_PIECE_BYTES = 1 << 30

State = list[int]


def copy_code(code: str, folder: str) -> None:
    """Copy a checkout into `files` of a run's folder: no byte of it can be changed from there.

    Modes and times of its files go with it.
    """
    copied: dict[str, State] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(f"{code}/{prefix}") as entries:
            for entry in entries:
                path = prefix + entry.name
                target = f"{folder}/files/{path}"
                if entry.is_symlink():
                    os.symlink(os.readlink(entry.path), target)
                elif entry.is_dir():
                    os.mkdir(target)
                    pending.append(path + "/")
                else:
                    copied[path] = _copy_file(entry.path, target)
    with open(f"{folder}/{COPIED}", "w") as file:
        json.dump(copied, file)


def read_copied(folder: str) -> dict[str, State]:
    """What was copied into a run's folder, in the state it had then; empty under an overlay."""
    try:
        with open(f"{folder}/{COPIED}", "rb") as file:
            copied: dict[str, State] = json.load(file)
            return copied
    except FileNotFoundError:
        return {}


def state(status: os.stat_result) -> State:
    """What changes whenever a file is written to or replaced."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _copy_file(source: str, target: str) -> State:
    """Shares the bytes where the file system can do so until one of the two is written to."""
    with open(source, "rb") as original, open(target, "xb") as copy:
        status = os.fstat(original.fileno())
        try:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            while os.sendfile(copy.fileno(), original.fileno(), None, _PIECE_BYTES):
                pass
        os.fchmod(copy.fileno(), status.st_mode & 0o777)
        os.utime(copy.fileno(), ns=(status.st_mtime_ns, status.st_mtime_ns))
        return state(os.fstat(copy.fileno()))
