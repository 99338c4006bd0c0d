"""Folders a run has left: no link is followed out of them, and none is too deep.

Whoever wrote in them may still do so. Everything goes by descriptors, one name at a time, so that
neither a link put in the place of a folder nor a path longer than the system's limit matters.
Only the standard library: the slot helper uses it too.
"""

import os
import stat
from itertools import count

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_folder(path: str, within: int | None = None) -> int:
    """A descriptor of a folder; with `within`, of one below that open folder, "" being itself.

    Raises:
        OSError: there is none; of a path `within`, some part is no folder but a link, say.
    """
    if within is None:
        return os.open(path, _FOLDER)
    folder = os.dup(within)
    for name in filter(None, path.split("/")):
        try:
            inner = os.open(name, _FOLDER, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def open_file(name: str, folder: int) -> int:
    """A descriptor of a regular file in an open folder, for reading; never waits for a FIFO.

    Raises:
        OSError: there is none, or something else.
    """
    file = os.open(name, _FILE, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{name!r} is no regular file")
    return file


def remove(path: str) -> None:
    """Remove a folder with everything in it; nothing happens where there is none.

    Raises:
        OSError: something cannot be removed, the first of it is named; the rest is gone.
    """
    try:
        folder = open_folder(path)
    except FileNotFoundError:
        return
    try:
        empty(folder)
    finally:
        os.close(folder)
    os.rmdir(path)


def empty(folder: int) -> None:
    """Remove everything in an open folder.

    Folders in its folders are moved up into it before their turn comes: so the way to each is one
    name long.

    Raises:
        OSError: as `remove` does.
    """
    unused = (f".{os.urandom(8).hex()}-{number}" for number in count())
    faults: list[OSError] = []
    pending = _remove_files(folder, faults)
    while pending:
        name = pending.pop()
        try:
            inner = os.open(name, _FOLDER, dir_fd=folder)
            try:
                for below, moved in zip(_remove_files(inner, faults), unused, strict=False):
                    os.rename(below, moved, src_dir_fd=inner, dst_dir_fd=folder)
                    pending.append(moved)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def _remove_files(folder: int, faults: list[OSError]) -> list[str]:
    """Remove all but the folders, whose names are returned."""
    folders = []
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.name)
            continue
        try:
            os.unlink(entry.name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(error)
    return folders
