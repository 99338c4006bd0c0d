"""The store's engine and the artifacts of a simulated world: they outlive every process."""

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from spellq.events import Event, EventType, fold
from spellq.ports import StoreUnavailable
from spellq.runs import LIFECYCLE, Run
from spellq_brokers.embedded.entrylog import MemoryEntryLog
from spellq_brokers.embedded.schema import connector
from spellq_brokers.embedded.writer import InlineWriter, Job, Query, Step, run_group
from tests.simulation.world import Signal, World

T = TypeVar("T")

_decode_event = msgspec.msgpack.Decoder(Event).decode


class Disk:
    """The database and the logs, and a look at each event as soon as it is committed."""

    def __init__(self, world: World) -> None:
        self.connection: sqlite3.Connection = connector(None)()
        self.log = MemoryEntryLog()
        self.runs: dict[int, Run] = {}
        self._world = world
        self._last = 0
        self._committed = Signal(world.loop)

    async def every_run_ended(self) -> None:
        """Wait until there is no live run."""
        await self.until(lambda: all(run.is_final for run in self.runs.values()))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until what was committed makes it so."""
        await self._committed.until(holds)

    def commit(self, jobs: list[Job]) -> None:
        run_group(self.connection, jobs)
        rows = self.connection.execute(
            "SELECT id, body FROM events WHERE id > ? ORDER BY id", (self._last,)
        ).fetchall()
        for place, body in rows:
            self._last = place
            self._look_at(_decode_event(body))
        if rows:
            self._committed.give()

    def _look_at(self, event: Event) -> None:
        """Each event follows the one before, and only along the table."""
        world = self._world
        before = self.runs.get(event.run)
        world.tell(
            f"run {event.run} v{event.version} {event.type} {event.status} "
            f"attempt {event.attempt} {event.cause or ''}"
        )
        if before is not None and before.agent and event.type is EventType.RUN_LOST:
            world.look_at_lost(event.run, before.agent)
        if before is not None and event.status is not before.status:
            if before.is_final:
                world.violated(
                    "finals_changed", f"run {event.run}: {before.status} -> {event.status}"
                )
            elif event.status not in LIFECYCLE[before.status]:
                world.violated("faults", f"run {event.run}: {before.status} -> {event.status}")
        try:
            after = fold([event], before)
        except ValueError as error:
            world.violated("faults", str(error))
            return
        assert after is not None
        self.runs[event.run] = after


class SimWriter:
    """Implements `embedded.writer.Writer`: one thread's order and grouping, without the thread.

    What was submitted is executed, whatever becomes of whoever waits for it.
    """

    def __init__(self, world: World, disk: Disk) -> None:
        self._world = world
        self._disk = disk
        self._waiting: list[Job] = []
        self._busy = False

    async def submit(self, step: Step[T]) -> T:
        job = Job(step, self._world.loop.create_future())
        self._waiting.append(job)
        if not self._busy:
            self._begin()
        answer: T = await job.future
        return answer

    async def read(self, query: Query[T]) -> T:
        await self._world.take_time(0.0001, 0.003)
        await self._world.point("a read")
        if self._world.store_is_away:
            raise StoreUnavailable("The store is away.")
        return query(self._disk.connection)

    async def close(self) -> None:
        pass

    def _begin(self) -> None:
        self._busy = True
        world = self._world
        world.loop.call_later(world.moment(0.0001, 0.02), self._commit)

    def _commit(self) -> None:
        world = self._world
        jobs, self._waiting = self._waiting, []
        if world.dies_here("a commit, before"):
            return
        if world.store_is_away:
            for job in jobs:
                job.error = StoreUnavailable("The store is away.")
        else:
            self._disk.commit(jobs)
            if world.dies_here("a commit, after"):
                return
        world.loop.call_later(world.moment(0.0001, 0.003), self._answer, jobs)

    def _answer(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.resolve()
        if self._waiting:
            self._begin()
        else:
            self._busy = False


class StoresWriter(InlineWriter):
    """The writer of an engine that clients reach over a network: it executes at once."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk.connection)
        self._disk = disk

    async def submit(self, step: Step[T]) -> T:
        job = Job(step, asyncio.get_running_loop().create_future())
        self._disk.commit([job])
        job.resolve()
        answer: T = await job.future
        return answer


class SimArtifacts:
    """Implements `spellq.ports.ArtifactStore` as far as runs without real files use it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._contents: dict[str, bytes] = {}

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        return [sha256 for sha256 in hashes if sha256 not in self._contents]

    async def put_bytes(self, data: bytes) -> str:
        await self._world.point("an artifact, before")
        await self._world.take_time(0.0001, 0.01)
        sha256 = hashlib.sha256(data).hexdigest()
        self._contents[sha256] = data
        await self._world.point("an artifact, after")
        return sha256

    async def put_all(self, contents: Sequence[bytes]) -> list[str]:
        return [await self.put_bytes(data) for data in contents]

    async def get_bytes(self, sha256: str) -> bytes:
        return self._contents[sha256]

    async def put(self, sha256: str, content: AsyncIterator[bytes]) -> NoReturn:
        raise AssertionError("no run here has files")

    async def adopt(self, files: Sequence[BinaryIO], *, copy: bool = False) -> NoReturn:
        raise AssertionError("no run here has files")

    async def open(self, sha256: str) -> NoReturn:
        raise AssertionError("no run here has files")

    async def local_paths(self, hashes: Sequence[str]) -> NoReturn:
        raise AssertionError("no run here has files")
