"""A home folder for a campaign, with which everything goes that lives in it."""

import asyncio
import os
import select
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spellq_sdk.daemon import find_daemon


@contextmanager
def home_of_its_own(prefix: str) -> Iterator[Path]:
    """A new folder. Its daemon and helpers are dead afterwards, also after an interrupt.

    Clients that would start the daemon again have to be gone before.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        home = Path(folder) / "home"
        home.mkdir(mode=0o700)
        try:
            yield home
        finally:
            if (daemon := find_daemon(home)) is not None:
                _kill(daemon.pid)
            for slot in home.glob("agent/slots/*"):
                with suppress(FileNotFoundError):
                    helper = int((slot / "helper.pid").read_text())
                    if is_helper(helper, slot):
                        _kill(helper)


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a process of ours, if it lives."""
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def is_helper(pid: int, slot: Path) -> bool:
    """Whether the process is this slot's helper still."""
    with suppress(OSError):
        return os.fsencode(slot) in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill(pid: int) -> None:
    """Return when it is gone."""
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])
        finally:
            os.close(process)
