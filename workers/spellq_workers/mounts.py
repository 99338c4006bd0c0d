"""The kernel's calls that make a world, for the slot helper. Only the standard library.

Every function raises OSError with a sentence that names what was tried.
"""

import ctypes
import errno
import os
from collections.abc import Iterator

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 4096, 8192, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
CLONE_NEWUSER, CLONE_FS = 0x10000000, 0x00000200

_MNT_DETACH, _MNT_EXPIRE, _UMOUNT_NOFOLLOW = 2, 4, 8
_EXPIRE_TRIES = 4
_PR_SET_DUMPABLE, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 28, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION = 0x20080522
_NOROOT_AND_NO_AMBIENT_LOCKED = 0b11000011
_OPTIONS = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}

_text, _word = ctypes.c_char_p, ctypes.c_ulong
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (_text, _text, _text, _word, _text)
_libc.umount2.argtypes = (_text, ctypes.c_int)
_libc.pivot_root.argtypes = (_text, _text)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, _word, _word, _word, _word)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode()
    )
    if result != 0:
        _fail(f"mount of {kind or source or 'a changed flag'} at {target}")


def unmount(target: str) -> None:
    """Take away the topmost mount at `target` with all that is mounted on it."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        _fail(f"unmount of {target}")


def is_free(target: str) -> bool:
    """Whether nobody uses the mount at `target`: True only if that is sure.

    False: something is mounted on it, or a process, of another world too, holds a descriptor of a
    file in it. Not seen: a copy of the mount in a namespace that somebody holds.
    """
    if _expire(target) != errno.EAGAIN:
        return False
    os.stat(target)  # a use, which takes back the mark that would let the next call unmount it
    return True


def unmount_if_free(target: str) -> bool:
    """Take the mount at `target` away if it is free, in one atomic step; else it stays."""
    for _ in range(_EXPIRE_TRIES):  # the first call marks it, and any use takes the mark back
        result = _expire(target)
        if result != errno.EAGAIN:
            return result == 0
    return False


def _expire(target: str) -> int:
    failed = _libc.umount2(os.fsencode(target), _MNT_EXPIRE | _UMOUNT_NOFOLLOW) != 0
    return ctypes.get_errno() if failed else 0


def make_read_only(target: str, flags: int = 0, options: str | None = None) -> None:
    """Make the mount at `target` read-only.

    What it forbids already stays so: where that is locked (in a container, or for an ordinary
    user), the kernel would refuse the rest as well. `options` are those it has, if they are known;
    else its file system is asked.
    """
    if options is None:
        kept = os.statvfs(target).f_flag & sum(_OPTIONS.values())
    else:
        kept = sum(_OPTIONS.get(option, 0) for option in options.split(","))
    mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept | flags)


def make_writable(target: str) -> None:
    mount("", target, "", MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV)


def mounts() -> Iterator[tuple[str, str]]:
    """(place, options) of every mount of this process's namespace, in the order of mounting."""
    with open("/proc/self/mountinfo", "rb") as lines:
        fields = [line.split() for line in lines]
    for field in fields:
        place = field[4].decode("unicode_escape").encode("latin-1")
        yield os.fsdecode(place), field[5].decode()


def pivot_root(new_root: str, put_old: str) -> None:
    if _libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old)) != 0:
        _fail("pivot_root")


def unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        _fail("making new namespaces")


def enter_mounts(namespace: int) -> None:
    """Go over to a mount namespace; the working directory is its root then."""
    if _libc.setns(namespace, CLONE_NEWNS) != 0:
        _fail("going back to the mount namespace")


def give_up_privileges() -> None:
    """What this process executes from now on has its user and no capability, and can gain none.

    Nor can it look into this process, which keeps its own.
    """
    for what, option, value in (
        ("securebits", _PR_SET_SECUREBITS, _NOROOT_AND_NO_AMBIENT_LOCKED),
        ("ambient", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL),
        ("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1),
        ("dumpable", _PR_SET_DUMPABLE, 0),
    ):
        if _libc.prctl(option, value, 0, 0, 0) != 0:
            _fail(f"giving up capabilities ({what})")
    _make_nothing_inheritable()


def _make_nothing_inheritable() -> None:
    this_process = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    if _libc.capget(this_process, held) == 0:
        held[2] = held[5] = 0
        if _libc.capset(this_process, held) == 0:
            return
    _fail("giving up capabilities (inheritable)")


def is_below(path: str, folder: str) -> bool:
    """Whether an absolute path is `folder` or lies in it, by their texts."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _fail(what: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
