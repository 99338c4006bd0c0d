"""Each run's log as a file of entries: one JSON line each, in the order of their offsets.

Appending happens in the store's writer thread only; reading in any one other thread, and surveys
in threads of their own: a log of gigabytes takes seconds to look through, and holds nobody up.
"""

import errno
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from spellq.logs import LogEntry, raw_end
from spellq.runs import Status

_INDEX_BYTES: Final = 1 << 18
_OPEN_FILES: Final = 128
_KNOWN: Final = 4096
_READ_BYTES: Final = 1 << 20
_STEP_MARK: Final = b'"version":'
_RAW_END_MARK: Final = b'"raw_end":'
"""Neither is found in what a command said, where every quotation mark has a backslash before it."""
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
        """Whether `state` answers at once."""

    def survey(self, number: int) -> "Survey":
        """Look through what there is, so that `admit` makes it known at once. In any thread."""

    def admit(self, number: int, found: "Survey") -> None:
        """Make what `survey` has found known."""

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry] | None:
        """Entries from `offset` on, at least one if there is one; None: `knows` says no."""

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
        return len(kept), raw_end(kept)

    def created(self, number: int) -> None:
        pass

    def knows(self, number: int) -> bool:
        return True

    def survey(self, number: int) -> "Survey":
        return Survey()

    def admit(self, number: int, found: "Survey") -> None:
        pass

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry]:
        return self._entries.get(number, [])[offset : offset + limit]

    def close(self) -> None:
        pass


def _decode(line: bytes) -> LogEntry:
    """The entry of a line; one that a power cut has garbled keeps its place in the log."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return LogEntry(
            Status.RUNNING, "(this line of the log cannot be read)", _UNKNOWN, level="error"
        )


class Survey:
    """What is known of one run's file: its length, and where some of its entries begin."""

    __slots__ = ("index", "length", "raw_end", "size", "steps", "version")

    def __init__(self) -> None:
        self.length = 0
        self.size = 0
        self.raw_end = 0
        self.version = 0
        """The run's, of the last step whose entries `admit` saw to."""
        self.steps = 0
        """Entries that were said by steps, of those that were looked through."""
        self.index: list[tuple[int, int]] = [(0, 0)]
        """(offset of an entry, its place in the file), ascending, some 256 KiB apart."""

    def add(self, lines: int, size: int) -> None:
        self.length += lines
        self.size += size
        if self.size - self.index[-1][1] >= _INDEX_BYTES:
            self.index.append((self.length, self.size))

    def look_through(self, path: Path) -> None:
        """Go on to the end of the last whole line."""
        with path.open("rb", buffering=0) as file:
            if self.size:
                file.seek(self.size)
            rest = b""
            while data := file.read(_READ_BYTES):
                lines, end, rest = (rest + data).rpartition(b"\n")
                self._look_at(lines + end)

    def _look_at(self, lines: bytes) -> None:
        at = 0
        while at < len(lines):
            end = lines.find(b"\n", min(at + _INDEX_BYTES, len(lines)) - 1) + 1
            self.add(lines.count(b"\n", at, end), end - at)
            at = end
        self.steps += lines.count(_STEP_MARK)
        self.raw_end = max(self.raw_end, _last_raw_end(lines))

    def place(self, offset: int) -> tuple[int, int]:
        """The last entry known not to be after `offset`, and its place in the file."""
        return self.index[bisect_right(self.index, offset, key=lambda known: known[0]) - 1]


def _last_raw_end(lines: bytes) -> int:
    """The place in the raw output the last of these lines that names one reached."""
    end = len(lines)
    while (mark := lines.rfind(_RAW_END_MARK, 0, end)) >= 0:
        begin = lines.rfind(b"\n", 0, mark) + 1
        reached = _decode(lines[begin : lines.find(b"\n", mark)]).raw_end
        if reached is not None:
            return reached
        end = begin
    return 0


class FileEntryLog:
    """An entry log in files under `folder`.

    A file that a crash left short is made whole when it is first touched: a torn last line is cut
    off, and lines whose step was committed (`step_lines`) are appended.
    """

    def __init__(self, folder: Path, step_lines: StepLines) -> None:
        self._folder = folder
        self._step_lines = step_lines
        self._surveys: OrderedDict[int, Survey] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def append(self, number: int, entries: Sequence[LogEntry]) -> int:
        survey = self._survey(number)
        data = _encoder.encode_lines(entries)
        try:
            if self._file(number).write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path(number)))
        except OSError:
            self._take_back(number, survey.size)
            raise
        survey.add(len(entries), len(data))
        survey.raw_end = max(survey.raw_end, raw_end(entries))
        return survey.length

    def append_step(self, number: int, entries: Sequence[LogEntry]) -> int:
        survey = self._survey(number)  # which brings all that is committed, if it was not known
        if (entries[-1].version or 0) <= survey.version:
            return survey.length
        return self.append(number, entries)

    def state(self, number: int) -> tuple[int, int]:
        survey = self._survey(number)
        return survey.length, survey.raw_end

    def created(self, number: int) -> None:
        self._remember(number, Survey())

    def knows(self, number: int) -> bool:
        return number in self._surveys

    def survey(self, number: int) -> Survey:
        found = Survey()
        with suppress(FileNotFoundError):
            found.look_through(self._path(number))
        return found

    def admit(self, number: int, found: Survey) -> None:
        if number in self._surveys:
            return
        path = self._path(number)
        with suppress(FileNotFoundError):
            if path.stat().st_size < found.size:
                found = Survey()  # some of what it saw was taken back
            found.look_through(path)  # what came since
            if path.stat().st_size > found.size:
                os.truncate(path, found.size)
        self._remember(number, found)
        said = self._step_lines(number)
        if said[found.steps :]:
            self.append(number, said[found.steps :])
        if said:
            found.version = said[-1].version or 0

    def read(self, number: int, offset: int, limit: int) -> list[LogEntry] | None:
        survey = self._surveys.get(number)
        if survey is None:
            return None
        limit = min(limit, survey.length - offset)
        if limit <= 0:
            return []
        first, place = survey.place(offset)
        found: list[LogEntry] = []
        size = 0
        with self._path(number).open("rb") as file:
            file.seek(place)
            for line in islice(file, offset - first, offset - first + limit):
                found.append(_decode(line))
                size += len(line)
                if size >= _READ_BYTES:
                    break
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, number: int) -> Path:
        return self._folder / str(number // 1000) / f"{number}.jsonl"

    def _survey(self, number: int) -> Survey:
        if number not in self._surveys:
            self.admit(number, Survey())
        self._surveys.move_to_end(number)
        return self._surveys[number]

    def _remember(self, number: int, survey: Survey) -> None:
        self._surveys[number] = survey
        if len(self._surveys) > _KNOWN:
            self._drop(next(iter(self._surveys)))

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

    def _take_back(self, number: int, size: int) -> None:
        """What was written of an append that failed goes: whoever appends tries it again.

        What a step said is appended when the log is next touched.
        """
        with suppress(OSError):
            os.truncate(self._path(number), size)
        self._drop(number)

    def _drop(self, number: int) -> None:
        self._surveys.pop(number, None)
        file = self._files.pop(number, None)
        if file is not None:
            file.close()
