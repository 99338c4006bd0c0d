"""The store of an embedded installation: SQLite for state and events, files for logs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from anyio import to_thread

from spellq.events import BEGINNING, Cursor, Event, Logged
from spellq.lifecycle import Command, Step, create, transitions
from spellq.logs import LogEntry, raw_end
from spellq.ports import (
    DUE_AT_ONCE,
    AgentInfo,
    Clock,
    Committed,
    NewRun,
    RunQuery,
    StoreUnavailable,
    Token,
    UnknownRun,
)
from spellq.runs import Run, RunSpec, Workflow
from spellq_brokers.embedded.entrylog import EntryLog, FileEntryLog, MemoryEntryLog
from spellq_brokers.embedded.outbox import MemoryOutbox
from spellq_brokers.embedded.schema import connector
from spellq_brokers.embedded.writer import InlineWriter, ThreadWriter, Transaction, Writer

T = TypeVar("T")

_REMEMBERED_SECONDS: Final = 24 * 3600.0
_EVENTS_KEPT_SECONDS: Final = 90 * 24 * 3600.0
_ENDED_IN_MEMORY: Final = 4096
_WORKFLOWS_IN_MEMORY: Final = 4096
_TIDY_EVERY: Final = 1000
_BLANK: Final = RunSpec(command="")

_encode = msgspec.msgpack.Encoder().encode
_decode_run = msgspec.msgpack.Decoder(Run).decode
_decode_spec = msgspec.msgpack.Decoder(RunSpec).decode
_decode_event = msgspec.msgpack.Decoder(Event).decode
_decode_lines = msgspec.msgpack.Decoder(list[LogEntry]).decode
_decode_workflow = msgspec.msgpack.Decoder(Workflow).decode
_decode_token = msgspec.msgpack.Decoder(Token).decode


class SqliteStore:
    """Implements `spellq.ports.Store` for one process.

    Leases and the outbox live in memory: whoever would miss what they hold dies with this process.
    """

    def __init__(self, writer: Writer, clock: Clock, log: EntryLog) -> None:
        self._writer = writer
        self._clock = clock
        self._log = log
        self._live: dict[int, Run] = {}
        self._ended: OrderedDict[int, Run] = OrderedDict()
        self._workflows: OrderedDict[int, Workflow] = OrderedDict()
        self._epoch = ""
        self._last_event = 0
        self._steps = 0
        self._outbox = MemoryOutbox(clock)
        self._leases: dict[str, tuple[AgentInfo, float]] = {}
        self._counters: dict[str, int] = {}
        self._nudges = 0

    @classmethod
    async def open(cls, home: Path, clock: Clock) -> "SqliteStore":
        """The store kept in the folder `home`, made if there is none yet.

        Raises:
            WrongSchema: it was written by another version.
            sqlite3.DatabaseError: the file is no database, or a damaged one.
        """
        connect = connector(home / "state.db")
        writing = await to_thread.run_sync(connect)
        reading = await to_thread.run_sync(connect)
        log = FileEntryLog(home / "logs", lambda number: _step_lines(writing, number))
        return await cls.over(ThreadWriter(writing, reading), clock, log)

    @classmethod
    async def in_memory(cls, clock: Clock) -> "SqliteStore":
        """A store without threads or files, for a simulated world."""
        return await cls.over(InlineWriter(connector(None)()), clock, MemoryEntryLog())

    @classmethod
    async def over(cls, writer: Writer, clock: Clock, log: EntryLog) -> "SqliteStore":
        """A store on what a writer's database and a log hold already."""
        store = cls(writer, clock, log)
        await store._start()
        return store

    async def close(self) -> None:
        await self._writer.close()
        self._log.close()

    async def _start(self) -> None:
        def load(connection: Any) -> tuple[str, int, list[Run]]:
            (epoch,) = connection.execute("SELECT epoch FROM installation").fetchone()
            (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
            rows = connection.execute("SELECT spec, state FROM runs WHERE live")
            return epoch, last, [_run(*row) for row in rows]

        self._epoch, self._last_event, live = await self._writer.read(load)
        self._live = {run.id: run for run in live}

    def _forget_the_old(self, transaction: Transaction) -> None:
        """Every thousand launches, what nobody may ask for any more goes."""
        self._steps += 1
        if self._steps % _TIDY_EVERY != 1:
            return
        now = self._clock.now().timestamp()
        transaction.execute("DELETE FROM allotments WHERE at < ?", (now - _REMEMBERED_SECONDS,))
        transaction.execute(
            "DELETE FROM events WHERE at < ? AND id < ?",
            (now - _EVENTS_KEPT_SECONDS, self._last_event),
        )

    # Runs

    async def allot(self, kind: str, count: int, command_id: str) -> tuple[int, ...]:
        now = self._clock.now().timestamp()

        def step(transaction: Transaction) -> Callable[[], tuple[int, ...]]:
            self._forget_the_old(transaction)
            row = transaction.execute(
                "SELECT numbers FROM allotments WHERE command_id = ?", (f"{kind} {command_id}",)
            ).fetchone()
            if row is not None:
                numbers = tuple(msgspec.json.decode(row[0], type=list[int]))
                return lambda: numbers
            (last,) = transaction.execute(
                "INSERT INTO numbers VALUES (?, ?) "
                "ON CONFLICT (kind) DO UPDATE SET last = last + excluded.last RETURNING last",
                (kind, count),
            ).fetchone()
            numbers = tuple(range(last - count + 1, last + 1))
            transaction.execute(
                "INSERT INTO allotments VALUES (?, ?, ?)",
                (f"{kind} {command_id}", msgspec.json.encode(numbers).decode(), now),
            )
            return lambda: numbers

        return await self._writer.submit(step)

    async def create(self, new: Sequence[NewRun]) -> list[Committed]:
        at = self._clock.now()

        def step(transaction: Transaction) -> Callable[[], list[Committed]]:
            answers = [self._create(transaction, run, at) for run in new]
            return lambda: [answer() for answer in answers]

        return await self._writer.submit(step)

    def _create(
        self, transaction: Transaction, new: NewRun, at: datetime
    ) -> Callable[[], Committed]:
        known = self._load(transaction, new.number)
        if known is not None:
            return lambda: Committed(known)
        made = create(new.number, new.owner, new.spec, at, workflow=new.workflow, labels=new.labels)
        run = made.run
        transaction.execute(
            "INSERT INTO runs VALUES (?, ?, ?, 1, ?, ?, NULL, NULL, ?, ?)",
            (
                run.id,
                run.owner,
                run.status,
                run.workflow,
                run.spec.master,
                _encode(run.spec),
                _state(run),
            ),
        )
        return self._record(transaction, made, run)

    async def apply(self, number: int, commands: Sequence[Command]) -> Committed:
        at = self._clock.now()

        def step(transaction: Transaction) -> Callable[[], Committed]:
            run = self._load(transaction, number)
            if run is None:
                raise UnknownRun(number)
            made = transitions(run, commands, at)
            if not made.events:
                return lambda: Committed(made.run)
            after = made.run
            transaction.execute(
                "UPDATE runs SET status = ?, live = ?, agent = ?, due_at = ?, state = ? "
                "WHERE number = ?",
                (
                    after.status,
                    not after.is_final,
                    after.agent,
                    after.due_at.timestamp() if after.due_at else None,
                    _state(after),
                    number,
                ),
            )
            return self._record(transaction, made, run)

        return await self._writer.submit(step)

    def _record(self, transaction: Transaction, made: Step, before: Run) -> Callable[[], Committed]:
        """Write the step's events and lines, and the run to memory once that is durable."""
        run = made.run
        lines = _encode(made.lines) if made.lines else None
        logged: list[Logged] = []
        for place, event in enumerate(made.events, 1):
            self._last_event += 1
            last = place == len(made.events)
            transaction.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
                (
                    self._last_event,
                    event.run,
                    event.version,
                    event.at.timestamp(),
                    _encode(event),
                    lines if last else None,
                ),
            )
            logged.append(Logged(self._cursor(self._last_event), event))
        if run.labels != before.labels or (made.events[0].version == 1 and run.labels):
            transaction.execute("DELETE FROM labels WHERE number = ?", (run.id,))
            for label in run.labels:
                transaction.execute("INSERT INTO labels VALUES (?, ?)", (label, run.id))
        transaction.runs[run.id] = run
        committed = Committed(run, tuple(logged))

        def write_lines() -> None:
            nonlocal committed
            if made.events[0].version == 1:
                self._log.created(run.id)
            if made.lines:
                length = self._log.append_step(run.id, made.lines)
                committed = msgspec.structs.replace(committed, log_length=length)

        def keep() -> None:
            nonlocal committed
            self._keep(run)
            committed = self._outbox.add(committed)

        transaction.after_commit(write_lines)  # who sees that a run is final sees its last lines
        transaction.after_commit(keep)
        return lambda: committed

    def _keep(self, run: Run) -> None:
        if not run.is_final:
            self._live[run.id] = run
            return
        self._ended[run.id] = run
        self._ended.move_to_end(run.id)
        if len(self._ended) > _ENDED_IN_MEMORY:
            self._ended.popitem(last=False)
        self._live.pop(run.id, None)

    def _load(self, transaction: Transaction, number: int) -> Run | None:
        run = transaction.runs.get(number) or self._live.get(number) or self._ended.get(number)
        if run is not None:
            return run
        row = transaction.execute(
            "SELECT spec, state FROM runs WHERE number = ?", (number,)
        ).fetchone()
        return _run(*row) if row else None

    async def get(self, number: int) -> Run | None:
        run = self._live.get(number) or self._ended.get(number)
        if run is not None:
            return run

        def query(connection: Any) -> Run | None:
            row = connection.execute(
                "SELECT spec, state FROM runs WHERE number = ?", (number,)
            ).fetchone()
            return _run(*row) if row else None

        return await self._writer.read(query)

    async def find(self, query: RunQuery) -> list[Run]:
        where, values = _conditions(query)
        sql = f"SELECT spec, state FROM runs WHERE {where} ORDER BY number DESC LIMIT ?"  # noqa: S608

        def select(connection: Any) -> list[Run]:
            return [
                _run(*row)
                for row in connection.execute(
                    sql, (*values, -1 if query.limit is None else query.limit)
                )
            ]

        return await self._writer.read(select)

    async def history(self, number: int, after_version: int = 0) -> list[Event]:
        def query(connection: Any) -> list[Event]:
            rows = connection.execute(
                "SELECT body FROM events WHERE run = ? AND version > ? ORDER BY version",
                (number, after_version),
            )
            return [_decode_event(row[0]) for row in rows]

        return await self._writer.read(query)

    async def due(self, now: datetime) -> tuple[list[int], datetime | None]:
        def query(connection: Any) -> tuple[list[int], datetime | None]:
            rows = connection.execute(
                "SELECT number FROM runs WHERE due_at <= ? ORDER BY due_at LIMIT ?",
                (now.timestamp(), DUE_AT_ONCE),
            )
            numbers = [row[0] for row in rows]
            if len(numbers) == DUE_AT_ONCE:
                return numbers, now
            (first,) = connection.execute(
                "SELECT min(due_at) FROM runs WHERE due_at > ?", (now.timestamp(),)
            ).fetchone()
            return numbers, datetime.fromtimestamp(first, UTC) if first is not None else None

        return await self._writer.read(query)

    async def owners(self) -> list[str]:
        return sorted({run.agent for run in tuple(self._live.values()) if run.agent is not None})

    async def create_workflow(self, workflow: Workflow) -> None:
        def step(transaction: Transaction) -> Callable[[], None]:
            transaction.execute(
                "INSERT INTO workflows VALUES (?, ?) ON CONFLICT DO NOTHING",
                (workflow.id, _encode(workflow)),
            )
            return lambda: None

        await self._writer.submit(step)

    async def get_workflow(self, number: int) -> Workflow | None:
        """A workflow never changes: the latest that were asked for stay in memory."""
        workflow = self._workflows.get(number)
        if workflow is not None:
            return workflow

        def query(connection: Any) -> Workflow | None:
            row = connection.execute(
                "SELECT state FROM workflows WHERE number = ?", (number,)
            ).fetchone()
            return _decode_workflow(row[0]) if row else None

        workflow = await self._writer.read(query)
        if workflow is not None:
            self._workflows[number] = workflow
            if len(self._workflows) > _WORKFLOWS_IN_MEMORY:
                self._workflows.popitem(last=False)
        return workflow

    async def unpublished(self, older_than_seconds: float) -> list[Committed]:
        return self._outbox.older_than(older_than_seconds)

    async def strike(self, committed: Sequence[Committed]) -> None:
        self._outbox.strike(committed)

    # Logs

    async def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        def append() -> int:
            length, reached = self._log.state(number)
            again = 0 < raw_end(entries) <= reached
            return length if again else self._log.append(number, entries)

        def step(transaction: Transaction) -> Callable[[], int]:
            return append

        return await self._writer.submit(step)

    async def log_state(self, number: int) -> tuple[int, int]:
        if not self._log.knows(number):
            await self._look_at_log(number)

        def step(transaction: Transaction) -> Callable[[], tuple[int, int]]:
            return lambda: self._log.state(number)

        return await self._writer.submit(step)

    async def read(self, number: int, offset: int, limit: int = 1000) -> list[LogEntry]:
        while True:
            found = await self._writer.read(lambda _: self._log.read(number, offset, limit))
            if found is not None:
                return found
            await self._look_at_log(number)

    async def _look_at_log(self, number: int) -> None:
        """Whoever asks for a log nobody has asked for waits for that, and nobody else does."""
        try:
            found = await to_thread.run_sync(self._log.survey, number)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            raise StoreUnavailable(f"The log of run {number} cannot be read: {error}") from error

        def step(transaction: Transaction) -> Callable[[], None]:
            return lambda: self._log.admit(number, found)

        await self._writer.submit(step)

    # The event log

    async def head(self) -> Cursor:
        def query(connection: Any) -> int:
            (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
            return int(last)

        return self._cursor(await self._writer.read(query))

    async def events_after(self, cursor: Cursor, limit: int = 1000) -> list[Logged]:
        after = self._place(cursor)

        def query(connection: Any) -> list[Logged]:
            rows = connection.execute(
                "SELECT id, body FROM events WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
            )
            return [Logged(self._cursor(row[0]), _decode_event(row[1])) for row in rows]

        return await self._writer.read(query)

    def _cursor(self, place: int) -> Cursor:
        return f"{self._epoch}.{place}"

    def _place(self, cursor: Cursor) -> int:
        """The row id a cursor stands for: one of this very log, which is not ahead of it."""
        if cursor == BEGINNING:
            return 0
        epoch, _, place = cursor.partition(".")
        if epoch != self._epoch or not (place.isascii() and place.isdigit() and len(place) < 19):
            raise ValueError(f"{cursor!r} is no cursor of this event log")
        if int(place) > self._last_event:
            raise ValueError(f"{cursor!r} is ahead of this event log")
        return int(place)

    # Leases

    async def renew(self, agent: AgentInfo, lease_seconds: float) -> int:
        if agent.id not in self._leases:
            self._grow(agent.id)
        self._leases[agent.id] = (agent, self._clock.monotonic() + lease_seconds)
        return self._counters[agent.id]

    async def release(self, agent: str) -> None:
        self._leases.pop(agent, None)
        self._counters.pop(agent, None)

    async def agents(self) -> list[AgentInfo]:
        now = self._clock.monotonic()
        for agent in [agent for agent, (_, until) in self._leases.items() if until <= now]:
            await self.release(agent)
        return [agent for agent, _ in self._leases.values()]

    async def nudge(self, agent: str) -> None:
        if agent in self._leases:
            self._grow(agent)

    def _grow(self, agent: str) -> None:
        self._nudges += 1
        self._counters[agent] = self._nudges

    # Tokens

    async def put_token(self, token_hash: str, token: Token) -> None:
        def step(transaction: Transaction) -> Callable[[], None]:
            transaction.execute(
                "INSERT INTO tokens VALUES (?, ?) ON CONFLICT (hash) DO UPDATE SET state = "
                "excluded.state",
                (token_hash, _encode(token)),
            )
            return lambda: None

        await self._writer.submit(step)

    async def get_token(self, token_hash: str) -> Token | None:
        def query(connection: Any) -> Token | None:
            row = connection.execute(
                "SELECT state FROM tokens WHERE hash = ?", (token_hash,)
            ).fetchone()
            return _decode_token(row[0]) if row else None

        return await self._writer.read(query)


def _state(run: Run) -> bytes:
    """The run without its spec, which never changes and has a column of its own."""
    return _encode(msgspec.structs.replace(run, spec=_BLANK))


def _run(spec: bytes, state: bytes) -> Run:
    return msgspec.structs.replace(_decode_run(state), spec=_decode_spec(spec))


def _step_lines(connection: Any, number: int) -> list[LogEntry]:
    rows = connection.execute(
        "SELECT lines FROM events WHERE run = ? AND lines IS NOT NULL ORDER BY version", (number,)
    )
    return [entry for row in rows for entry in _decode_lines(row[0])]


def _conditions(query: RunQuery) -> tuple[str, list[Any]]:
    """The condition in SQL, made of our own words and question marks only, and its values."""
    where = ["1"]
    values: list[Any] = []
    if query.live or query.agent is not None:
        where.append("live")
    for column, value, operator in (
        ("number", query.before, "<"),
        ("owner", query.owner, "="),
        ("workflow", query.workflow, "="),
        ("status", query.status, "="),
        ("agent", query.agent, "="),
    ):
        if value is not None:
            where.append(f"{column} {operator} ?")
            values.append(value)
    if query.labels:
        marks = ", ".join("?" * len(query.labels))
        where.append(f"number IN (SELECT number FROM labels WHERE label IN ({marks}))")  # noqa: S608
        values.extend(query.labels)
    return " AND ".join(where), values
