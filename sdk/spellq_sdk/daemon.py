"""The local daemon: found if it lives, else started; at most one for a home folder.

Files in the home folder: `daemon.json` says where a living daemon is, `daemon.lock` is locked
by it as long as it lives, `start.lock` makes those who would start one take turns, `token`
is the user's, and `log` is what the daemon says. Everything here blocks: call it in a thread from
async code. Nothing polls: a daemon that is starting is heard through a pipe, one that is leaving
through a pidfd.
"""

import contextlib
import fcntl
import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from msgspec import Struct

from spellq.daemon import (
    agent_lives,
    await_daemon_gone,
    await_daemon_ready,
    daemon_lives,
    forget_machine_types,
    in_use,
)
from spellq.version import __version__
from spellq_sdk.exceptions import ClientException
from spellq_sdk.settings import spellq_home

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 30.0

SERVER_PACKAGES: Final = ("litestar", "uvicorn", "asyncinotify", "cryptography")
"""What a daemon imports beside the packages of clients."""

_started: set[int] = set()


class LocalDaemon(Struct, frozen=True):
    """A living daemon. `started` tells whether this very call started it."""

    url: str
    token: str
    pid: int
    version: str
    started: bool = False


class _Record(Struct, frozen=True):
    url: str
    pid: int
    version: str = ""


class _Ready(Struct, frozen=True):
    url: str = ""
    error: str = ""


def find_daemon(home: Path | None = None) -> LocalDaemon | None:
    """The living daemon of `home` ($SPELLQ_HOME by default), or None. Starts nothing."""
    home = home or spellq_home()
    try:
        record = msgspec.json.decode((home / "daemon.json").read_bytes(), type=_Record)
        token = (home / "token").read_text("utf-8").strip()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not _lives(record.pid) or not daemon_lives(home):
        return None
    return LocalDaemon(record.url, token, record.pid, record.version)


def ensure_daemon(
    home: Path | None = None,
    *,
    arguments: Sequence[str] = (),
    announce: Callable[[], None] | None = None,
    any_version: bool = False,
) -> LocalDaemon:
    """Find the daemon of `home`, or start one; blocks until it serves, at most about 30 s.

    `arguments` go to a daemon that is started (`["--port", "7735"]`), and have no effect on one
    that lives. `announce` is called right before one is started. A daemon of another version is
    replaced unless `any_version`; its commands run on by themselves.

    Raises:
        ClientException: the folder cannot be used, packages are missing, or the daemon did not
            start; the message says what to do, and quotes the daemon's last words.
    """
    home = home or spellq_home()
    _reap()
    if (daemon := find_daemon(home)) and (any_version or daemon.version == __version__):
        return daemon
    _prepare(home)
    if agent_lives(home):
        raise ClientException(in_use(home))
    with _start_lock(home):
        daemon = find_daemon(home)
        if daemon and (any_version or daemon.version == __version__):
            return daemon
        _check_packages()
        if announce:
            announce()
        if daemon:
            _terminate(daemon.pid)
        elif daemon_lives(home) and (daemon := _await_turn(home)):
            return daemon
        try:
            return _start(home, arguments)
        except ClientException:
            # One whose starter gave up (^C) may have been quicker.
            if daemon_lives(home) and (daemon := _await_turn(home)):
                return daemon
            raise


def stop_daemon(home: Path | None = None) -> bool:
    """Ask the daemon to leave and wait for its exit. False: none lived.

    What it was asked to serve by a flag or the environment is forgotten with it.

    Raises:
        ClientException: it did not leave within 30 s.
    """
    home = home or spellq_home()
    daemon = find_daemon(home)
    if daemon is not None:
        _terminate(daemon.pid)
        _reap()
    forget_machine_types(home)
    return daemon is not None


def _prepare(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(home, os.W_OK | os.X_OK)
    except OSError as error:
        raise _unusable(home, error.strerror or str(error)) from error
    if not writable:
        raise _unusable(home, "it is not writable")


def _unusable(home: Path, why: str) -> ClientException:
    return ClientException(
        f"The folder {home} cannot be used: {why}. "
        "Make it writable, or set SPELLQ_HOME to a folder that is."
    )


def _check_packages() -> None:
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ClientException(
            f"The local daemon needs packages that are not installed ({', '.join(missing)}). "
            'Install them with: pip install "spellq[all]". '
            "Or set SPELLQ_URL and SPELLQ_TOKEN to use a server."
        )


def _start(home: Path, arguments: Sequence[str]) -> LocalDaemon:
    log = home / "log"
    said_before = log.stat().st_size if log.exists() else 0
    reading, writing = os.pipe()
    try:
        try:
            pid = _spawn(home, log, writing, arguments)
        finally:
            os.close(writing)
        line = _read_line(reading, pid)
    finally:
        os.close(reading)
    try:
        ready = msgspec.json.decode(line, type=_Ready)
    except msgspec.DecodeError:
        ready = _Ready(error=_last_words(log, said_before))
    _reap()
    if ready.error or not ready.url:
        raise ClientException(ready.error or "The local daemon did not say where it serves.")
    token = (home / "token").read_text("utf-8").strip()
    return LocalDaemon(ready.url, token, pid, __version__, started=True)


def _spawn(home: Path, log: Path, ready_fd: int, arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "spellq.cli", "daemon", "--ready-fd", str(ready_fd)]
    with open(log, "ab", opener=_private) as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**os.environ, "SPELLQ_HOME": str(home)},
            pass_fds=(ready_fd,),
            start_new_session=True,
        )
    process.returncode = 0  # it outlives us on purpose, so Popen has nothing to warn about
    _started.add(process.pid)
    return process.pid


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_line(fd: int, pid: int) -> bytes:
    """What the daemon says first, without the line's end; less than a line when it died."""
    deadline = time.monotonic() + START_SECONDS
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data = b""
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            raise ClientException(f"The local daemon did not start within {START_SECONDS:.0f} s.")
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        data += chunk
    return data.partition(b"\n")[0]


def _last_words(log: Path, since: int) -> str:
    with open(log, "rb") as file:
        file.seek(since)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    said = "\n".join(lines[-5:]) or "(nothing)"
    return f"The local daemon did not start. Its last words, from {log}:\n{said}"


def _terminate(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        _await_exit(pidfd, pid)
    except PermissionError as error:
        raise ClientException(f"The local daemon (process {pid}) is another user's.") from error
    finally:
        os.close(pidfd)


def _await_turn(home: Path) -> LocalDaemon | None:
    """One that is starting is waited for; one that is on its way out is let go first."""
    _wait_for_lock(home, await_daemon_ready)
    if daemon := find_daemon(home):
        return daemon
    _wait_for_lock(home, await_daemon_gone)
    return None


def _wait_for_lock(home: Path, wait: Callable[[BinaryIO], None]) -> None:
    # Only a thread can give up waiting for a lock; one that is left behind ends with the lock.
    def work() -> None:
        with contextlib.suppress(OSError), (home / "daemon.lock").open("rb") as lock:
            wait(lock)

    waiting = threading.Thread(target=work, daemon=True)
    waiting.start()
    waiting.join(STOP_SECONDS)


def _await_exit(pidfd: int, pid: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(STOP_SECONDS * 1000):
        raise ClientException(
            f"The local daemon (process {pid}) did not leave within {STOP_SECONDS:.0f} s. "
            f"End it with: kill -9 {pid}"
        )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return pid > 0


@contextlib.contextmanager
def _start_lock(home: Path) -> Iterator[None]:
    try:
        fd = os.open(home / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(home, error.strerror or str(error)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _reap() -> None:
    """Daemons that this process started are its children: those that left are reaped."""
    for pid in list(_started):
        try:
            gone, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            gone = pid
        if gone:
            _started.discard(pid)
