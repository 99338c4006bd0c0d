"""What clients get back: log entries, events, and the fields of a run."""

from datetime import datetime
from typing import Any

from msgspec import Struct

from spellq.wire import EventMessage, LogLine, RunView
from spellq_sdk.statuses import FINAL_WORDS


class LogEntry(Struct, frozen=True, kw_only=True, gc=False):
    """One line of a run's log; `str()` of it is the text alone.

    `status` is the status in force; `status_event` is True for the runtime's own line about a
    status and None for others; `timestamp` is an ISO 8601 string; `offset` is the line's place in
    the log, counted from 0; a `continued` one is not the last of its line
    (very long lines are split).
    """

    status: str
    log: str
    timestamp: str
    status_event: bool | None = None
    level: str | None = None
    important: bool = False
    offset: int = 0
    continued: bool = False

    def __str__(self) -> str:
        return self.log


def log_entry(line: LogLine) -> LogEntry:
    """The entry of a line as the gateway sends it."""
    entry = line.entry
    return LogEntry(
        status=entry.status.value,
        log=entry.log,
        timestamp=entry.at.isoformat(),
        status_event=True if entry.status_event else None,
        level=entry.level,
        important=entry.important,
        offset=line.offset,
        continued=entry.continued,
    )


class RunEvent(Struct, frozen=True, kw_only=True):
    """One change of one run.

    Within a run, events come in the order of `version`, none missing and none twice. `cursor` is
    the place after this event: give it to `events(after=…)` to go on from here.
    """

    run: int
    version: int
    type: str
    status: str
    at: datetime
    attempt: int
    owner: str
    workflow: int | None
    cause: str | None
    data: dict[str, Any]
    cursor: str


def run_event(message: EventMessage) -> RunEvent | None:
    """The event in a socket message, or None where it only moves the cursor."""
    view = message.event
    if view is None:
        return None
    return RunEvent(
        run=view.run,
        version=view.version,
        type=view.type.value,
        status=view.status.value,
        at=view.at,
        attempt=view.attempt,
        owner=view.owner,
        workflow=view.workflow,
        cause=view.cause.value if view.cause else None,
        data=view.data,
        cursor=message.cursor,
    )


class LsLine(Struct, frozen=True):
    """A row of a listing; folders end in `/` and have no size. `date` is an ISO 8601 string."""

    path: str
    size: int | None = None
    date: str | None = None
    additional_info: str | None = None
    link_target: str | None = None


class ValueSpec(Struct, frozen=True):
    """The values a parameter of a hyperparameter search takes."""

    values: list[Any]


class RangeSpec(Struct, frozen=True):
    """The range a parameter of a hyperparameter search is drawn from."""

    min: float
    max: float
    scaling: str = "linear"
    type: str = "float"


class User(Struct, frozen=True):
    """Who launched a run."""

    user_name: str

    def __str__(self) -> str:
        return self.user_name


class RunFields:
    """A run as it was when last fetched. Nothing changes until `refresh()`.

    Times are datetimes with a time zone, or None. `gpu` is the machine type. Of environment
    variables only the names are known to clients: the values are empty. `cause` and `reason` say
    why a run ended otherwise than by its command. Fields of Spell's that have no meaning in this
    version keep their empty value.
    """

    def __init__(self, view: RunView) -> None:
        self._load(view)

    def _load(self, view: RunView) -> None:
        self.id = view.id
        self.status = view.status.value
        self.user_exit_code = view.user_exit_code
        self.command = view.command
        self.creator = User(view.owner)
        self.gpu = view.machine_type
        self.git_commit_hash = view.git_commit_hash
        self.github_url: str | None = None
        self.description = view.description
        self.docker_image: str | None = None
        self.created_at = view.created_at
        self.started_at = view.started_at
        self.ended_at = view.ended_at
        self.project: None = None
        self.workspace: None = None
        self.pip_env_packages: list[str] = []
        self.requirements_file: str | None = None
        self.pip_packages: list[str] = []
        self.apt_packages: list[str] = []
        self.conda_env_file: str | None = None
        self.attached_resources = dict(view.attached_resources)
        self.environment_vars = dict.fromkeys(view.environment_names, "")
        self.already_existed = False
        self.hyper_params: dict[str, Any] | None = None
        self.tensorboard_directory: str | None = None
        self.distributed: int | None = None
        self.resumed_as_run: int | None = None
        self.resumed_from_run: int | None = None
        self.labels = list(view.labels)
        self.cause = view.cause.value if view.cause else None
        self.reason = view.reason
        self.workflow = view.workflow
        self.master = view.master
        self.cwd = view.cwd
        self.repository = view.repository
        self.agent = view.agent
        self.attempt = view.attempt
        self.outputs_files = view.outputs_files
        self.outputs_bytes = view.outputs_bytes
        self.timeout = view.timeout_minutes

    @property
    def is_final(self) -> bool:
        """Whether the run had ended when it was last fetched."""
        return self.status in FINAL_WORDS

    def __repr__(self) -> str:
        shown = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if value and not name.startswith("_")
        )
        return f"{type(self).__name__}({', '.join(shown)})"
