"""The places a run brings into its slot's world. Only the standard library."""

import os
import stat
from contextlib import suppress

from spellq_workers.mounts import (
    MS_BIND,
    MS_MOVE,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    is_below,
    is_free,
    make_read_only,
    make_writable,
    mount,
    mounts,
    unmount,
    unmount_if_free,
)

MAX_MIRRORED_ENTRIES = 4096


class Refused(Exception):
    """The world cannot be made as asked; the message is for the user."""

    def __init__(self, message: str, *, mount: bool = False) -> None:
        super().__init__(message)
        self.mount = mount


class Places:
    """What is mounted for one run, in a mount namespace that ends with it.

    A mount point that the host lacks is made where the run may write; elsewhere a tmpfs that
    mirrors the folder it would be in, or the world's own root, is opened for writing until `seal`.
    Targets are absolute and hold no link.
    """

    def __init__(self) -> None:
        self._mounted: list[tuple[str, bool]] = []
        self._writable: list[str] = []
        self._top_level: list[str] = []

    def bind(self, source: str, target: str, *, whole: bool = False) -> None:
        """Bind a file or folder at `target`, read-only, making the mount point if it is missing.

        `whole`: with all that is mounted in it.

        Raises:
            Refused, OSError: it cannot be.
        """
        self._bind(source, target, MS_REC if whole else 0)
        self._mounted.append((target, False))
        make_read_only(target, MS_NOSUID | MS_NODEV)
        for place, options in mounts() if whole else ():
            if is_below(place, target) and place != target:
                make_read_only(place, MS_NOSUID | MS_NODEV, options)

    def bind_own(self, source: str, target: str) -> None:
        """Bind a folder of the run's own, to be written to; raises as `bind` does."""
        self._bind(source, target)
        self.add_own(target)

    def add_own(self, target: str) -> None:
        """A folder of the run's own was mounted at `target`."""
        self._mounted.append((target, True))

    def seal(self) -> None:
        """Everything is in its place: what was opened for writing is read-only again."""
        for place in self._writable:
            make_read_only(place, MS_NOSUID | MS_NODEV)

    def are_free(self, park: str) -> bool:
        """Whether nobody holds the run's own places, for sure; they stay as they are.

        What is mounted in them is in the way, and moves to the folder `park` meanwhile.
        """
        nested = self._nested()
        if not all(map(os.path.isdir, nested)):
            return False
        for place in reversed(nested):
            mount(place, park, "", MS_MOVE)
        free = all(is_free(place) for place, is_own in self._mounted if is_own)
        for place in nested:
            mount(park, place, "", MS_MOVE)
        return free

    def release(self) -> bool:
        """Take away the run's own places; whether nobody held one of them.

        What is held stays there until the namespace ends, and then for whoever holds it.
        """
        nested = self._nested()
        free = True
        for place, is_own in reversed(self._mounted):
            if is_own:
                free = unmount_if_free(place) and free
            elif place in nested:
                with suppress(OSError):
                    unmount(place)
        return free

    def _nested(self) -> list[str]:
        """What is mounted in the run's own places, in that order."""
        own = [place for place, is_own in self._mounted if is_own]
        return [
            place
            for place, is_own in self._mounted
            if not is_own and any(is_below(place, folder) for folder in own)
        ]

    def remove_top_level(self) -> None:
        """Remove the mount points made in the world's root, once the run's namespace is left."""
        if not self._top_level:
            return
        make_writable("/")
        for path in self._top_level:
            with suppress(FileNotFoundError):
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)
        make_read_only("/", MS_NOSUID | MS_NODEV)

    def _bind(self, source: str, target: str, flags: int = 0) -> None:
        self._ensure_point(target, folder=os.path.isdir(source))
        mount(source, target, "", MS_BIND | flags)

    def _ensure_point(self, target: str, *, folder: bool) -> None:
        if os.path.exists(target):
            if os.path.isdir(target) != folder:
                what, there = ("a folder", "a file") if folder else ("a file", "a folder")
                raise Refused(f"Cannot mount {what} at {target}: there is {there}.", mount=True)
            return
        place, missing = target, []
        while not os.path.lexists(place):
            place, name = os.path.split(place)
            missing.append(name)
        if not os.path.isdir(place):
            raise Refused(f"Cannot mount at {target}: {place} is not a folder.", mount=True)
        self._open_for_writing(place)
        for name in reversed(missing):
            place = os.path.join(place, name)
            make_entry(place, folder=folder or place != target)
            if os.path.dirname(place) == "/":
                self._top_level.append(place)
                if place != target:
                    self._cover(place, 0o755)

    def _open_for_writing(self, folder: str) -> None:
        if not os.statvfs(folder).f_flag & MS_RDONLY:
            return
        if folder == "/":
            make_writable("/")
            self._writable.append("/")
        else:
            self._mirror(folder)

    def _mirror(self, folder: str) -> None:
        original = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = os.listdir(f"/proc/self/fd/{original}")
            if len(names) > MAX_MIRRORED_ENTRIES:
                raise Refused(
                    f"Cannot mount below {folder}: it has {len(names)} entries, more than "
                    f"{MAX_MIRRORED_ENTRIES}. Mount below /mnt or /spell.",
                    mount=True,
                )
            self._cover(folder, os.stat(original).st_mode & 0o7777)
            for name in names:
                bind_entry(f"/proc/self/fd/{original}/{name}", f"{folder}/{name}")
        finally:
            os.close(original)

    def _cover(self, folder: str, mode: int) -> None:
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")
        self._mounted.append((folder, False))
        self._writable.append(folder)


def make_entry(path: str, *, folder: bool) -> None:
    """An empty folder or file to mount on."""
    if folder:
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def bind_entry(source: str, target: str) -> None:
    """The entry at `source`, whatever its kind, again at `target`, with all mounts in it."""
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
        return
    make_entry(target, folder=stat.S_ISDIR(mode))
    mount(source, target, "", MS_BIND | MS_REC)
