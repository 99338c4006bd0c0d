"""How a growing output file becomes lines."""

import asyncio
import errno
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from asyncinotify import Inotify

from spellq_workers.rawlog import MAX_ENTRY_BYTES, OutputWatcher, Piece, RawLog


@pytest.fixture
async def watcher() -> AsyncIterator[OutputWatcher]:
    async with OutputWatcher() as watcher:
        yield watcher


async def _all(path: Path, watcher: OutputWatcher, start: int = 0) -> list[Piece]:
    raw = RawLog(path, start, watcher)
    raw.finish()
    return [piece async for batch in raw.batches() for piece in batch]


async def test_lines_come_as_they_are_written(tmp_path: Path, watcher: OutputWatcher) -> None:
    path = tmp_path / "output"
    path.touch()
    raw = RawLog(path, 0, watcher)
    batches = raw.batches()
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert await anext(batches) == [Piece("one", 4)]
        file.write(b"o\r\n")
        assert await anext(batches) == [Piece("two", 9)]
        file.write(b"no end")
    raw.finish()
    assert await anext(batches) == [Piece("no end", 15)]
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


async def test_two_files_are_followed_by_one_watcher(
    tmp_path: Path, watcher: OutputWatcher
) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    first = RawLog(tmp_path / "a", 0, watcher).batches()
    second = RawLog(tmp_path / "b", 0, watcher).batches()
    (tmp_path / "b").write_bytes(b"b\n")
    assert await anext(second) == [Piece("b", 2)]
    (tmp_path / "a").write_bytes(b"a\n")
    assert await anext(first) == [Piece("a", 2)]


async def test_nothing_is_lost_for_want_of_descriptors(
    tmp_path: Path, watcher: OutputWatcher
) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"one\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        reading = asyncio.create_task(_all(path, watcher))
        await asyncio.sleep(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not reading.done()
    watcher.look()
    assert await reading == [Piece("one", 4)]


async def test_it_goes_on_where_an_earlier_agent_stopped(
    tmp_path: Path, watcher: OutputWatcher
) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"one\ntwo\nthree")
    assert await _all(path, watcher, start=4) == [Piece("two", 8), Piece("three", 13)]


async def test_bytes_that_are_no_text_are_replaced(tmp_path: Path, watcher: OutputWatcher) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"a\0b\xff\n")
    assert await _all(path, watcher) == [Piece("a\ufffdb\ufffd", 5)]


async def test_a_line_over_the_limit_is_continued(tmp_path: Path, watcher: OutputWatcher) -> None:
    path = tmp_path / "output"
    text = "é" * MAX_ENTRY_BYTES + "!"  # two bytes each: a limit in the middle of no character
    path.write_text("x" + text + "\nend\n")
    pieces = await _all(path, watcher)
    assert [piece.continued for piece in pieces] == [True, True, False, False]
    assert "".join(piece.text for piece in pieces[:3]) == "x" + text
    assert pieces[3] == Piece("end", path.stat().st_size)
    assert await _all(path, watcher, start=pieces[0].raw_end) == pieces[1:]


async def test_batches_are_bounded(tmp_path: Path, watcher: OutputWatcher) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"\n" * 10_000)
    raw = RawLog(path, 0, watcher)
    raw.finish()
    assert [len(batch) async for batch in raw.batches()] == [4096, 4096, 1808]


async def test_a_command_that_was_never_executed_has_no_output(
    tmp_path: Path, watcher: OutputWatcher
) -> None:
    assert await _all(tmp_path / "output", watcher) == []


async def test_a_file_that_cannot_be_watched_is_looked_at_with_every_heartbeat(
    tmp_path: Path, watcher: OutputWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the limit of inotify watches is reached")

    path = tmp_path / "output"
    path.write_bytes(b"one\n")
    batches = RawLog(path, 0, watcher).batches()
    assert await anext(batches) == [Piece("one", 4)]
    with monkeypatch.context() as fault:
        fault.setattr(Inotify, "add_watch", exhausted)
        more = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        with path.open("ab") as file:
            file.write(b"two\n")
        assert not more.done()
        watcher.look()
        assert await more == [Piece("two", 8)]
    more = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    watcher.look()
    await asyncio.sleep(0)
    with path.open("ab") as file:
        file.write(b"three\n")
    assert await more == [Piece("three", 14)]
