"""The embedded store against what disks and crashes do to it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import anyio
import pytest

from spellq.lifecycle import Advance, Claim, End, Stop
from spellq.logs import LogEntry
from spellq.ports import NewRun, StoreUnavailable
from spellq.runs import RunSpec, Status
from spellq_brokers.embedded import MemoryEntryLog, SqliteStore, ThreadWriter
from spellq_brokers.embedded.schema import connector
from tests.clocks import HandClock

CLAIM = Claim(1, "agent", "cpu-0", "claim")
RUNNING = Advance(1, Status.RUNNING)
SAVING = Advance(1, Status.SAVING, ("Scanning", "Nothing"))
LINES = [
    "Run created -- waiting for a CPU machine.",
    "Run is building",
    "Run is running",
    "hello",
    "Run is saving",
    "Scanning",
    "Nothing",
]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path, HandClock())
    yield store
    await store.close()


async def run_with_log(store: SqliteStore) -> None:
    await store.create([NewRun(1, "ada", RunSpec("echo hello"))])
    await store.apply(1, [CLAIM])
    await store.apply(1, [RUNNING])
    entry = LogEntry(Status.RUNNING, "hello", HandClock().now(), raw_end=6)
    await store.append(1, [entry])
    await store.apply(1, [SAVING])


async def reopened(store: SqliteStore, folder: Path) -> SqliteStore:
    await store.close()
    return await SqliteStore.open(folder, HandClock())


async def texts(store: SqliteStore) -> list[str]:
    return [entry.log for entry in await store.read(1, 0)]


class SlowEntryLog(MemoryEntryLog):
    """Takes as long as a test likes to write the last lines of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def append_step(self, number: int, entries: Sequence[LogEntry]) -> int:
        if entries[-1].status is Status.COMPLETE:
            self.asked.set()
            self.go_on.wait()
        return super().append_step(number, entries)


async def test_who_sees_that_a_run_has_ended_sees_its_last_lines(tmp_path: Path) -> None:
    connect = connector(tmp_path / "state.db")
    log = SlowEntryLog()
    connections = [await asyncio.to_thread(connect) for _ in range(2)]
    store = SqliteStore(ThreadWriter(*connections), HandClock(), log)
    await run_with_log(store)
    ending = asyncio.create_task(
        store.apply(1, [Advance(1, Status.PUSHING), End(1, user_exit_code=0)])
    )
    await asyncio.to_thread(log.asked.wait)
    run = await store.get(1)
    assert run is not None
    assert not run.is_final
    log.go_on.set()
    await ending
    run = await store.get(1)
    assert run is not None
    assert run.is_final
    assert (await texts(store))[-1] == "Run 1 complete"
    await store.close()


@pytest.mark.parametrize("first", ["read", "apply"])
async def test_everything_is_there_once_after_a_restart(
    store: SqliteStore, tmp_path: Path, first: str
) -> None:
    await run_with_log(store)
    before = await store.get(1), await store.history(1), await store.head()
    again = await reopened(store, tmp_path)
    assert (await again.get(1), await again.history(1), await again.head()) == before
    if first == "read":
        assert await texts(again) == LINES
    await again.apply(1, [Advance(1, Status.PUSHING), End(1, user_exit_code=0)])
    assert (await texts(again))[: len(LINES) + 1] == [*LINES, "Run is pushing"]
    assert await again.log_state(1) == (len(LINES) + 3, 6)
    await again.close()


@pytest.mark.parametrize("cut", [1, 30, 200])
async def test_a_log_that_a_crash_left_short_is_made_whole(
    store: SqliteStore, tmp_path: Path, cut: int
) -> None:
    await run_with_log(store)
    await store.close()
    (file,) = (tmp_path / "logs").rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-cut])
    again = await SqliteStore.open(tmp_path, HandClock())
    assert await texts(again) == LINES
    await again.close()


async def test_a_garbled_line_keeps_its_place(store: SqliteStore, tmp_path: Path) -> None:
    await run_with_log(store)
    (file,) = (tmp_path / "logs").rglob("*.jsonl")
    with file.open("ab") as garbled:
        garbled.write(b'\0\0\0 "raw_end":12}\n')
    again = await reopened(store, tmp_path)
    assert await texts(again) == [*LINES, "(this line of the log cannot be read)"]
    assert await again.log_state(1) == (len(LINES) + 1, 6)
    await again.close()


async def test_a_log_that_cannot_be_read_is_said_and_harms_nothing_else(
    store: SqliteStore, tmp_path: Path
) -> None:
    await run_with_log(store)
    (file,) = (tmp_path / "logs").rglob("*.jsonl")
    file.unlink()
    file.mkdir()
    again = await reopened(store, tmp_path)
    with pytest.raises(StoreUnavailable):
        await again.log_state(1)
    assert (await again.apply(1, [Stop()])).run.status is Status.SAVING
    await again.create([NewRun(2, "ada", RunSpec("true"))])
    assert (await again.log_state(2))[0] == 1
    await again.close()


async def test_a_step_that_fails_midway_leaves_nothing(store: SqliteStore) -> None:
    good, bad = RunSpec("true"), RunSpec("lone \udcff surrogate")
    with pytest.raises(UnicodeEncodeError):
        await store.create([NewRun(1, "ada", good), NewRun(2, "ada", bad)])
    assert await store.get(1) is None
    assert await store.events_after("0") == []
    await run_with_log(store)
    with pytest.raises(UnicodeEncodeError):
        await store.apply(1, [Advance(1, Status.PUSHING, ("bad \udcff",))])
    run = await store.get(1)
    assert run is not None
    assert run.status is Status.SAVING
    assert (await store.apply(1, [Advance(1, Status.PUSHING)])).run.version == run.version + 1


async def test_a_long_line_does_not_fill_memory(store: SqliteStore) -> None:
    """A page of the log is bounded by bytes as well."""
    await run_with_log(store)
    entry = LogEntry(Status.RUNNING, "x" * 600_000, HandClock().now())
    await store.append(1, [entry] * 10)
    assert len(await store.read(1, len(LINES))) == 2


async def test_a_closed_store_says_so(store: SqliteStore, tmp_path: Path) -> None:
    again = await reopened(store, tmp_path)
    await again.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await again.apply(1, [CLAIM])


async def test_a_cursor_of_another_installation_or_of_the_future_is_refused(
    store: SqliteStore,
) -> None:
    await run_with_log(store)
    head = await store.head()
    for cursor in ("9", "other.1", head + "0", "", "x.y", head.replace(".", ".-")):
        with pytest.raises(ValueError, match=r"cursor|log"):
            await store.events_after(cursor)


async def test_a_log_that_no_thread_can_look_through_is_unavailable(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that finds its runs again asks for it, and would kill them over any other error."""
    await run_with_log(store)
    store = await reopened(store, tmp_path)
    go_on = threading.Event()
    holding = asyncio.create_task(anyio.to_thread.run_sync(go_on.wait))
    await asyncio.sleep(0)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreUnavailable, match="can't start new thread"):
            await store.log_state(1)
    go_on.set()
    await holding
    assert await store.log_state(1) == (len(LINES), 6)
    await store.close()
