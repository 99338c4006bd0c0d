"""The files by which a local daemon is found, and its being the only one of its home."""

import fcntl
import getpass
import os
import struct
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from spellq.version import __version__


class DaemonRecord(Struct, frozen=True):
    """`daemon.json`: where a living daemon is."""

    url: str
    pid: int
    version: str = __version__


class AlreadyRunning(Exception):
    """Another daemon lives in this home."""


class DaemonFiles:
    """What a daemon keeps in its home folder (mode 0700) for those who look for it.

    `daemon.lock` is locked as long as the daemon lives; `daemon.json` and `daemon.pid` are there
    while it serves; `token` (0600) stays.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock: int | None = None

    def lock(self) -> None:
        """
        Raises:
            AlreadyRunning: somebody else holds the lock.
        """
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.home / "daemon.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock())
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise AlreadyRunning(f"Another spellq daemon runs in {self.home}.") from error
        self._lock = descriptor

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

    def announce(self, url: str, port: int) -> None:
        """Say where this daemon serves."""
        record = DaemonRecord(url=url, pid=os.getpid())
        _write(self.home / "port", str(port))
        _write(self.home / "daemon.pid", f"{os.getpid()}\n")
        _write(self.home / "daemon.json", msgspec.json.encode(record).decode() + "\n")

    def withdraw(self) -> None:
        """This daemon serves no longer."""
        for name in ("daemon.json", "daemon.pid"):
            (self.home / name).unlink(missing_ok=True)

    def read_token(self) -> str | None:
        try:
            return (self.home / "token").read_text().strip() or None
        except FileNotFoundError:
            return None

    def write_token(self, token: str) -> None:
        _write(self.home / "token", token + "\n")


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


def _flock() -> bytes:
    """An exclusive lock on the whole file, as fcntl(2) takes it: type, whence, start, len, pid."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def _write(path: Path, text: str) -> None:
    """Write a file of ours whole: a reader sees the old text or the new."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


LOCAL_OWNER: Final = getpass.getuser
"""Who owns the runs of a local daemon: the user it runs as."""
