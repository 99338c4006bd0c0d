"""What a run is: its statuses, what was asked for, and its state.

Status words and their order are Spell's (its client 0.48.9); a command that ends with a non-zero
exit code is `complete`, and `failed` is the platform's own failure.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final

from msgspec import Struct, field

SCHEMA: Final = 1
"""Version of every stored structure. Readers ignore fields they do not know."""

DEFAULT_MACHINE_TYPE: Final = "CPU"
DEFAULT_GRACE_SECONDS: Final = 30.0
MASTER_QUEUE: Final = "masters"
MAX_NUMBER: Final = 2**63 - 1
"""No run, workflow or cursor has a higher number: stores keep them in 64 bits."""


class Status(StrEnum):
    """Where a run is in its life."""

    USER_REQUESTED = "user_requested"
    MACHINE_REQUESTED = "machine_requested"
    BUILDING = "building"
    MOUNTING = "mounting"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLING = "killing"
    SAVING = "saving"
    PUSHING = "pushing"
    COMPLETE = "complete"
    FAILED = "failed"
    BUILD_FAILED = "build_failed"
    MOUNT_FAILED = "mount_failed"
    INTERRUPTED = "interrupted"
    KILLED = "killed"
    STOPPED = "stopped"


FINAL: Final = (
    Status.COMPLETE,
    Status.FAILED,
    Status.BUILD_FAILED,
    Status.MOUNT_FAILED,
    Status.INTERRUPTED,
    Status.KILLED,
    Status.STOPPED,
)
"""The statuses a run ends in, in Spell's order. A final status is written once."""

_S = Status
_ENDINGS_OF_THE_PLATFORM = frozenset({_S.FAILED, _S.INTERRUPTED})

LIFECYCLE: Final[Mapping[Status, frozenset[Status]]] = {
    _S.USER_REQUESTED: frozenset({_S.MACHINE_REQUESTED, _S.KILLING, _S.FAILED}),
    _S.MACHINE_REQUESTED: frozenset({_S.BUILDING, _S.KILLING, _S.FAILED}),
    _S.BUILDING: frozenset(
        {_S.MOUNTING, _S.RUNNING, _S.KILLING, _S.BUILD_FAILED, _S.MACHINE_REQUESTED}
    )
    | _ENDINGS_OF_THE_PLATFORM,
    _S.MOUNTING: frozenset({_S.RUNNING, _S.KILLING, _S.MOUNT_FAILED, _S.MACHINE_REQUESTED})
    | _ENDINGS_OF_THE_PLATFORM,
    _S.RUNNING: frozenset({_S.STOPPING, _S.KILLING, _S.SAVING}) | _ENDINGS_OF_THE_PLATFORM,
    _S.STOPPING: frozenset({_S.KILLING, _S.SAVING}) | _ENDINGS_OF_THE_PLATFORM,
    _S.KILLING: frozenset({_S.KILLED}),
    _S.SAVING: frozenset({_S.PUSHING, _S.KILLING}) | _ENDINGS_OF_THE_PLATFORM,
    _S.PUSHING: frozenset({_S.COMPLETE, _S.STOPPED, _S.KILLING}) | _ENDINGS_OF_THE_PLATFORM,
    **{final: frozenset() for final in FINAL},
}
"""Which status may follow which. The one table every store checks a transition against."""

WAITING: Final = frozenset({_S.USER_REQUESTED, _S.MACHINE_REQUESTED})
"""No agent owns the run yet."""

BEFORE_RUNNING: Final = WAITING | {_S.BUILDING, _S.MOUNTING}
"""The command has not been executed under this attempt."""


class Cause(StrEnum):
    """Why a run ended, or was asked to end, in a way its command did not decide."""

    USER = "user"
    WORKFLOW = "workflow"
    TIMEOUT = "timeout"
    BUILD = "build"
    MOUNT = "mount"
    WORLD = "world"
    OUTPUTS = "outputs"
    LOG = "log"
    OUT_OF_MEMORY = "likely_out_of_memory"
    AGENT_LOST = "agent_lost"
    HELPER_LOST = "helper_lost"
    MACHINE_RESTARTED = "machine_restarted"


class Mount(Struct, frozen=True):
    """A resource at a place in a run's world, read-only.

    `tree` and `path` name what is mounted (a saved tree and a place in it, "" for all of it), so
    that the content is fixed when the run is created.
    """

    resource: str
    target: str
    tree: str
    path: str = ""


class RunSpec(Struct, frozen=True, omit_defaults=True):
    """What was asked for. Never changes after the run is created."""

    command: str
    machine_type: str = DEFAULT_MACHINE_TYPE
    description: str = ""
    environment_vars: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    cwd: str = ""
    snapshot: str | None = None
    git_commit_hash: str = ""
    repository: str = ""
    timeout_minutes: float | None = None
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    master: bool = False

    @property
    def queue(self) -> str:
        """The queue whose slots serve this run: its machine type's, or the masters'."""
        return MASTER_QUEUE if self.master else machine_type_key(self.machine_type)


class Reached(Struct, frozen=True, array_like=True):
    """A status the run was in, and since when."""

    status: Status
    version: int
    at: datetime


class Run(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The state of one run. Made by folding its events; `version` is the last one's."""

    id: int
    owner: str
    spec: RunSpec
    status: Status
    version: int
    attempt: int
    created_at: datetime
    schema: int = SCHEMA
    workflow: int | None = None
    labels: tuple[str, ...] = ()
    history: tuple[Reached, ...] = ()
    agent: str | None = None
    slot: str | None = None
    claim: str | None = None
    token_hash: str | None = None
    cause: Cause | None = None
    reason: str = ""
    stop_requested: bool = False
    stop_grace_seconds: float | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    user_exit_code: int | None = None
    outputs: str | None = None
    outputs_files: int = 0
    outputs_bytes: int = 0
    lost_at: datetime | None = None
    due_at: datetime | None = None
    late_exit_code: int | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def grace_seconds(self) -> float:
        """From SIGTERM to SIGKILL when the run is stopped."""
        asked = self.stop_grace_seconds
        return self.spec.grace_seconds if asked is None else asked


class Workflow(Struct, frozen=True):
    """A master run and the worker runs launched in its name."""

    id: int
    owner: str
    managing_run: int
    created_at: datetime
    schema: int = SCHEMA


def machine_type_key(name: str) -> str:
    """The one spelling of a machine type: names are case-insensitive."""
    return name.strip().lower()


def parse_number(text: str) -> int | None:
    """The number that `text` writes in digits, 0 to MAX_NUMBER; None when it is none."""
    # Its length is looked at first: int() refuses thousands of digits, with an error of its own.
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(MAX_NUMBER)):
        return None
    number = int(text)
    return number if number <= MAX_NUMBER else None


def reached(run: Run, statuses: Iterable[Status]) -> Status | None:
    """The first of `statuses` the run has been in, from its history, or None."""
    wanted = frozenset(statuses)
    return next((then.status for then in run.history if then.status in wanted), None)
