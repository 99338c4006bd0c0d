"""The world of a slot: what its commands see as `/`. Only the standard library; see helper.py.

The host's folders, read-only, in a tmpfs root; its own /proc, /dev and /run; and for each run
/spell, /tmp and the home folder, its mounts, and the `visible` folders wherever one of those, or
the cover, would hide them.

Built once, in a mount namespace no command is ever in. A run gets a copy of that namespace, where
its places are made, and which ends with it: so a descriptor that somebody kept from it leads into
no later run. In that copy the host's own root is not mounted at all. A run that asks for the same
as the one before gets the same copy, and the same folder, if that one left no trace and nobody kept
hold of its places: copying a namespace is a quarter of all a short run costs.
"""

import errno
import os
import stat
import sys
from contextlib import suppress
from fnmatch import fnmatch
from typing import NamedTuple

from spellq_workers.copies import copy_code
from spellq_workers.mounts import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    enter_mounts,
    is_below,
    is_free,
    make_read_only,
    make_writable,
    mount,
    mounts,
    pivot_root,
    unmount,
    unmount_if_free,
    unshare,
)
from spellq_workers.places import Places, Refused, bind_entry
from spellq_workers.privileges import in_user_namespace
from spellq_workers.runfolder import Host, RunFolder

RUN_DIRECTORY = "/spell"

_TMP = "/tmp"  # noqa: S108
_SHM = "/dev/shm"  # noqa: S108
_PTS = "/dev/pts"
_HOST = "/.host"
_RUN = "/run"
_OWN = ("proc", "dev", _RUN[1:], _TMP[1:], RUN_DIRECTORY[1:])
_SHOWN_OF_RUN = (
    "systemd/resolve",
    "resolvconf",
    "nscd",
    "udev",
    "opengl-driver",
    "opengl-driver-32",
    "current-system",
)
"""Names, devices and drivers. What else listens there would act for a command outside its world:
the user's own systemd, say, or Docker for root."""
_COMMON = (_PTS, _SHM, "/proc")
"""What one run after the other sees."""
_NOBODYS = ("/proc", "/sys", "/dev", _HOST)
"""Where nothing of a run's may be."""

_OVERLAY_REFUSED = (
    errno.EINVAL,  # on an overlay, as a container's own root is, or some network file system
    errno.ENODEV,
    errno.EOPNOTSUPP,
    errno.EOVERFLOW,
    errno.EPERM,
)

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "kvm", "kfd", "dri", "infiniband")
_DEVICE_PATTERN = "nvidia*"
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

Mounts = list[list[str]]


class _Dressed(NamedTuple):
    """A run's copy of the world, which this process is in."""

    asked: object
    folder: RunFolder
    places: Places


class World:
    """Holds one run at a time: `prepare`, the command, `leave`, `discard`.

    Where one of them raises OSError, or a run was held, the world is of no use any more, and its
    process has to end.
    """

    def __init__(self, slot: str, cover: str, visible: list[str]) -> None:
        self.overlay_refusal = ""
        """Why no overlay can be had here, once one was asked for; code is copied then."""
        self.was_held = False
        """A run left somebody outside with a hold on what the next one would see too."""
        self._slot = slot
        self._cover = cover
        self._visible = visible
        self._dressed: _Dressed | None = None
        self._in_use = False
        self._overlay_options = "volatile,"
        self._overlay_marks = "userxattr," if in_user_namespace() else ""
        mount("", "/", "", MS_REC | MS_PRIVATE)
        mount("tmpfs", slot, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        os.mkdir(slot + _HOST)
        pivot_root(slot, slot + _HOST)
        os.chdir("/")
        self._host = Host(_HOST)
        self._assemble()
        self._crowded = [path for path in visible if _holds_mounts(_HOST + path)]
        self._common_state = self._read_common_state()
        self._base = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def prepare(self, path: str, home: str, code: str | None, mounts: Mounts) -> RunFolder:
        """Make the run's folder at `path` on the host, and the world its command will see.

        Raises:
            Refused: it cannot be as asked; nothing of it stays in the world.
        """
        unshare(CLONE_NEWIPC)
        sources = [self._host.identity(source) for source, _ in mounts]
        asked = home, code, code and self._host.identity(code), mounts, sources
        common_changed = self._read_common_state() != self._common_state
        if self._dressed is not None:
            if asked == self._dressed.asked and not common_changed:
                self._dressed.folder.move(path)
                self._in_use = True
                return self._dressed.folder
            self._undress().folder.remove()
        if common_changed:
            self._renew_common()
        folder = RunFolder(self._host, path)
        unshare(CLONE_NEWNS)
        self._dressed = _Dressed(asked, folder, Places())
        try:
            self._dress(self._dressed.places, path, home, code, mounts)
        except Refused:
            self._undress().folder.close()
            raise
        folder.note()
        self._in_use = True
        return folder

    def leave(self) -> bool:
        """The command and all it started are dead: end what they saw, or keep it for the next run.

        True: somebody outside still holds a part of it, and may go on writing to the run's files.
        """
        in_use, self._in_use = self._in_use, False
        if self._dressed is None or not in_use:
            return self.was_held
        _, folder, places = self._dressed
        untouched = folder.is_untouched() and places.are_free(park=_HOST)
        if not (untouched and all(map(is_free, _COMMON))):
            self._undress()
        return self.was_held

    def discard(self, folder: RunFolder) -> bool:
        """Give the run's folder up; False: it is now `discarded-…`, for others to remove."""
        self.leave()
        if self._dressed is None:
            folder.move(f"{self._slot}/discarded-{os.path.basename(folder.path)}")
            folder.close()
            return False
        folder.clear()
        folder.move(f"{self._slot}/spare")
        return True

    def _undress(self) -> _Dressed:
        """Go back to where no command ever is."""
        assert self._dressed is not None
        dressed, self._dressed = self._dressed, None
        free = dressed.places.release()
        for place in _COMMON:
            free = unmount_if_free(place) and free
        self.was_held = self.was_held or not free
        enter_mounts(self._base)
        dressed.places.remove_top_level()
        return dressed

    def _dress(
        self, places: Places, folder: str, home: str, code: str | None, mounts: Mounts
    ) -> None:
        host = Host(_HOST)
        try:
            if code is not None and self._overlay(host, folder, code):
                places.add_own(RUN_DIRECTORY)
            else:
                if code is not None:
                    _copy_code(host.at(code), host.at(folder))
                places.bind_own(host.at(folder + "/files"), RUN_DIRECTORY)
            places.bind_own(host.at(folder + "/tmp"), _TMP)  # noqa: S108
            hiding = [_TMP, _RUN, self._cover]
            if (home_place := _home_place(home)) is not None:
                places.bind_own(host.at(folder + "/home"), home_place)
                hiding.append(home_place)
            for path in self._visible:
                if any(is_below(path, place) for place in hiding):
                    places.bind(host.at(path), path, whole=path in self._crowded)
            for source, target in sorted(mounts, key=lambda pair: len(pair[1])):
                _mount_resource(places, host.at(source), target)
            places.seal()
            unmount(_HOST)
        finally:
            host.close()

    def _overlay(self, host: Host, folder: str, code: str) -> bool:
        """False where the kernel refuses it.

        Paths go as descriptors: no character of theirs can be taken for an option.
        """
        try:
            lower = host.open(code)
        except OSError as error:
            raise Refused(f"The run's code is not on this machine: {error.strerror}.") from error
        upper, work = host.open(f"{folder}/files"), host.open(f"{folder}/work")
        places = (
            f"lowerdir=/proc/self/fd/{lower},upperdir=/proc/self/fd/{upper},"
            f"workdir=/proc/self/fd/{work},redirect_dir=nofollow,metacopy=off,index=off"
        )
        try:
            if not self.overlay_refusal:
                self._check_owners(lower, upper)
                self._mount_overlay(places)
        except OSError as error:
            if error.errno not in _OVERLAY_REFUSED:
                raise
            self.overlay_refusal = error.strerror or str(error)
        finally:
            for descriptor in (lower, upper, work):
                os.close(descriptor)
        return not self.overlay_refusal

    def _check_owners(self, *folders: int) -> None:
        """In a user namespace an overlay copies up only what belongs to its own user and group."""
        own = os.geteuid(), os.getegid()
        for status in map(os.fstat, folders):
            if self._overlay_marks and (status.st_uid, status.st_gid) != own:
                message = "overlay: the files are another user's or group's"
                raise OSError(errno.EOVERFLOW, message)

    def _mount_overlay(self, places: str) -> None:
        """`volatile`, where the kernel has it, spares a sync of the whole disk at every unmount."""
        try:
            options = self._overlay_options + self._overlay_marks + places
            mount("overlay", RUN_DIRECTORY, "overlay", 0, options)
        except OSError:
            if not self._overlay_options:
                raise
            self._overlay_options = ""
            self._mount_overlay(places)

    def _assemble(self) -> None:
        for name in os.listdir(_HOST):
            if name not in (*_OWN, _HOST[1:]):
                try:
                    bind_entry(f"{_HOST}/{name}", f"/{name}")
                except OSError as error:
                    print(f"left out of the world: {error}", file=sys.stderr)  # noqa: T201
        for name in _OWN:
            os.mkdir(f"/{name}")
        _show_of_run()
        _mount_proc()
        mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        _add_devices()
        _make_host_read_only()
        _make_own_devices()
        if os.path.isdir(self._cover):
            mount("tmpfs", self._cover, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=700")
        make_read_only("/dev", MS_NOSUID | MS_NODEV)
        make_read_only("/", MS_NOSUID | MS_NODEV)

    def _read_common_state(self) -> object:
        """What changes when a run used /dev/shm or closed a door, or the host has new devices."""
        host = os.stat(self._host.at("/dev")).st_mtime_ns
        changed = [os.stat(place).st_ctime_ns for place in (_SHM, _PTS, f"{_PTS}/ptmx")]
        return host, changed, os.listdir(_SHM)

    def _renew_common(self) -> None:
        """Fresh /dev/shm and /dev/pts; and drivers make some devices when they are first used."""
        for place in (_SHM, _PTS):
            unmount(place)
        _mount_shared_memory_and_terminals()
        make_writable("/dev")
        _add_devices()
        make_read_only("/dev", MS_NOSUID | MS_NODEV)
        self._common_state = self._read_common_state()


def _holds_mounts(folder: str) -> bool:
    """An ordinary user's namespace could not bind such a folder without what is mounted in it."""
    return any(is_below(place, folder) and place != folder for place, _ in mounts())


def _copy_code(code: str, folder: str) -> None:
    try:
        copy_code(code, folder)
    except OSError as error:
        raise Refused(f"The run's code cannot be copied: {error.strerror}.") from error


def _mount_resource(places: Places, source: str, target: str) -> None:
    try:
        places.bind(source, _mount_place(target))
    except OSError as error:
        raise Refused(f"Cannot mount at {target}: {error.strerror}.", mount=True) from error


def _mount_place(target: str) -> str:
    """Where a mount really goes: a link, of the code say, must not lead us astray."""
    asked = os.path.normpath("/" + target.lstrip("/"))
    place = os.path.realpath(asked)
    if is_below(asked, RUN_DIRECTORY) != is_below(place, RUN_DIRECTORY):
        raise Refused(f"Cannot mount at {target}: a link leads elsewhere.", mount=True)
    if place in ("/", _TMP, RUN_DIRECTORY) or any(is_below(place, no) for no in _NOBODYS):
        raise Refused(f"Cannot mount at {target}: that belongs to the world itself.", mount=True)
    return place


def _home_place(home: str) -> str | None:
    """Where the run's home folder goes; None where another place of its own is there already."""
    place = os.path.realpath(home)
    if place in ("/", _TMP, RUN_DIRECTORY):
        return None
    if not home.startswith("/") or any(is_below(place, no) for no in (*_NOBODYS, RUN_DIRECTORY)):
        raise Refused(f"The home folder of this user, {home!r}, cannot be one in a run's world.")
    return place


def _show_of_run() -> None:
    places = [f"{_RUN}/{name}" for name in _SHOWN_OF_RUN]
    with suppress(OSError):  # no link, so in no need of anything
        places.append(
            os.path.normpath(os.path.join("/etc", os.readlink(f"{_HOST}/etc/resolv.conf")))
        )
    for place in places:
        wanted = is_below(place, _RUN) and os.path.lexists(_HOST + place)
        if wanted and not os.path.lexists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            bind_entry(_HOST + place, place)


def _mount_proc() -> None:
    """With pid 1, which a command cannot look into, out of sight where the kernel can do that.

    Read-only as a whole. Uid 0 passes the owner checks of the kernel's settings without any
    capability; and read-only mounts over them alone would be gone for whoever still held a
    descriptor of /proc when the world ends.
    """
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "hidepid=ptraceable")
    except OSError:
        mount("proc", "/proc", "proc", flags)
    make_read_only("/proc", flags)


def _make_host_read_only() -> None:
    """A mount that another one hides cannot be reached, neither by us nor by a command.

    The same goes for one in a folder that is closed to this user (EACCES).
    """
    places = list(mounts())
    for index, (place, options) in enumerate(places):
        if place in ("/", "/proc", "/dev") or is_below(place, _HOST):
            continue
        try:
            make_read_only(place, options=options)
        except PermissionError as error:
            if error.errno != errno.EACCES:
                raise
        except OSError:
            if not any(is_below(place, later) for later, _ in places[index + 1 :]):
                raise


def _make_own_devices() -> None:
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"/dev/{name}")
    for place in (_SHM, _PTS):
        os.mkdir(place)
    _mount_shared_memory_and_terminals()


def _mount_shared_memory_and_terminals() -> None:
    options = "newinstance,ptmxmode=0666,mode=620"
    mount("devpts", _PTS, "devpts", MS_NOSUID | MS_NOEXEC, options)
    mount("tmpfs", _SHM, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def _add_devices() -> None:
    """The host's devices a command may know of, as far as they are not there yet."""
    there = os.listdir("/dev")
    for entry in os.scandir(f"{_HOST}/dev"):
        wanted = entry.name in _DEVICES or fnmatch(entry.name, _DEVICE_PATTERN)
        mode = entry.stat(follow_symlinks=False).st_mode
        if wanted and entry.name not in there and (stat.S_ISCHR(mode) or stat.S_ISDIR(mode)):
            place = f"/dev/{entry.name}"
            bind_entry(entry.path, place)
            make_read_only(place, MS_NOSUID)
