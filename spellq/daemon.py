"""The files by which a local daemon is found, and its being the only one of its home."""

import fcntl
import os
import pwd
import stat
import struct
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from msgspec import Struct

from spellq.files import write_private
from spellq.version import __version__

_MACHINE_TYPES: Final = "machine-types"
_AGENT: Final = b"agent"
"""In the lock file of a home that an agent of a cluster has."""


class DaemonRecord(Struct, frozen=True):
    """`daemon.json`: where a living daemon is."""

    url: str
    pid: int
    version: str = __version__


class AlreadyRunning(Exception):
    """Another daemon lives in this home."""


class UnusableHome(Exception):
    """The home folder cannot be this daemon's; the message names it and the remedy."""


class DaemonFiles:
    """What a daemon keeps in its home folder (mode 0700) for those who look for it.

    `daemon.lock` is locked as long as the daemon lives; `daemon.json` and `daemon.pid` are there
    while it serves; `token` (0600) stays; `port` and `machine-types` are for the one that comes
    next, also after a `kill -9`.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock: int | None = None

    def lock(self, *, for_agent: bool = False) -> None:
        """Be the only one here: a daemon, or an agent of a cluster, for which nobody here waits.

        Raises:
            AlreadyRunning: somebody else holds the lock.
            UnusableHome: the folder is another user's, or cannot be made.
        """
        self._make_private()
        descriptor = os.open(self.home / "daemon.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock())
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise AlreadyRunning(in_use(self.home)) from error
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        if for_agent:
            os.write(descriptor, _AGENT)
        self._lock = descriptor

    def _make_private(self) -> None:
        """The folder is ours alone, also when it was there: everything below relies on it."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.home.stat()
            if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != 0o700:
                self.home.chmod(0o700)
        except OSError as error:
            raise UnusableHome(
                f"The folder {self.home} cannot be used: {error.strerror}. "
                "Set SPELLQ_HOME to a folder of your own."
            ) from error
        if status.st_uid != os.geteuid():
            raise UnusableHome(
                f"The folder {self.home} belongs to {_user_name(status.st_uid)}, not to "
                f"{local_owner()}. Set SPELLQ_HOME to a folder of your own."
            )

    def unlock(self) -> None:
        """Let another daemon be the one of this home; the end of the process does it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def last_port(self) -> int | None:
        """The port of the daemon before, which master runs under way still know."""
        try:
            return int((self.home / "port").read_text())
        except (OSError, ValueError):
            return None

    def last_machine_types(self) -> str | None:
        """What a daemon before was asked to serve, by a flag or the environment."""
        try:
            return (self.home / _MACHINE_TYPES).read_text() or None
        except (OSError, ValueError):
            return None

    def announce(self, url: str, port: int, machine_types: str | None) -> None:
        """Say where this daemon serves, and keep what it was asked to serve for the next one."""
        record = DaemonRecord(url=url, pid=os.getpid())
        if machine_types != self.last_machine_types():
            write_private(self.home / _MACHINE_TYPES, (machine_types or "").encode())
        write_private(self.home / "port", str(port).encode())
        write_private(self.home / "daemon.pid", f"{os.getpid()}\n".encode())
        write_private(self.home / "daemon.json", msgspec.json.encode(record) + b"\n")
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def withdraw(self) -> None:
        """This daemon serves no longer."""
        for name in ("daemon.json", "daemon.pid"):
            (self.home / name).unlink(missing_ok=True)

    def read_token(self) -> str | None:
        try:
            return (self.home / "token").read_text().strip() or None
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def write_token(self, token: str) -> None:
        write_private(self.home / "token", f"{token}\n".encode())


def forget_machine_types(home: Path) -> None:
    """The next daemon serves what the settings say. Raises OSError."""
    (home / _MACHINE_TYPES).unlink(missing_ok=True)


def daemon_lives(home: Path) -> bool:
    """Whether a daemon of this home holds its lock. Asking never disturbs one that starts."""
    try:
        descriptor = os.open(home / "daemon.lock", os.O_RDWR)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock())
    finally:
        os.close(descriptor)
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)


def agent_lives(home: Path) -> bool:
    """Whether it is an agent of a cluster that has this home to itself."""
    try:
        return (home / "daemon.lock").read_bytes() == _AGENT and daemon_lives(home)
    except OSError:
        return False


def in_use(home: Path) -> str:
    """What whoever finds the home taken is told."""
    if agent_lives(home):
        return (
            f"An agent of a cluster runs in {home}. To use its cluster, set SPELLQ_URL and "
            "SPELLQ_TOKEN; for another spellq on this machine, set SPELLQ_HOME to another folder."
        )
    return f"Another spellq daemon runs in {home}."


def await_daemon_ready(lock: BinaryIO) -> None:
    """Block while a daemon holds its lock and does not serve yet."""
    fcntl.flock(lock, fcntl.LOCK_SH)


def await_daemon_gone(lock: BinaryIO) -> None:
    """Block while a daemon lives."""
    fcntl.fcntl(lock, fcntl.F_OFD_SETLKW, _flock(fcntl.F_RDLCK))


def _flock(kind: int = fcntl.F_WRLCK) -> bytes:
    """A lock on the whole file, as fcntl(2) takes it: type, whence, start, len, pid."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def local_owner() -> str:
    """Who owns the runs of a local daemon: the user it runs as, whatever the environment says."""
    return _user_name(os.getuid())


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"
