"""The words and cells that lists of runs share."""

from datetime import datetime
from typing import Final

from spellq.cli.screen import harmless
from spellq.cli.tables import one_line
from spellq.cli.times import ago, duration
from spellq.runs import FINAL, WAITING, Status
from spellq.wire import RunView

_WORDS: Final = {Status.USER_REQUESTED: "Requested", Status.MACHINE_REQUESTED: "Queued"}
_COMMAND_COLUMNS: Final = 25
_COMMIT_COLUMNS: Final = 8

HEAD: Final = ("ID", "REPOSITORY", "COMMAND", "STATUS", "CREATOR")
VERBOSE_HEAD: Final = (
    "ID", "REPOSITORY", "COMMAND", "COMMIT", "STATUS", "CREATOR", "LABELS", "MACHINE",
    "DESCRIPTION",
)  # fmt: skip


def status_words(run: RunView) -> str:
    """`Queued`, `*Running`, `Complete (66)`: with a star while an agent works on it."""
    words = _WORDS.get(run.status, run.status.replace("_", " ").title())
    if is_active(run):
        words = f"*{words}"
    return words if run.user_exit_code is None else f"{words} ({run.user_exit_code})"


def is_active(run: RunView) -> bool:
    return run.status not in FINAL and run.status not in WAITING


def row(run: RunView, *, whole: bool = False) -> tuple[str, ...]:
    """The cells of one run below `HEAD`; `whole` cuts nothing."""
    command = harmless(one_line(run.command))
    if not whole and len(command) > _COMMAND_COLUMNS:
        command = command[: _COMMAND_COLUMNS - 1] + "…"
    return (str(run.id), run.repository or "-", command, status_words(run), run.owner)


def verbose_row(run: RunView, now: datetime, *, whole: bool = False) -> tuple[str, ...]:
    """The cells of one run below `VERBOSE_HEAD`."""
    number, repository, command, status, owner = row(run, whole=whole)
    commit = run.git_commit_hash if whole else run.git_commit_hash[:_COMMIT_COLUMNS]
    if run.ended_at is not None:
        status += f" -- {ago(run.ended_at, now)}"
    elif run.started_at is not None:
        status += f" [{duration(now - run.started_at)}]"
    return (
        number,
        repository,
        command,
        commit or "-",
        status,
        owner,
        ", ".join(run.labels) or "-",
        run.machine_type,
        harmless(one_line(run.description)),
    )
