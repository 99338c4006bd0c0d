"""What a campaign of faults goes by: commands that report themselves, and what the store keeps."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from spellq.clock import SystemClock
from spellq.events import BEGINNING, Event, fold
from spellq.ports import RunQuery
from spellq.runs import FINAL, LIFECYCLE, Run
from spellq_brokers.embedded import SqliteStore


@dataclass
class Tally:
    """What must be nought, how much it was tried, and how long a recovery took (in seconds)."""

    lost: int = 0
    started_twice: int = 0
    finals_changed: int = 0
    waits_missed: int = 0
    runs: int = 0
    kills: int = 0
    recoveries: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Everything that is wrong, in words, with where it was seen."""

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Starts:
    """Commands that come to say that they were executed: the truth about what started."""

    def __init__(self, server: asyncio.Server) -> None:
        self.counts: Counter[int] = Counter()
        self.changed = asyncio.Condition()
        self.port: int = server.sockets[0].getsockname()[1]
        self._server = server

    @classmethod
    @asynccontextmanager
    async def listening(cls) -> AsyncIterator["Starts"]:
        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            word = await reader.read()
            writer.close()
            if word.strip():
                async with starts.changed:
                    starts.counts[int(word)] += 1
                    starts.changed.notify_all()

        server = await asyncio.start_server(hear, "127.0.0.1", 0)
        starts = cls(server)
        async with server:
            yield starts

    @property
    def words(self) -> str:
        """The beginning of a command (in bash) that reports its run's number."""
        return f"exec 9<>/dev/tcp/127.0.0.1/{self.port}; echo $SPELL_RUN >&9; exec 9>&-; "


async def examine(home: Path, launched: Iterable[int], starts: Starts, tally: Tally) -> list[Run]:
    """Look at what an installation keeps, now that its daemon has left; returns its runs.

    `launched` are the runs whose launch was answered.
    """
    store = await SqliteStore.open(home, SystemClock())
    try:
        runs = {run.id: run for run in await store.find(RunQuery(limit=None))}
        for number in set(launched) - set(runs):
            tally.lost += 1
            tally.faults.append(f"run {number} was launched and is not there")
        histories = {number: await store.history(number) for number in runs}
        logged = await _all_events(store)
    finally:
        await store.close()
    tally.runs += len(runs)
    for number, run in runs.items():
        examine_run(run, histories[number], starts.counts[number], tally)
        if [each for each in logged if each.run == number] != histories[number]:
            tally.faults.append(f"run {number}: the log of events is not its history")
    return list(runs.values())


async def _all_events(store: SqliteStore) -> list[Event]:
    events: list[Event] = []
    cursor = BEGINNING
    while page := await store.events_after(cursor):
        events += [logged.event for logged in page]
        cursor = page[-1].cursor
    return events


def examine_run(run: Run, history: Sequence[Event], started: int, tally: Tally) -> None:
    """Look at one run, whose command was executed `started` times."""
    if not run.is_final:
        tally.lost += 1
        tally.faults.append(f"run {run.id} is still {run.status}")
    if started > 1:
        tally.started_twice += 1
        tally.faults.append(f"run {run.id} was started {started} times")
    statuses = [reached.status for reached in run.history]
    if sum(status in FINAL for status in statuses) > 1:
        tally.finals_changed += 1
        tally.faults.append(f"run {run.id} ended more than once: {statuses}")
    for before, after in pairwise(statuses):
        if after not in LIFECYCLE[before]:
            tally.faults.append(f"run {run.id} went from {before} to {after}")
    try:
        same = fold(history) == run
    except ValueError:  # one is missing
        same = False
    if not same:
        tally.faults.append(f"run {run.id}: its events do not give its state")
