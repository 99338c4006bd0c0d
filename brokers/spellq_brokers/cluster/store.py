"""The store of a cluster: Redis, in sixteen shards."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from heapq import merge
from itertools import islice
from typing import Any, Final

import msgspec

from spellq.events import Event, Logged, fold
from spellq.lifecycle import Command, Refused, Step, create, transitions
from spellq.logs import LogEntry, raw_end
from spellq.ports import (
    DUE_AT_ONCE,
    AgentInfo,
    Clock,
    Committed,
    NewRun,
    RunQuery,
    Token,
    UnknownRun,
)
from spellq.runs import FINAL, Run, RunSpec, Workflow
from spellq_brokers.cluster.engine import Engine, script
from spellq_brokers.cluster.keys import SHARDS

_REMEMBERED_SECONDS: Final = 24 * 3600
_RUNS_IN_MEMORY: Final = 4096
_PACKS_AT_ONCE: Final = 16
_RELAYED_AT_ONCE: Final = 100
_PLACE: Final = 8
"""The bytes in front of packed log entries that say the offset of the first."""
_COMMAND: Final = 16
"""The bytes in front of an event that say the command of its step."""
_BLANK: Final = RunSpec(command="")

_encode = msgspec.msgpack.Encoder().encode
_decode_run = msgspec.msgpack.Decoder(Run).decode
_decode_spec = msgspec.msgpack.Decoder(RunSpec).decode
_decode_event = msgspec.msgpack.Decoder(Event).decode
_decode_entries = msgspec.msgpack.Decoder(list[LogEntry]).decode
_decode_workflow = msgspec.msgpack.Decoder(Workflow).decode
_decode_token = msgspec.msgpack.Decoder(Token).decode
_decode_agent = msgspec.msgpack.Decoder(AgentInfo).decode

_ALLOT = script("allot")
_COMMIT = script("commit")
_APPEND = script("append")
_READ_LOG = script("read_log")
_DUE = script("due")
_UNPUBLISHED = script("unpublished")
_RENEW = script("renew")
_AGENTS = script("agents")
_RELEASE = script("release")
_NUDGE = script("nudge")
_CALL = script("call")


class RedisStore:
    """Implements `spellq.ports.Store` for any number of processes.

    A step is made here, by the one lifecycle table, for the version this process knows; the script
    commits it if the run is still at that version, and otherwise gives the newer state to try again
    with.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._keys = engine.keys
        self._clock = clock
        self._known: OrderedDict[int, Run] = OrderedDict()

    async def close(self) -> None:
        await self._engine.close()

    # Runs

    async def allot(self, kind: str, count: int, command_id: str) -> tuple[int, ...]:
        keys = [self._keys.of_all("numbers"), self._keys.of_all(f"allotted:{kind}:{command_id}")]
        first = await self._engine.call(_ALLOT, keys, [kind, count, _REMEMBERED_SECONDS])
        return tuple(range(first, first + count))

    async def create(self, new: Sequence[NewRun]) -> list[Committed]:
        at = self._clock.now()
        return list(await asyncio.gather(*(self._create(run, at) for run in new)))

    async def _create(self, new: NewRun, at: datetime) -> Committed:
        made = create(new.number, new.owner, new.spec, at, workflow=new.workflow, labels=new.labels)
        answer = await self._commit(None, made)
        assert answer is not None
        return Committed(answer) if isinstance(answer, Run) else answer

    async def apply(self, number: int, commands: Sequence[Command]) -> Committed:
        at = self._clock.now()
        known = self._known.get(number)
        if known is not None:
            try:
                made = transitions(known, commands, at)
            except Refused:
                made = None  # by what was true once
            if made is not None and made.events:
                answer = await self._commit(known, made)
                if isinstance(answer, Committed):
                    return answer
        run = await self.get(number)
        while run is not None:
            made = transitions(run, commands, at)
            if not made.events:
                return Committed(made.run)
            answer = await self._commit(run, made)
            if isinstance(answer, Committed):
                return answer
            run = answer
        raise UnknownRun(number)

    async def _commit(self, before: Run | None, made: Step) -> Committed | Run | None:
        """Write a step. Or write nothing and give the run as it is by now, None where none is."""
        run, keys = made.run, self._keys
        first, last = made.events[0].version, made.events[-1].version
        command = bytes.fromhex(self._clock.fresh_id())
        had, has = _indexes(before), _indexes(run)
        joins, leaves = sorted(has - had), sorted(had - has)
        answer = await self._engine.call(
            _COMMIT,
            [
                *(keys.of_run(run.id, name) for name in ("run", "events", "log")),
                *(keys.of_shard(run.id % SHARDS, name) for name in ("outbox", "due", "owners")),
                *(keys.of_shard(run.id % SHARDS, f"index:{name}") for name in (*joins, *leaves)),
            ],
            [
                command,
                first - 1,
                run.id,
                _state(run),
                _encode(run.spec) if before is None else b"",
                run.due_at.timestamp() if run.due_at else b"",
                _owner(before) or b"",
                _owner(run) or b"",
                _encode(made.lines) if made.lines else b"",
                len(made.lines),
                f"{run.id}:{first}:{last}",
                len(joins),
                *(_encode(event) for event in made.events),
            ],
        )
        if answer[0] == b"done":
            self._keep(run)
            logged = tuple(Logged("", event) for event in made.events)
            return Committed(run, logged, answer[1])
        if answer[0] == b"absent":
            return None
        return self._keep(_run(answer[1], answer[2]))

    def _keep(self, run: Run) -> Run:
        self._known[run.id] = run
        self._known.move_to_end(run.id)
        if len(self._known) > _RUNS_IN_MEMORY:
            self._known.popitem(last=False)
        return run

    async def get(self, number: int) -> Run | None:
        kept = await self._call(self._keys.of_run(number, "run"), "HMGET", "spec", "state")
        return self._keep(_run(*kept)) if kept[1] is not None else None

    async def find(self, query: RunQuery) -> list[Run]:
        """Each shard has its runs by number in every index; those of one index are merged."""
        found: list[Run] = []
        before = query.before
        wanted = query.limit
        while wanted is None or len(found) < wanted:
            page = None if wanted is None else max(2 * (wanted - len(found)), 16)
            numbers = await self._numbers(_narrowest(query), before, page)
            runs = await asyncio.gather(*(self.get(number) for number in numbers))
            found += [run for run in runs if run is not None and _matches(run, query)]
            if page is None or len(numbers) < page:
                break
            before = numbers[-1]
        return found[:wanted]

    async def _numbers(
        self, indexes: Sequence[str], before: int | None, most: int | None
    ) -> list[int]:
        """The highest numbers below `before` in any of the indexes, from all shards."""
        below = "+inf" if before is None else f"({before}"
        limit = ("LIMIT", 0, most) if most is not None else ()
        parts = await asyncio.gather(
            *(
                self._call(
                    self._keys.of_shard(shard, f"index:{index}"),
                    "ZREVRANGEBYSCORE",
                    below,
                    "-inf",
                    *limit,
                )
                for shard in range(SHARDS)
                for index in indexes
            )
        )
        ranges = ([int(number) for number in part] for part in parts)
        merged = dict.fromkeys(merge(*ranges, reverse=True))
        return list(islice(merged, most))

    async def history(self, number: int, after_version: int = 0) -> list[Event]:
        kept = await self._call(self._keys.of_run(number, "events"), "LRANGE", after_version, -1)
        return [_decode_event(memoryview(each)[_COMMAND:]) for each in kept]

    async def due(self, now: datetime) -> tuple[list[int], datetime | None]:
        answers = await self._in_every_shard(_DUE, ["due"], [now.timestamp(), DUE_AT_ONCE])
        come = sorted(pair for come, _ in answers for pair in _scored(come))
        if len(come) >= DUE_AT_ONCE:
            return [number for _, number in come[:DUE_AT_ONCE]], now
        first = min((score for _, later in answers for score, _ in _scored(later)), default=None)
        return (
            [number for _, number in come],
            datetime.fromtimestamp(first, UTC) if first is not None else None,
        )

    async def owners(self) -> list[str]:
        answers = await asyncio.gather(
            *(self._call(self._keys.of_shard(shard, "owners"), "HKEYS") for shard in range(SHARDS))
        )
        return sorted({agent.decode() for answer in answers for agent in answer})

    async def create_workflow(self, workflow: Workflow) -> None:
        key = self._keys.of_run(workflow.id, "workflow")
        await self._call(key, "SETNX", _encode(workflow))

    async def get_workflow(self, number: int) -> Workflow | None:
        kept = await self._call(self._keys.of_run(number, "workflow"), "GET")
        return _decode_workflow(kept) if kept is not None else None

    async def unpublished(self, older_than_seconds: float) -> list[Committed]:
        answers = await self._in_every_shard(
            _UNPUBLISHED, ["outbox"], [int(older_than_seconds * 1000), _RELAYED_AT_ONCE]
        )
        entries = [tuple(map(int, entry.split(b":"))) for answer in answers for entry in answer]
        found = await asyncio.gather(*(self._step(*entry) for entry in sorted(entries)))
        return [committed for committed in found if committed is not None]

    async def _step(self, number: int, first: int, last: int) -> Committed | None:
        """What a step of a run made, from the run's own history."""
        history = (await self.history(number))[:last]
        run = fold(history)
        if run is None:
            return None
        return Committed(run, tuple(Logged("", event) for event in history[first - 1 :]))

    async def strike(self, committed: Sequence[Committed]) -> None:
        by_shard: dict[int, list[str]] = {}
        for entry in committed:
            if entry.logged:
                versions = entry.logged[0].event.version, entry.logged[-1].event.version
                member = f"{entry.run.id}:{versions[0]}:{versions[1]}"
                by_shard.setdefault(entry.run.id % SHARDS, []).append(member)
        for shard, members in by_shard.items():
            # Should it fail, the relay publishes once more.
            self._engine.tell(_CALL, [self._keys.of_shard(shard, "outbox")], ["ZREM", *members])

    # Logs

    async def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        keys = [self._keys.of_run(number, "run"), self._keys.of_run(number, "log")]
        length: int = await self._engine.call(
            _APPEND, keys, [_encode(entries), len(entries), raw_end(entries)]
        )
        return length

    async def read(self, number: int, offset: int, limit: int = 1000) -> list[LogEntry]:
        found: list[LogEntry] = []
        while len(found) < limit:
            place = offset + len(found)
            packs = await self._engine.call(
                _READ_LOG, [self._keys.of_run(number, "log")], [place, _PACKS_AT_ONCE]
            )
            before = len(found)
            for pack in packs:
                start = int.from_bytes(pack[:_PLACE])
                entries = _decode_entries(memoryview(pack)[_PLACE:])
                found += entries[max(0, offset + len(found) - start) :]
            if len(found) == before:
                break
        return found[:limit]

    async def log_state(self, number: int) -> tuple[int, int]:
        kept = await self._call(self._keys.of_run(number, "run"), "HMGET", "lines", "raw")
        return int(kept[0] or 0), int(kept[1] or 0)

    # Leases

    async def renew(self, agent: AgentInfo, lease_seconds: float) -> int:
        counter: int = await self._engine.call(
            _RENEW,
            self._agents_keys(),
            [agent.id, _encode(agent), int(lease_seconds * 1000)],
        )
        return counter

    async def release(self, agent: str) -> None:
        await self._engine.call(_RELEASE, self._agents_keys(), [agent])

    async def agents(self) -> list[AgentInfo]:
        return [
            _decode_agent(each) for each in await self._engine.call(_AGENTS, self._agents_keys())
        ]

    async def nudge(self, agent: str) -> None:
        await self._engine.call(_NUDGE, [self._keys.of_all("counters")], [agent])

    def _agents_keys(self) -> list[str]:
        return [self._keys.of_all(name) for name in ("agents", "leases", "counters")]

    # Tokens

    async def put_token(self, token_hash: str, token: Token) -> None:
        await self._call(self._keys.of_all(f"token:{token_hash}"), "SET", _encode(token))

    async def get_token(self, token_hash: str) -> Token | None:
        kept = await self._call(self._keys.of_all(f"token:{token_hash}"), "GET")
        return _decode_token(kept) if kept is not None else None

    # Calls

    async def _call(self, key: str, command: str, *arguments: str | bytes | float) -> Any:
        return await self._engine.call(_CALL, [key], [command, *arguments])

    async def _in_every_shard(self, which: Any, names: Sequence[str], arguments: Any) -> list[Any]:
        return await asyncio.gather(
            *(
                self._engine.call(
                    which, [self._keys.of_shard(shard, name) for name in names], arguments
                )
                for shard in range(SHARDS)
            )
        )


def _state(run: Run) -> bytes:
    """The run without its spec, which never changes and is kept apart."""
    return _encode(msgspec.structs.replace(run, spec=_BLANK))


def _run(spec: bytes, state: bytes) -> Run:
    return msgspec.structs.replace(_decode_run(state), spec=_decode_spec(spec))


def _owner(run: Run | None) -> str | None:
    """The agent that owns the run, as long as it is not final."""
    return None if run is None or run.is_final else run.agent


def _indexes(run: Run | None) -> set[str]:
    """The indexes a run is in."""
    if run is None:
        return set()
    names = {"runs", f"owner:{run.owner}", *(f"label:{label}" for label in run.labels)}
    if run.workflow is not None:
        names.add(f"workflow:{run.workflow}")
    if not run.is_final:
        names.add("live")
    if agent := _owner(run):
        names.add(f"agent:{agent}")
    return names


def _narrowest(query: RunQuery) -> list[str]:
    """The indexes, one of which has every run that matches."""
    if query.agent is not None:
        return [f"agent:{query.agent}"]
    if query.workflow is not None:
        return [f"workflow:{query.workflow}"]
    if query.labels:
        return [f"label:{label}" for label in query.labels]
    if query.live or (query.status is not None and query.status not in FINAL):
        return ["live"]
    if query.owner is not None:
        return [f"owner:{query.owner}"]
    return ["runs"]


def _matches(run: Run, query: RunQuery) -> bool:
    return (
        (query.owner is None or run.owner == query.owner)
        and (query.workflow is None or run.workflow == query.workflow)
        and (query.status is None or run.status is query.status)
        and (query.agent is None or _owner(run) == query.agent)
        and (not query.live or not run.is_final)
        and (not query.labels or not set(query.labels).isdisjoint(run.labels))
    )


def _scored(answer: Iterable[bytes]) -> list[tuple[float, int]]:
    """(score, number) of what Redis returns as number, score, number, …"""
    flat = list(answer)
    return [
        (float(score), int(number)) for number, score in zip(flat[::2], flat[1::2], strict=True)
    ]
