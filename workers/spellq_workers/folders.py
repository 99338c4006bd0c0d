"""Folders a run has left: no link is followed out of them, and none is too deep.

Whoever wrote in them may still do so. Everything goes by descriptors, one name at a time, so that
neither a link put in the place of a folder nor a path longer than the system's limit matters.
What a command closed to its own user is opened up again, so that it makes no difference whose
user that is: root passes every mode. Only the standard library: the slot helper uses it too.
"""

import os
import stat
from contextlib import suppress
from itertools import count

_PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_folder(path: str, within: int | None = None) -> int:
    """A descriptor of a folder; with `within`, of one below that open folder, "" being itself.

    Raises:
        OSError: there is none; of a path `within`, some part is no folder but a link, say.
    """
    if within is None:
        folder = _open(path, _FOLDER, None)
    else:
        folder = os.dup(within)
        for name in filter(None, path.split("/")):
            try:
                inner = _open(name, _FOLDER, folder)
            finally:
                os.close(folder)
            folder = inner
    mode = stat.S_IMODE(os.fstat(folder).st_mode)
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        with suppress(PermissionError):
            os.fchmod(folder, mode | stat.S_IRWXU)
    return folder


def open_file(name: str, folder: int) -> int:
    """A descriptor of a regular file in an open folder, for reading; never waits for a FIFO.

    Raises:
        OSError: there is none, or something else.
    """
    file = _open(name, _FILE, folder)
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
    with suppress(FileNotFoundError):  # two may remove it at once
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
            inner = _open(name, _FOLDER, folder)
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
        try:
            if entry.is_dir(follow_symlinks=False):
                _open_up(entry.name, folder)
                folders.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(error)
    return folders


def _open(name: str, flags: int, folder: int | None) -> int:
    try:
        return os.open(name, flags, dir_fd=folder)
    except PermissionError:
        _open_up(name, folder)
        return os.open(name, flags, dir_fd=folder)


def _open_up(name: str, folder: int | None) -> None:
    """Give a folder's owner all rights to it, a file's to read it."""
    place = os.open(name, _PLACE, dir_fd=folder)
    try:
        mode = os.fstat(place).st_mode
        wanted = stat.S_IRWXU if stat.S_ISDIR(mode) else stat.S_IRUSR
        if mode & wanted != wanted:
            os.chmod(f"/proc/self/fd/{place}", stat.S_IMODE(mode) | wanted)
    finally:
        os.close(place)
