"""Logs in files: every entry once and in order, however they come and whatever the disk does."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spellq.clock import SystemClock
from spellq.logs import LogEntry
from spellq.runs import Status
from spellq_brokers.embedded import FileEntryLog, SqliteStore

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def entries(*texts: str, begin: int = 0) -> list[LogEntry]:
    """Lines a command said, the first of them at byte `begin` of its output."""
    made = []
    for text in texts:
        begin += len(text.encode()) + 1
        made.append(LogEntry(Status.RUNNING, text, NOW, raw_end=begin))
    return made


def entry_log(folder: Path) -> FileEntryLog:
    return FileEntryLog(folder, lambda number: [])


def texts(log: FileEntryLog, offset: int = 0, limit: int = 1000) -> list[str]:
    """Read from `offset` to the end, a page at a time, so that their seams are seen."""
    found: list[str] = []
    while page := log.read(1, offset + len(found), limit):
        found += [entry.log for entry in page]
    return found


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_cut_short_is_not_there_twice_when_it_is_repeated(tmp_path: Path) -> None:
    log = entry_log(tmp_path)
    log.append(1, entries("before"))
    more = entries(*(f"line {n}" for n in range(100)), begin=7)
    with file_size_limit(2000), pytest.raises(OSError, match=r"No space|File too large"):
        log.append(1, more)
    assert log.state(1) == (1, 7)
    assert texts(log) == ["before"]
    assert log.append(1, more) == 101
    expected = ["before", *(entry.log for entry in more)]
    assert texts(log) == expected
    log.close()
    again = entry_log(tmp_path)
    assert again.state(1) == (101, more[-1].raw_end)
    assert texts(again) == expected


def test_what_a_step_said_while_the_disk_was_full_is_appended_later(tmp_path: Path) -> None:
    said = [LogEntry(Status.SAVING, f"step {n}", NOW, version=n) for n in (1, 2)]
    log = FileEntryLog(tmp_path, lambda number: said)
    log.created(1)
    log.append_step(1, said[:1])
    log.append(1, entries("x" * 1000))
    with file_size_limit(1200), pytest.raises(OSError, match=r"No space|File too large"):
        log.append_step(1, said[1:])
    log.append(1, entries("after", begin=1001))
    assert texts(log) == ["step 1", "x" * 1000, "step 2", "after"]
    log.close()


def test_what_a_step_said_is_not_there_twice_when_a_survey_brings_it_too(tmp_path: Path) -> None:
    """Committed in one group: the step, and the admission that finds its lines missing."""
    said = [LogEntry(Status.SAVING, f"step {n}", NOW, version=n) for n in (1, 2, 3)]
    log = FileEntryLog(tmp_path, lambda number: said[:2])
    log.admit(1, log.survey(1))
    log.append_step(1, said[1:2])
    assert log.append_step(1, said[2:]) == 3
    assert texts(log) == ["step 1", "step 2", "step 3"]
    log.close()
    again = FileEntryLog(tmp_path, lambda number: said)
    for step in said[1:]:
        again.append_step(1, [step])
    assert texts(again) == ["step 1", "step 2", "step 3"]
    again.close()


def test_a_survey_of_what_was_taken_back_since_is_begun_anew(tmp_path: Path) -> None:
    log = entry_log(tmp_path)
    log.append(1, entries("one", "two"))
    again = entry_log(tmp_path)
    found = again.survey(1)
    os.truncate(tmp_path / "0" / "1.jsonl", 0)
    again.admit(1, found)
    assert again.state(1) == (0, 0)
    again.append(1, entries("three"))
    assert texts(again) == ["three"]
    again.close()
    log.close()


def test_a_long_log_is_read_from_anywhere_before_and_after_a_restart(tmp_path: Path) -> None:
    log = entry_log(tmp_path)
    wanted = [f"{n} " + "x" * (n % 300) for n in range(20_000)]
    for at in range(0, len(wanted), 700):
        log.append(1, entries(*wanted[at : at + 700]))
    again = entry_log(tmp_path)
    again.admit(1, again.survey(1))
    for each in (log, again):
        assert texts(each, limit=999) == wanted
        for offset in (0, 1, 511, 7777, 19_999):
            page = each.read(1, offset, 2)
            assert page is not None
            assert [entry.log for entry in page] == wanted[offset : offset + 2]
        assert each.read(1, 20_000, 10) == []
        each.close()


def test_a_survey_that_is_overtaken_takes_in_what_came_since(tmp_path: Path) -> None:
    log = entry_log(tmp_path)
    log.append(1, entries("one", "two"))
    again = entry_log(tmp_path)
    found = again.survey(1)
    log.append(1, entries("three", begin=8))
    again.admit(1, found)
    assert again.state(1) == (3, 14)
    assert texts(again) == ["one", "two", "three"]
    log.close()


def test_what_a_command_says_is_never_taken_for_a_mark_of_ours(tmp_path: Path) -> None:
    log = entry_log(tmp_path)
    log.append(1, entries('"version":1,"raw_end":99999}', '\\"raw_end":12', begin=0))
    length, raw_end = log.state(1)
    log.close()
    found = entry_log(tmp_path).survey(1)
    assert (found.length, found.raw_end, found.steps) == (length, raw_end, 0)


async def test_looking_through_an_old_log_holds_up_nobody_else(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path, SystemClock())
    path = tmp_path / "logs" / "0" / "1.jsonl"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)  # a log that takes as long to be read as we like
    old = asyncio.create_task(store.read(1, 0))
    writing = await asyncio.to_thread(os.open, path, os.O_WRONLY)
    try:
        assert await store.append(2, entries("other")) == 1
        assert [entry.log for entry in await store.read(2, 0)] == ["other"]
        assert await store.get(7) is None
        assert not old.done()
        path.unlink()
    finally:
        os.close(writing)
    assert await old == []
    await store.close()
