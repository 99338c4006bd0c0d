"""The Protocols that rooms meet at. What a docstring promises, tests/conformance checks.

Every method may raise `StoreUnavailable` (the engine behind it is away; try again later). Nothing
else of a library ever comes through a port.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from msgspec import Struct

from spellq.events import Cursor, Event, Logged
from spellq.lifecycle import Command
from spellq.logs import LogEntry
from spellq.runs import Run, RunSpec, Status, Workflow

DUE_AT_ONCE: Final = 1000
LEASE_SECONDS: Final = 10.0
"""An agent that was not heard for that long is lost."""


class UnknownRun(LookupError):
    """There is no run of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"There is no run {number}.")
        self.number = number


class StoreUnavailable(Exception):
    """The engine behind a port cannot be reached or cannot write now.

    Nothing was changed, or all of it and only the answer was lost: then a repeat changes nothing.
    """


class StoreFull(StoreUnavailable):
    """The disk behind a port is full, or what is left of it is kept for the store itself.

    `wanted_bytes` is what the step would have written, where that is known.
    """

    def __init__(self, message: str, wanted_bytes: int = 0) -> None:
        super().__init__(message)
        self.wanted_bytes = wanted_bytes


class Clock(Protocol):
    """Time and chance, so that a simulated world can own both."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""

    def monotonic(self) -> float:
        """Seconds from some moment on; never goes back."""

    def fresh_id(self) -> str:
        """A string never given before, 128 random bits in hex."""


class NewRun(Struct, frozen=True):
    """A run to be created under a number allotted before."""

    number: int
    owner: str
    spec: RunSpec
    workflow: int | None = None
    labels: tuple[str, ...] = ()


class Committed(Struct, frozen=True):
    """What one atomic step made: the run, its new events in the log, its new length of log.

    Without `logged` the step changed nothing: it repeated an earlier one. Where the log is another
    engine than the store, the events have no cursors until they are read from there.
    """

    run: Run
    logged: tuple[Logged, ...] = ()
    log_length: int = 0
    outbox_key: int = 0


class RunQuery(Struct, frozen=True, kw_only=True):
    """Which runs to list, newest first. `before` is the page cursor: the last number seen.

    `labels` asks for any of them. `agent` finds the live runs an agent owns. `limit` None is all.
    """

    limit: int | None = 50
    before: int | None = None
    owner: str | None = None
    labels: tuple[str, ...] = ()
    workflow: int | None = None
    live: bool = False
    status: Status | None = None
    agent: str | None = None


class RunStore(Protocol):
    """The one source of truth about runs.

    `create` and `apply` are atomic: state, events, log lines and outbox entry are all there or
    none is. What they have returned survives the death of this process.
    """

    async def allot(self, kind: str, count: int, command_id: str) -> tuple[int, ...]:
        """`count` new numbers of a `kind` ("run", "workflow"), ascending; gaps are allowed.

        A repeat with the same command id within 24 hours gets the same numbers.
        """

    async def create(self, new: Sequence[NewRun]) -> list[Committed]:
        """Create each run that is absent; one that exists is returned as it is."""

    async def apply(self, number: int, commands: Sequence[Command]) -> Committed:
        """All commands in one atomic step, by `lifecycle.transitions`.

        Raises:
            UnknownRun: no such run.
            Refused: the table or the attempt forbids it; nothing was changed.
        """

    async def get(self, number: int) -> Run | None:
        """The run as last committed."""

    async def find(self, query: RunQuery) -> list[Run]:
        """The runs that match, newest first."""

    async def history(self, number: int, after_version: int = 0) -> list[Event]:
        """The run's own events above a version, in order, without a gap."""

    async def due(self, now: datetime) -> tuple[list[int], datetime | None]:
        """The runs whose deadline has come, and the earliest deadline after.

        At most `DUE_AT_ONCE` at a time; when there are more, the second is `now`.
        """

    async def owners(self) -> list[str]:
        """The agents that own a run which is not final, sorted."""

    async def create_workflow(self, workflow: Workflow) -> None:
        """Write the workflow if it is absent."""

    async def get_workflow(self, number: int) -> Workflow | None:
        """The workflow, or None."""

    async def unpublished(self, older_than_seconds: float) -> list[Committed]:
        """Steps committed longer ago than that and not struck: the relay publishes them.

        An entry is kept at least as long as any subscriber that could miss it.
        """

    async def strike(self, committed: Sequence[Committed]) -> None:
        """These were published; forget their outbox entries."""


class LogStore(Protocol):
    """Each run's log: a sequence of entries with dense offsets from 0."""

    async def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        """Append agent's entries; returns the log's new length. Entries keep their order.

        Entries whose `raw_end` is not beyond what the log has reached repeat an earlier append,
        whose answer was lost: nothing changes.
        """

    async def read(self, number: int, offset: int, limit: int = 1000) -> list[LogEntry]:
        """At most `limit` entries from `offset` on; at least one if there is one."""

    async def log_state(self, number: int) -> tuple[int, int]:
        """(length in entries, place in the raw output the last append reached, in bytes)."""


class AgentInfo(Struct, frozen=True):
    """An agent as it presents itself; `id` is new with every incarnation.

    While it claims nothing, `lack` is what it waits for: `disk space: 1 MiB free, …`.
    """

    id: str
    name: str
    slots: dict[str, int]
    version: str
    lack: str = ""


class Leases(Protocol):
    """Which agents are alive. Memory or a TTL key, never a durable row."""

    async def renew(self, agent: AgentInfo, lease_seconds: float) -> int:
        """Hold the lease; returns the counter that grows when the agent shall look again.

        It has grown, too, when the lease had run out meanwhile.
        """

    async def release(self, agent: str) -> None:
        """The agent leaves in good order."""

    async def agents(self) -> list[AgentInfo]:
        """The agents whose lease is held."""

    async def nudge(self, agent: str) -> None:
        """Grow the agent's counter: something is wanted of its runs."""


class Token(Struct, frozen=True):
    """Who may come in with a token. Only the SHA-256 of the token is stored."""

    owner: str
    name: str
    scope: str
    created_at: datetime


class Tokens(Protocol):
    async def put_token(self, token_hash: str, token: Token) -> None:
        """Remember the token."""

    async def get_token(self, token_hash: str) -> Token | None:
        """Whose token has this hash, or None."""


class EventLog(Protocol):
    """Every event, in one order, each at a cursor."""

    async def head(self) -> Cursor:
        """The place after the newest event."""

    async def events_after(self, cursor: Cursor, limit: int = 1000) -> list[Logged]:
        """The events after a cursor, oldest first; none missed of those before the latest `head`.

        Raises:
            ValueError: no cursor of this log.
        """


class Store(RunStore, LogStore, Leases, Tokens, Protocol):
    """All that one engine keeps of the present. The log of events may be kept by another."""

    async def close(self) -> None:
        """Finish what was asked for, then let go of the engine."""


class Ticket(Struct, frozen=True):
    """The queued message that offers a run to agents."""

    run: int
    attempt: int
    queue: str


class Delivery(Protocol):
    """A ticket handed to one consumer. Unless acknowledged it is offered again."""

    @property
    def ticket(self) -> Ticket: ...

    async def ack(self) -> None:
        """The ticket is done with: its run is claimed, or does not want it any more."""


class TicketSource(Protocol):
    """One slot's view of a queue: at most one unacknowledged delivery at a time."""

    async def take(self) -> Delivery:
        """Wait for a ticket. Cancelled while waiting, it takes none."""


class Bus(Protocol):
    """Carries what was committed. Messages may come late, twice and out of order."""

    async def publish(self, committed: Sequence[Committed]) -> None:
        """Tell every listener; returns once the events cannot be lost on the way to the log."""

    async def offer(self, tickets: Sequence[Ticket]) -> None:
        """Queue the tickets; returns once the queue owns them."""

    def consume(self, queue: str) -> AbstractAsyncContextManager[TicketSource]:
        """Take part in a queue: its tickets go to whichever consumer is free, oldest first.

        Left in good order, an unacknowledged delivery can still be acknowledged; left by an error
        or cancelled, it is offered again.
        """

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Logged]]]:
        """What comes into the log from now on. A listener that falls behind holds nobody up.

        Events may lack, come twice or out of order: the reader repairs that from the store.
        """

    def log_grew(self, number: int, length: int) -> None:
        """A hint that a run's log has entries below `length`; may be lost."""

    def log_lengths(self) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, int]]]:
        """The hints of `log_grew` as (run, length), coalesced."""

    async def hint(self, agent: str) -> None:
        """Tell an agent to look at what is wanted of its runs; may be lost."""

    def hints(self, agent: str) -> AbstractAsyncContextManager[AsyncIterator[None]]:
        """The hints for one agent, coalesced."""


class ArtifactStore(Protocol):
    """Immutable contents under their SHA-256 (hex). Each content is kept once."""

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those that are not here."""

    async def put(self, sha256: str, content: AsyncIterator[bytes]) -> int:
        """Store a stream; returns its size. It is there whole and verified, or not at all.

        Raises:
            ValueError: the content's hash is another one; nothing is kept.
        """

    async def put_bytes(self, data: bytes) -> str:
        """Store a small content; returns its hash."""

    async def put_all(self, contents: Sequence[bytes]) -> list[str]:
        """Store several small contents; returns their hashes, in order."""

    async def adopt(
        self, files: Sequence[BinaryIO], *, copy: bool = False
    ) -> list[tuple[str, int]]:
        """Store the contents of files that are open for reading; returns hash and size of each.

        Repeating it gives the same answer. A file itself may become the stored one, with its
        mode changed, if it has a single name: nobody may write to it any more, and its owner
        removes that name when it likes. With `copy`, others may write to them: what is stored is
        what was read, and the files stay as they are.

        Raises:
            ValueError: one is no regular file; none is stored.
        """

    async def get_bytes(self, sha256: str) -> bytes:
        """A small content whole. Raises KeyError where there is none."""

    async def open(self, sha256: str) -> AsyncIterator[bytes]:
        """The content in pieces. Raises KeyError where there is none."""

    async def local_paths(self, hashes: Sequence[str]) -> list[Path]:
        """Read-only files on this machine with the contents. Raises KeyError where one is missing.

        Their bytes never change; who needs them writable copies them.
        """


class WorldError(Exception):
    """A run's world cannot be made; the message names what is missing and its remedy."""

    def __init__(self, message: str, *, mount: bool = False) -> None:
        super().__init__(message)
        self.mount = mount


class ExecutionLost(Exception):
    """The helper that held the command is gone; nobody can tell how the command ended."""


class WorldMount(Struct, frozen=True):
    """A host path at a place in the world, read-only."""

    source: str
    target: str


class Job(Struct, frozen=True, kw_only=True):
    """All an executor needs to know to execute one attempt of one run."""

    run: int
    attempt: int
    slot: str
    command: str
    cwd: str
    environment: dict[str, str]
    code: str | None = None
    mounts: tuple[WorldMount, ...] = ()


class Exit(Struct, frozen=True, kw_only=True):
    """How a command ended. `code` is the shell's exit status, 128 + signal where one ended it.

    `out_of_memory`: the kernel likely killed it (137) for lack of memory.
    """

    code: int
    signal: int | None
    started_at: datetime
    ended_at: datetime
    out_of_memory: bool = False


class Execution(Protocol):
    """One attempt in its world, from before its command starts until it is discarded."""

    @property
    def run(self) -> int: ...

    @property
    def attempt(self) -> int: ...

    @property
    def slot(self) -> str: ...

    @property
    def output(self) -> "os.PathLike[str]":
        """The file that stdout and stderr are appended to."""

    @property
    def files(self) -> "os.PathLike[str]":
        """The folder with what the command made below /spell; complete once it has ended.

        The command was a stranger's: its names may be anything, and who it gave a descriptor of
        the folder to may still change what is in it (spellq_workers.runfolder.may_be_held).
        """

    async def start(self) -> None:
        """Execute the command. Returns once it is certain that it started.

        A command starts at most once, whatever is repeated. After `stop` or `kill` nothing is
        executed: the command has ended then, by SIGTERM (143) or SIGKILL (137), which `ended` says
        at once. That holds for one an earlier agent stopped or killed, too.

        Raises:
            ExecutionLost: nobody can tell whether it started.
            WorldError: it cannot be started, and nothing was executed.
        """

    async def ended(self) -> Exit:
        """Wait for the end of the command and of every process it left.

        Raises:
            ExecutionLost: the helper is gone and left no journal.
        """

    async def stop(self, grace_seconds: float) -> None:
        """Ask the command to end (SIGTERM to its process group), kill it after the grace.

        The group is given all of it, even where its shell ends at once; what is not of the group
        dies with it. Asked again, whichever grace ends first counts.

        Before `start` it keeps the command from being executed. Where the helper is gone or does
        not answer, this returns all the same: `ended` tells what became of the command.
        """

    async def kill(self) -> None:
        """Kill every process of the world; else as `stop`."""

    async def discard(self) -> None:
        """The result is recorded: take the world down and remove its files.

        A command that still runs is killed before; one that was not started never will be.
        """


class Adopted(Struct, frozen=True):
    """An execution found again after a restart of the agent.

    `started`: its command was executed. Not `held`: no helper holds it and it left no journal, so
    what has not started never will, and how it ended nobody can tell. `exit`: how it has ended.
    """

    execution: Execution
    started: bool
    held: bool = True
    exit: Exit | None = None


class Executor(Protocol):
    """Executes commands, each in a world of its own, so that they outlive the agent."""

    async def prepare(self, job: Job) -> Execution:
        """Make the world; nothing of the command is executed yet.

        Raises:
            WorldError: it cannot be made.
        """

    async def adopt(self) -> list[Adopted]:
        """What an earlier agent of this home left: running, or ended and not yet reported."""

    async def close(self) -> None:
        """Leave everything running and let go of it."""
