"""Each run's log as a file of entries: one JSON line each, in the order of their offsets.

Appending happens in the store's writer thread only; reading in any one other thread.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from spellq.logs import LogEntry
from spellq.runs import Status

_INDEX_EVERY: Final = 512
_OPEN_FILES: Final = 128
_KNOWN: Final = 4096
_READ_BYTES: Final = 1 << 20
_STEP_MARK: Final = b'"version":'

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(LogEntry)
_UNKNOWN: Final = datetime.fromtimestamp(0, UTC)

StepLines = Callable[[int], Sequence[LogEntry]]
"""The lines a run's committed steps have said (those with a `version`), all of them, in order."""


class EntryLog(Protocol):
    """Sequences of entries, one a run."""

    def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        """Append; returns the new length."""

    def append_step(self, number: int, entries: Sequence[LogEntry]) -> int:
        """Append what a step said that is committed by now; returns the new length."""

    def state(self, number: int) -> tuple[int, int]:
        """(length, place in the raw output reached)."""

    def created(self, number: int) -> None:
        """The run is new: it has no entries yet."""

    def knows(self, number: int) -> bool:
        """Whether `read` sees all there is without `state` being asked first."""

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry]:
        """Entries from `offset` on."""

    def close(self) -> None:
        """Close what is open."""


class MemoryEntryLog:
    """An entry log in memory."""

    def __init__(self) -> None:
        self._entries: dict[int, list[LogEntry]] = {}

    def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        kept = self._entries.setdefault(number, [])
        kept.extend(entries)
        return len(kept)

    append_step = append

    def state(self, number: int) -> tuple[int, int]:
        kept = self._entries.get(number, [])
        return len(kept), _raw_end(kept)

    def created(self, number: int) -> None:
        pass

    def knows(self, number: int) -> bool:
        return True

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry]:
        return self._entries.get(number, [])[offset : offset + limit]

    def close(self) -> None:
        pass


def _raw_end(entries: Iterable[LogEntry]) -> int:
    return max((entry.raw_end for entry in entries if entry.raw_end is not None), default=0)


def _decode(line: bytes) -> LogEntry:
    """The entry of a line; one that a power cut has garbled keeps its place in the log."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return LogEntry(
            Status.RUNNING, "(this line of the log cannot be read)", _UNKNOWN, level="error"
        )


class _Sequence:
    """What is known of one run's file: its length, and where every 512th entry begins."""

    __slots__ = ("index", "length", "raw_end", "size")

    def __init__(self) -> None:
        self.length = 0
        self.size = 0
        self.raw_end = 0
        self.index: list[int] = [0]

    def add(self, line: bytes) -> None:
        self.size += len(line)
        self.length += 1
        if self.length % _INDEX_EVERY == 0:
            self.index.append(self.size)


class FileEntryLog:
    """An entry log in files under `folder`.

    A file that a crash left short is made whole when it is first touched: a torn last line is cut
    off, and lines whose step was committed (`step_lines`) are appended.
    """

    def __init__(self, folder: Path, step_lines: StepLines) -> None:
        self._folder = folder
        self._step_lines = step_lines
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        sequence = self._sequence(number)
        lines = [_encoder.encode(entry) + b"\n" for entry in entries]
        data = b"".join(lines)
        try:
            if self._file(number).write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path(number)))
        except OSError:
            self._drop(number)
            raise
        for line in lines:
            sequence.add(line)
        sequence.raw_end = max(sequence.raw_end, _raw_end(entries))
        return sequence.length

    def append_step(self, number: int, entries: Sequence[LogEntry]) -> int:
        if number in self._sequences:
            return self.append(number, entries)
        return self._sequence(number).length  # made whole, which brought these entries too

    def state(self, number: int) -> tuple[int, int]:
        sequence = self._sequence(number)
        return sequence.length, sequence.raw_end

    def created(self, number: int) -> None:
        self._remember(number, _Sequence())

    def knows(self, number: int) -> bool:
        return number in self._sequences

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry]:
        sequence = self._sequences.get(number)
        if sequence is not None and offset >= sequence.length:
            return []
        index = sequence.index if sequence is not None else [0]
        place = min(offset // _INDEX_EVERY, len(index) - 1)
        skip = offset - place * _INDEX_EVERY
        found: list[LogEntry] = []
        size = 0
        try:
            with self._path(number).open("rb") as file:
                file.seek(index[place])
                for line in file:
                    if not line.endswith(b"\n") or len(found) >= limit or size >= _READ_BYTES:
                        break
                    if skip:
                        skip -= 1
                    else:
                        found.append(_decode(line))
                        size += len(line)
        except FileNotFoundError:
            return []
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, number: int) -> Path:
        return self._folder / str(number // 1000) / f"{number}.jsonl"

    def _sequence(self, number: int) -> _Sequence:
        sequence = self._sequences.get(number)
        if sequence is None:
            return self._load(number)
        self._sequences.move_to_end(number)
        return sequence

    def _remember(self, number: int, sequence: _Sequence) -> None:
        self._sequences[number] = sequence
        if len(self._sequences) > _KNOWN:
            self._drop(next(iter(self._sequences)))

    def _load(self, number: int) -> _Sequence:
        sequence = _Sequence()
        said = 0
        path = self._path(number)
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    sequence.add(line)
                    said += _STEP_MARK in line
                    if b'"raw_end":' in line:
                        sequence.raw_end = max(sequence.raw_end, _decode(line).raw_end or 0)
            if path.stat().st_size > sequence.size:
                os.truncate(path, sequence.size)
        self._remember(number, sequence)
        lost = self._step_lines(number)[said:]
        if lost:
            self.append(number, lost)
        return sequence

    def _file(self, number: int) -> BinaryIO:
        file = self._files.get(number)
        if file is not None:
            self._files.move_to_end(number)
            return file
        path = self._path(number)
        try:
            file = path.open("ab", buffering=0)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        self._files[number] = file
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file

    def _drop(self, number: int) -> None:
        self._sequences.pop(number, None)
        file = self._files.pop(number, None)
        if file is not None:
            file.close()
