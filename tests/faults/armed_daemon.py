"""The local daemon with crash points in it: `python -m tests.faults.armed_daemon HOME VICTIM AT`.

VICTIM is `daemon`, or the slot whose helper shall die (`cpu-0`). The rest is the daemon's own.
"""

import os
import sys
from pathlib import Path
from typing import Any

from spellq.compose.embedded import DaemonSettings, serve
from spellq_brokers.embedded import InProcessBus, SqliteStore
from spellq_brokers.embedded.entrylog import FileEntryLog
from spellq_brokers.embedded.writer import Transaction
from spellq_workers import link
from tests.faults.crashpoints import CrashPoints

ARMED_HELPER = Path(__file__).with_name("armed_helper.py")
REPORT = "crash-point"
"""In the home folder: the name of the point where a process died."""


class _TornFile:
    """A log file, of which a crash may leave half a write."""

    def __init__(self, file: Any, points: CrashPoints) -> None:
        self._file = file
        self._points = points

    def write(self, data: bytes) -> int:
        self._points.reach("before a log line")
        self._points.reach("in a log line", lambda: self._file.write(data[: len(data) // 2]))
        written: int = self._file.write(data)
        self._points.reach("after a log line")
        return written

    def close(self) -> None:
        self._file.close()


def arm(points: CrashPoints) -> None:
    """Put the points where something durable is written or anything is told to somebody else."""
    commit, open_log = Transaction.commit, FileEntryLog._file

    def watched_commit(self: Transaction) -> None:
        if self._begun:
            points.reach("before a commit")
        commit(self)
        if self._begun:
            points.reach("after a commit")

    def watched_log(self: FileEntryLog, number: int) -> Any:
        return _TornFile(open_log(self, number), points)

    Transaction.commit = watched_commit  # type: ignore[method-assign]
    FileEntryLog._file = watched_log  # type: ignore[method-assign]
    for name in ("fsync", "rename", "link", "replace"):
        points.watch(os, name)
    points.watch(InProcessBus, "publish")
    points.watch(InProcessBus, "offer")
    points.watch(SqliteStore, "strike")
    points.watch(link.Link, "ask")


def main() -> None:
    home, victim, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    report = str(home / REPORT)
    if victim == "daemon":
        arm(CrashPoints(at, report))
    else:
        link.HELPER = ARMED_HELPER  # type: ignore[misc]
        os.environ["ARMED_HELPER"] = f"{victim} {at} {report}"
    serve(DaemonSettings(home=home, ready_fd=int(sys.argv[4]) if len(sys.argv) > 4 else None))


if __name__ == "__main__":
    main()
