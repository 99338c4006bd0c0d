"""What goes over the wire between clients and the gateway: requests, views, socket messages."""

from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct, field

from spellq.events import Cursor, Event, EventFilter, EventType
from spellq.logs import LogEntry
from spellq.runs import (
    DEFAULT_GRACE_SECONDS,
    DEFAULT_MACHINE_TYPE,
    MAX_NUMBER,
    Cause,
    Run,
    Status,
    Workflow,
)

IDEMPOTENCY_HEADER: Final = "Idempotency-Key"

Number = Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
"""The number of a run or workflow, or of a request on the socket."""


class RunRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """POST /api/runs: launch a worker run."""

    command: str
    machine_type: str = DEFAULT_MACHINE_TYPE
    description: str = ""
    environment_vars: dict[str, str] = field(default_factory=dict)
    attached_resources: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    cwd: str = ""
    snapshot: str | None = None
    git_commit_hash: str = ""
    repository: str = ""
    timeout_minutes: float | None = None
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    workflow_id: Number | None = None


class RunBatch(Struct, frozen=True):
    """POST /api/runs/batch: launch several; all are launched or (an error) none."""

    runs: list[RunRequest]


class WorkflowRequest(Struct, frozen=True):
    """POST /api/workflows: launch a master run in a workflow of its own."""

    run: RunRequest


class LabelRequest(Struct, frozen=True):
    """POST /api/runs/N/labels."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


class RunView(Struct, frozen=True, kw_only=True):
    """A run as clients see it. Of environment variables only the names are shown."""

    id: int
    status: Status
    version: int
    attempt: int
    command: str
    machine_type: str
    owner: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    user_exit_code: int | None
    cause: Cause | None
    reason: str
    description: str
    git_commit_hash: str
    repository: str
    cwd: str
    attached_resources: dict[str, str]
    environment_names: list[str]
    labels: list[str]
    workflow: int | None
    master: bool
    agent: str | None
    outputs_files: int
    outputs_bytes: int
    timeout_minutes: float | None


class RunPage(Struct, frozen=True):
    """A list of runs, newest first; `next` asks for the page after (as `before`)."""

    runs: list[RunView]
    next: int | None = None


class RunReply(Struct, frozen=True):
    """A run, and whether the request changed it."""

    run: RunView
    changed: bool = True


class WorkflowView(Struct, frozen=True):
    id: int
    owner: str
    created_at: datetime
    managing_run: RunView
    runs: list[RunView]


class LogLine(Struct, frozen=True, omit_defaults=True, gc=False):
    """One line of GET /api/runs/N/logs (JSON lines): the entry and its offset."""

    offset: int
    entry: LogEntry


class LsEntry(Struct, frozen=True):
    """A row of GET /api/resources/ls: a file, or (path ends in /) a folder without a size."""

    path: str
    size: int | None
    date: datetime | None
    info: str = ""
    link: str | None = None


class LsReply(Struct, frozen=True):
    entries: list[LsEntry]


class Hashes(Struct, frozen=True):
    """POST /api/artifacts/missing: asks with hashes and is answered with those not stored."""

    hashes: list[str]


class TreeReply(Struct, frozen=True):
    id: str


class Me(Struct, frozen=True):
    """GET /api/me: who the token is, and what it talks to."""

    owner: str
    scope: str
    version: str
    machine_types: dict[str, int]
    live_runs: int


class ErrorReply(Struct, frozen=True):
    """The body of every answer above 399."""

    error: str
    status: int


class Wait(Struct, frozen=True, tag_field="op", tag="wait"):
    """Tell me when the run reaches one of the statuses, or ends elsewhere."""

    id: Number
    run: int
    statuses: tuple[Status, ...]


class Subscribe(Struct, frozen=True, tag_field="op", tag="events"):
    """Send me the events that match, from after the cursor (or from now on)."""

    id: Number
    filter: EventFilter = EventFilter()
    after: Cursor | None = None


class AnyRequest(Struct, frozen=True):
    """What every message of a client has, however wrong the rest of it is."""

    id: Number


class Cancel(Struct, frozen=True, tag_field="op", tag="cancel"):
    """Forget the request of that id."""

    id: Number


ClientMessage = Wait | Subscribe | Cancel


class Reached(Struct, frozen=True, tag_field="op", tag="reached"):
    """The run has been in that status."""

    id: int
    status: Status


class EndedElsewhere(Struct, frozen=True, tag_field="op", tag="ended"):
    """The run ended without reaching any of the statuses."""

    id: int
    status: Status


class EventView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event as clients see it."""

    run: int
    version: int
    type: EventType
    status: Status
    at: datetime
    attempt: int
    owner: str
    workflow: int | None = None
    cause: Cause | None = None
    data: dict[str, Any] = field(default_factory=dict)


class EventMessage(Struct, frozen=True, tag_field="op", tag="event"):
    """One event of a subscription. An event without `event` only moves the cursor."""

    id: int
    cursor: Cursor
    event: EventView | None = None


class RequestFailed(Struct, frozen=True, tag_field="op", tag="error"):
    """The request of that id cannot be served; `status` is what HTTP would have answered.

    The id is 0 for a message without a usable one.
    """

    id: int
    status: int
    error: str


ServerMessage = Reached | EndedElsewhere | EventMessage | RequestFailed


def run_view(run: Run) -> RunView:
    spec = run.spec
    return RunView(
        id=run.id,
        status=run.status,
        version=run.version,
        attempt=run.attempt,
        command=spec.command,
        machine_type=spec.machine_type,
        owner=run.owner,
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=run.ended_at,
        user_exit_code=run.user_exit_code,
        cause=run.cause,
        reason=run.reason,
        description=spec.description,
        git_commit_hash=spec.git_commit_hash,
        repository=spec.repository,
        cwd=spec.cwd,
        attached_resources={mount.resource: mount.target for mount in spec.mounts},
        environment_names=sorted(spec.environment_vars),
        labels=list(run.labels),
        workflow=run.workflow,
        master=spec.master,
        agent=run.agent,
        outputs_files=run.outputs_files,
        outputs_bytes=run.outputs_bytes,
        timeout_minutes=spec.timeout_minutes,
    )


def workflow_view(workflow: Workflow, managing_run: Run, runs: list[Run]) -> WorkflowView:
    return WorkflowView(
        id=workflow.id,
        owner=workflow.owner,
        created_at=workflow.created_at,
        managing_run=run_view(managing_run),
        runs=[run_view(run) for run in runs],
    )


_PUBLIC_DATA: Final = frozenset(
    {"labels", "reason", "started_at", "ended_at", "user_exit_code", "outputs_files",
     "outputs_bytes", "stop_grace_seconds", "lost_at", "late_exit_code", "agent"}
)  # fmt: skip


def event_view(event: Event) -> EventView:
    """The event without what is the runtime's own: token hashes, claims, sealed values."""
    data = {name: value for name, value in event.data.items() if name in _PUBLIC_DATA}
    if event.type is EventType.RUN_CREATED:
        spec = msgspec.to_builtins(event.data["spec"])
        data |= {
            name: spec[name]
            for name in ("command", "machine_type", "description", "master")
            if name in spec
        }
        data["environment_names"] = sorted(spec.get("environment_vars", ()))
    return EventView(
        run=event.run,
        version=event.version,
        type=event.type,
        status=event.status,
        at=event.at,
        attempt=event.attempt,
        owner=event.owner,
        workflow=event.workflow,
        cause=event.cause,
        data=data,
    )
