"""Log entries: what a run's log is a sequence of, and the words spellq itself writes into it.

The sentences are Spell's, as its transcripts show them; those that nobody recorded keep its voice.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct

from spellq.runs import Run, Status


class LogEntry(Struct, frozen=True, omit_defaults=True, gc=False):
    """One line of a run's log: the user's, or (`status_event`) the runtime's.

    `status` is the status in force. `raw_end` is the place in the command's raw output up to which
    this entry reaches, in bytes; it lets an agent go on where its last append ended. `continued`
    marks an entry that is not the last of its line (lines over the entry limit are split).
    `version` is the run's, for a line that was said by a step of its life.
    """

    status: Status
    log: str
    at: datetime
    status_event: bool = False
    level: str | None = None
    important: bool = False
    raw_end: int | None = None
    version: int | None = None
    continued: bool = False


_LINES: Final[dict[Status, str]] = {
    Status.BUILDING: "Run is building",
    Status.MOUNTING: "Run is mounting",
    Status.RUNNING: "Run is running",
    Status.STOPPING: "Run is stopping",
    Status.KILLING: "Run is killing",
    Status.SAVING: "Run is saving",
    Status.PUSHING: "Run is pushing",
}


def status_line(status: Status) -> str | None:
    """The line that announces a status, or None where the ending's own lines do."""
    return _LINES.get(status)


def ending_lines(run: Run) -> tuple[LogEntry, ...]:
    """The last lines of a run's log: how long it took, and how it ended."""
    assert run.ended_at is not None
    ending = f"Run {run.id} {run.status.replace('_', ' ')}"
    if run.reason:
        ending += f": {run.reason}"
    texts = [ending]
    if run.started_at is not None and run.status is not Status.KILLED:
        texts.insert(0, f"Total run time: {go_duration(run.ended_at - run.started_at)}")
    level = "error" if run.status in _ERRORS else "info"
    return tuple(
        LogEntry(
            status=run.status,
            log=text,
            at=run.ended_at,
            status_event=True,
            level=level,
            version=run.version,
        )
        for text in texts
    )


_ERRORS: Final = (Status.FAILED, Status.BUILD_FAILED, Status.MOUNT_FAILED)


def go_duration(span: timedelta) -> str:
    """A duration the way Spell's logs print it: `6.870837s`, `1m7.057677s`, `1h0m3s`."""
    micros = max(0, span // timedelta(microseconds=1))
    hours, micros = divmod(micros, 3_600_000_000)
    minutes, micros = divmod(micros, 60_000_000)
    seconds, micros = divmod(micros, 1_000_000)
    fraction = f".{micros:06d}".rstrip("0") if micros else ""
    head = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{head}{seconds}{fraction}s"


def raw_end(entries: Iterable[LogEntry]) -> int:
    """How far in the command's raw output the entries reach, in bytes; 0 where they hold none."""
    return max((entry.raw_end or 0 for entry in entries), default=0)
