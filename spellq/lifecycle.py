"""How a run moves: one pure function from (run, command) to (run, events, log lines).

Stores call it inside their atomic step; nothing else changes a run.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from msgspec import Struct

from spellq.events import Event, EventType, changed
from spellq.logs import LogEntry, ending_lines, status_line
from spellq.runs import (
    BEFORE_RUNNING,
    LIFECYCLE,
    WAITING,
    Cause,
    Run,
    RunSpec,
    Status,
    machine_type_key,
)


class Refused(Exception):
    """The command does not apply: against the table, or of an attempt that is over.

    `run` is the state as it stands; nothing was changed.
    """

    def __init__(self, run: Run, why: str) -> None:
        super().__init__(why)
        self.run = run


class Claim(Struct, frozen=True):
    """An agent takes a waiting run into one of its slots. `claim` is unique to this try."""

    attempt: int
    agent: str
    slot: str
    claim: str
    token_hash: str | None = None


class Advance(Struct, frozen=True):
    """The agent reports the next status of a run it owns, and what it says about it in the log."""

    attempt: int
    status: Status
    lines: tuple[str, ...] = ()


class End(Struct, frozen=True):
    """The agent reports how a run ended.

    Without `status` the ending follows from the run's own state: `killed` when it was being
    killed, `stopped` when a stop was asked for before the command ended, else `complete`.
    """

    attempt: int
    status: Status | None = None
    user_exit_code: int | None = None
    outputs: str | None = None
    outputs_files: int = 0
    outputs_bytes: int = 0
    cause: Cause | None = None
    reason: str = ""


class Requeue(Struct, frozen=True):
    """A claimed run whose command was not executed waits again, as the next attempt."""

    attempt: int
    reason: str


class Stop(Struct, frozen=True):
    """End the command and save its outputs. Before it runs this is a kill.

    `grace_seconds` is in place of the grace the run was launched with; a later stop may shorten it.
    """

    cause: Cause = Cause.USER
    reason: str = ""
    grace_seconds: float | None = None


class Kill(Struct, frozen=True):
    """End the command at once; outputs are lost."""

    cause: Cause = Cause.USER
    reason: str = ""


class Label(Struct, frozen=True):
    """Add and remove labels; allowed after the end too."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


class Lose(Struct, frozen=True):
    """The run's agent fell silent; unless found, the run is given up `after_seconds` later."""

    agent: str
    after_seconds: float


class Find(Struct, frozen=True):
    """The run's agent is heard again, perhaps as a new incarnation that found the run's helper."""

    attempt: int
    agent: str


class Expire(Struct, frozen=True):
    """Do what is due: give a lost run up, or stop one that is past its timeout."""


Command = (
    Claim | Advance | End | Requeue | Stop | Kill | Label | Lose | Find | Expire
)  #: everything that may be asked of a run


class Step(Struct, frozen=True):
    """What a command made of a run. Without events nothing changed: a repeat, or nothing to do."""

    run: Run
    events: tuple[Event, ...] = ()
    lines: tuple[LogEntry, ...] = ()


def create(
    number: int,
    owner: str,
    spec: RunSpec,
    at: datetime,
    *,
    workflow: int | None = None,
    labels: Sequence[str] = (),
) -> Step:
    """A new run, waiting for a machine of its type."""
    waiting_for = f"Waiting for a free {machine_type_key(spec.machine_type)} slot."
    if spec.master:
        waiting_for = "Waiting for a free slot for masters."
    blank = Run(
        id=number,
        owner=owner,
        spec=spec,
        status=Status.MACHINE_REQUESTED,
        version=0,
        attempt=1,
        created_at=at,
        workflow=workflow,
    )
    moves = _Moves(blank, at)
    moves.add(
        EventType.RUN_CREATED,
        Status.MACHINE_REQUESTED,
        spec=spec,
        labels=tuple(dict.fromkeys(labels)),
        reason=waiting_for,
    )
    if spec.master and workflow is not None:
        moves.add(EventType.WORKFLOW_CREATED)
    moves.say(f"Run created -- waiting for a {spec.machine_type} machine.")
    return moves.step()


def transition(run: Run, command: Command, at: datetime) -> Step:
    """`run` after `command`, the events that tell of it, and the log lines that go with them.

    A repeat of a command already applied gives the run as it is, without events.

    Raises:
        Refused: the lifecycle table or the attempt forbids it.
    """
    moves = _Moves(run, at)
    _HANDLERS[type(command)](moves, command)
    return moves.step()


def transitions(run: Run, commands: Sequence[Command], at: datetime) -> Step:
    """Several commands as one step: all of them, or (Refused) none."""
    moves = _Moves(run, at)
    for command in commands:
        _HANDLERS[type(command)](moves, command)
    return moves.step()


class _Moves:
    """The run on its way through one step, with the events and lines so far."""

    def __init__(self, run: Run, at: datetime) -> None:
        self.run = run
        self.at = at
        self.events: list[Event] = []
        self.lines: list[LogEntry] = []

    def add(self, kind: EventType, status: Status | None = None, **changes: Any) -> None:
        run = self.run
        event = Event(
            run=run.id,
            version=run.version + 1,
            owner=run.owner,
            attempt=changes.pop("attempt", run.attempt),
            type=kind,
            status=status or run.status,
            at=self.at,
            workflow=run.workflow,
            cause=changes.get("cause", run.cause),
            data=changes,
        )
        self.events.append(event)
        self.run = changed(run, event, changes)

    def enter(self, status: Status, **changes: Any) -> None:
        if status not in LIFECYCLE[self.run.status]:
            raise Refused(
                self.run, f"run {self.run.id} is {self.run.status} and cannot become {status}"
            )
        if self.run.lost_at is not None:
            changes.setdefault("lost_at", None)
            changes.setdefault("due_at", None)
        self.add(EventType.RUN_STATUS, status, **changes)
        line = status_line(status)
        if line:
            self.say(line)

    def finish(self, status: Status, **changes: Any) -> None:
        self.enter(status, ended_at=self.at, due_at=None, lost_at=None, token_hash=None, **changes)
        self.lines.extend(ending_lines(self.run))

    def say(self, text: str) -> None:
        self._add_line(text, status_event=True, level="info")

    def note(self, text: str) -> None:
        self._add_line(text)

    def _add_line(self, text: str, *, status_event: bool = False, level: str | None = None) -> None:
        run = self.run
        self.lines.append(
            LogEntry(
                status=run.status,
                log=text,
                at=self.at,
                status_event=status_event,
                level=level,
                version=run.version,
            )
        )

    def step(self) -> Step:
        return Step(self.run, tuple(self.events), tuple(self.lines))


def _same_attempt(moves: _Moves, attempt: int) -> None:
    if attempt != moves.run.attempt:
        raise Refused(
            moves.run,
            f"attempt {attempt} of run {moves.run.id} is over; it is at {moves.run.attempt}",
        )


def _passed(run: Run, status: Status) -> bool:
    """Whether this attempt has been in `status`."""
    for then in reversed(run.history):
        if then.status is status:
            return True
        if then.status in WAITING:
            return False
    return False


def _claim(moves: _Moves, command: Claim) -> None:
    run = moves.run
    _same_attempt(moves, command.attempt)
    if run.claim == command.claim:
        return
    if run.status is not Status.MACHINE_REQUESTED:
        raise Refused(run, f"run {run.id} is {run.status}, not waiting")
    moves.enter(
        Status.BUILDING,
        agent=command.agent,
        slot=command.slot,
        claim=command.claim,
        token_hash=command.token_hash,
        reason="",
    )


def _advance(moves: _Moves, command: Advance) -> None:
    _same_attempt(moves, command.attempt)
    if _passed(moves.run, command.status):
        return
    if command.status is Status.RUNNING:
        timeout = moves.run.spec.timeout_minutes
        moves.enter(
            Status.RUNNING,
            started_at=moves.at,
            due_at=moves.at + timedelta(minutes=timeout) if timeout else None,
        )
    elif command.status is Status.SAVING:
        moves.enter(Status.SAVING, due_at=None)
    else:
        moves.enter(command.status)
    for line in command.lines:
        moves.note(line)


def _end(moves: _Moves, command: End) -> None:
    run = moves.run
    _same_attempt(moves, command.attempt)
    if run.is_final:
        _late(moves, command)
        return
    changes: dict[str, Any] = {"cause": command.cause, "reason": command.reason}
    if run.status is Status.KILLING:
        moves.finish(Status.KILLED)
        return
    if command.status is None and run.stop_requested:
        status, changes = Status.STOPPED, {}
    else:
        status = command.status or Status.COMPLETE
    moves.finish(
        status,
        user_exit_code=command.user_exit_code,
        outputs=command.outputs,
        outputs_files=command.outputs_files,
        outputs_bytes=command.outputs_bytes,
        **{name: value for name, value in changes.items() if value},
    )


def _late(moves: _Moves, command: End) -> None:
    """A result that comes after the run was given up is kept; the status stays."""
    run = moves.run
    given_up = run.cause in (Cause.AGENT_LOST, Cause.HELPER_LOST)
    if given_up and run.late_exit_code is None and command.user_exit_code is not None:
        moves.add(EventType.RUN_LATE, late_exit_code=command.user_exit_code)


def _requeue(moves: _Moves, command: Requeue) -> None:
    run = moves.run
    if run.attempt == command.attempt + 1 and run.status in BEFORE_RUNNING:
        return
    _same_attempt(moves, command.attempt)
    if run.status is Status.KILLING:
        moves.finish(Status.KILLED)
        return
    moves.enter(
        Status.MACHINE_REQUESTED,
        attempt=run.attempt + 1,
        agent=None,
        slot=None,
        claim=None,
        token_hash=None,
        reason=command.reason,
        lost_at=None,
        due_at=None,
    )
    moves.say(f"{command.reason} Waiting for a {run.spec.machine_type} machine again.")


def _stop(moves: _Moves, command: Stop) -> None:
    run = moves.run
    grace = command.grace_seconds
    if run.status in BEFORE_RUNNING:
        _kill(moves, Kill(command.cause, command.reason))
    elif run.status is Status.RUNNING:
        moves.enter(
            Status.STOPPING,
            stop_requested=True,
            cause=command.cause,
            reason=command.reason,
            due_at=None,
            **({} if grace is None else {"stop_grace_seconds": grace}),
        )
    elif run.status is Status.STOPPING and grace is not None and grace < run.grace_seconds:
        moves.add(EventType.RUN_HURRIED, stop_grace_seconds=grace)


def _kill(moves: _Moves, command: Kill) -> None:
    run = moves.run
    if run.is_final or run.status is Status.KILLING:
        return
    ownerless = run.status in WAITING
    moves.enter(Status.KILLING, cause=command.cause, reason=command.reason, due_at=None)
    if ownerless:
        moves.finish(Status.KILLED)


def _label(moves: _Moves, command: Label) -> None:
    kept = (label for label in moves.run.labels if label not in command.remove)
    labels = tuple(dict.fromkeys((*kept, *command.add)))
    if labels != moves.run.labels:
        moves.add(EventType.RUN_LABEL, labels=labels)


def _lose(moves: _Moves, command: Lose) -> None:
    run = moves.run
    if run.agent != command.agent or run.is_final or run.lost_at is not None:
        return
    moves.add(
        EventType.RUN_LOST,
        lost_at=moves.at,
        due_at=moves.at + timedelta(seconds=command.after_seconds),
    )


def _find(moves: _Moves, command: Find) -> None:
    run = moves.run
    _same_attempt(moves, command.attempt)
    if run.is_final:
        raise Refused(run, f"run {run.id} is {run.status}")
    if run.agent == command.agent and run.lost_at is None:
        return
    timeout = run.spec.timeout_minutes
    due = None
    if run.status is Status.RUNNING and timeout and run.started_at:
        due = run.started_at + timedelta(minutes=timeout)
    moves.add(EventType.RUN_FOUND, agent=command.agent, lost_at=None, due_at=due)


def _expire(moves: _Moves, command: Expire) -> None:
    run = moves.run
    if run.due_at is None or moves.at < run.due_at:
        return
    if run.lost_at is None:
        minutes = run.spec.timeout_minutes
        _stop(moves, Stop(Cause.TIMEOUT, f"The timeout of {minutes:g} minutes has passed."))
    elif run.status is Status.KILLING:
        moves.finish(Status.KILLED)
    elif run.status in BEFORE_RUNNING:
        _requeue(moves, Requeue(run.attempt, "The machine was lost."))
    else:
        moves.finish(
            Status.INTERRUPTED,
            cause=Cause.AGENT_LOST,
            reason=f"The machine of agent {run.agent} was lost.",
        )


_HANDLERS: Final[dict[type, Callable[[_Moves, Any], None]]] = {
    Claim: _claim,
    Advance: _advance,
    End: _end,
    Requeue: _requeue,
    Stop: _stop,
    Kill: _kill,
    Label: _label,
    Lose: _lose,
    Find: _find,
    Expire: _expire,
}
