"""The world of a slot: what its commands see as `/`. Only the standard library; see helper.py.

The host's folders, read-only, in a tmpfs root; its own /proc, /dev/pts and /dev/shm; and for each
run /spell, /tmp and the folder of HOME, its mounts, and the `visible` folders wherever one of
those, or the cover, would hide them. Host paths are reached through a descriptor of the host's
root, which stays mounted at a covered place: a command cannot get there.
"""

import os
import stat
import sys

from spellq_workers.mounts import (
    CLONE_NEWIPC,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    is_below,
    make_read_only,
    mount,
    mounts,
    pivot_root,
    unmount,
    unshare,
)
from spellq_workers.places import Places, Refused, bind_entry
from spellq_workers.runfolder import Host, RunFolder

RUN_DIRECTORY = "/spell"

_TMP = "/tmp"  # noqa: S108
_SHM = "/dev/shm"  # noqa: S108
_HOST = "/.host"
_OWN = ("proc", _TMP[1:], RUN_DIRECTORY[1:])
# Without capabilities uid 0 still passes the owner checks of these files.
_KERNEL_SETTINGS = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs")

Mounts = list[list[str]]


class World:
    """Built once, in a mount namespace of its own; each run's own places come and go.

    A run that asks for the same as the one before, which left no trace, gets the same places again.
    """

    def __init__(self, slot: str, cover: str, visible: list[str]) -> None:
        self._slot = slot
        self._cover = cover
        self._visible = visible
        self._places = Places()
        self._asked: object = None
        self._untouched: object = None
        self._spare: RunFolder | None = None
        self._shm_changed: int | None = None
        self._overlay_options = "volatile,"
        mount("", "/", "", MS_REC | MS_PRIVATE)
        mount("tmpfs", slot, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        os.mkdir(slot + _HOST)
        pivot_root(slot, slot + _HOST)
        os.chdir("/")
        self._host = Host(os.open(_HOST, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._assemble()

    def prepare(self, path: str, home: str, code: str | None, mounts: Mounts) -> RunFolder:
        """Make the run's folder at `path` on the host, and the world its command will see.

        Raises:
            Refused, OSError: it cannot be; nothing of it stays in the world.
        """
        unshare(CLONE_NEWIPC)
        self._renew_shm()
        asked = self._identify(home, code, mounts)
        spare, self._spare = self._spare, None
        if spare is not None and asked == self._asked:
            spare.move(path)
            return spare
        self._undress()
        if spare is not None:
            spare.remove()
        folder = RunFolder(self._host, path)
        try:
            self._dress(folder, home, code, mounts)
        except BaseException:
            self._undress()
            folder.close()
            raise
        self._asked, self._untouched = asked, folder.trace()
        return folder

    def leave(self, folder: RunFolder) -> None:
        """The command and all it started are dead: what it wrote is no part of the world now."""
        if self._asked is not None and folder.trace() != self._untouched:
            self._undress()

    def discard(self, folder: RunFolder) -> bool:
        """Give the run's folder up; False: it is now `discarded-…`, for others to remove."""
        self.leave(folder)
        if self._asked is None:
            folder.move(f"{self._slot}/discarded-{os.path.basename(folder.path)}")
            folder.close()
            return False
        folder.clear()
        folder.move(f"{self._slot}/spare")
        self._spare = folder
        return True

    def _identify(self, home: str, code: str | None, mounts: Mounts) -> object:
        """What a world is asked to hold, down to the very files that are mounted."""
        sources = [self._host.identity(source) for source, _ in mounts]
        return home, code, code and self._host.identity(code), mounts, sources

    def _dress(self, folder: RunFolder, home: str, code: str | None, mounts: Mounts) -> None:
        if code is None:
            self._places.bind(folder.at("files"), RUN_DIRECTORY, read_only=False)
        else:
            self._overlay(folder, code)
        self._places.bind(folder.at("tmp"), _TMP, read_only=False)
        hiding = [_TMP, self._cover]
        if os.path.isabs(home) and home not in ("/", _TMP, RUN_DIRECTORY):
            self._places.bind(folder.at("home"), home, read_only=False)
            hiding.append(home)
        for path in self._visible:
            if any(is_below(path, place) for place in hiding):
                self._places.bind(self._host.at(path), path, read_only=True)
        for source, target in sorted(mounts, key=lambda pair: len(pair[1])):
            self._mount_resource(source, target)
        self._places.seal()

    def _undress(self) -> None:
        self._asked = self._untouched = None
        self._places.remove()

    def _assemble(self) -> None:
        for name in os.listdir(_HOST):
            if name not in (*_OWN, _HOST[1:]):
                try:
                    bind_entry(f"{_HOST}/{name}", f"/{name}")
                except OSError as error:
                    print(f"left out of the world: {error}", file=sys.stderr)  # noqa: T201
        for name in _OWN:
            os.mkdir(f"/{name}")
        _mount_proc()
        _make_host_read_only()
        _make_own_devices()
        for path in (self._cover, _HOST):
            if os.path.isdir(path):
                mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=700")
        make_read_only("/", MS_NOSUID | MS_NODEV)

    def _renew_shm(self) -> None:
        """A fresh /dev/shm, or the last one where no run has changed it."""
        if self._shm_changed is not None:
            if os.stat(_SHM).st_ctime_ns == self._shm_changed and not os.listdir(_SHM):
                return
            unmount(_SHM)
        if os.path.isdir(_SHM):
            mount("tmpfs", _SHM, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
            self._shm_changed = os.stat(_SHM).st_ctime_ns

    def _overlay(self, folder: RunFolder, code: str) -> None:
        """Paths go as descriptors: no character of theirs can be taken for an option."""
        try:
            lower = self._host.open(code)
        except OSError as error:
            raise Refused(f"The run's code is not on this machine: {error.strerror}.") from error
        upper, work = folder.open("files"), folder.open("work")
        places = (
            f"lowerdir=/proc/self/fd/{lower},upperdir=/proc/self/fd/{upper},"
            f"workdir=/proc/self/fd/{work},redirect_dir=off,metacopy=off,index=off"
        )
        try:
            self._mount_overlay(places)
        finally:
            for descriptor in (lower, upper, work):
                os.close(descriptor)
        self._places.add(RUN_DIRECTORY)

    def _mount_overlay(self, places: str) -> None:
        """`volatile`, where the kernel has it, spares a sync of the whole disk at every unmount."""
        try:
            mount("overlay", RUN_DIRECTORY, "overlay", 0, self._overlay_options + places)
        except OSError:
            if not self._overlay_options:
                raise
            self._overlay_options = ""
            self._mount_overlay(places)

    def _mount_resource(self, source: str, target: str) -> None:
        try:
            self._places.bind(self._host.at(source), target, read_only=True)
        except OSError as error:
            raise Refused(f"Cannot mount at {target}: {error.strerror}.", mount=True) from error


def _mount_proc() -> None:
    """With pid 1, which a command cannot look into, out of sight where the kernel can do that."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "hidepid=ptraceable")
    except OSError:
        mount("proc", "/proc", "proc", flags)


def _make_host_read_only() -> None:
    """A mount that another one hides cannot be reached, neither by us nor by a command."""
    places = list(mounts())
    for index, (place, options) in enumerate(places):
        if place in ("/", "/proc") or is_below(place, _HOST):
            continue
        try:
            make_read_only(place, options=options)
        except OSError:
            if not any(is_below(place, later) for later, _ in places[index + 1 :]):
                raise
    for place in filter(os.path.exists, _KERNEL_SETTINGS):
        mount(place, place, "", MS_BIND | MS_REC)
        make_read_only(place, MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _make_own_devices() -> None:
    """Terminals of its own, and no way to the disks below the file systems."""
    if os.path.isdir("/dev/pts"):
        options = "newinstance,ptmxmode=0666,mode=620"
        mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)
    for entry in os.scandir("/dev"):
        if stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode):
            mount(entry.path, entry.path, "", MS_BIND)
            make_read_only(entry.path, MS_NODEV)
