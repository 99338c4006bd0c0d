"""What was committed and not yet struck, oldest first."""

from collections.abc import Sequence
from threading import Lock

import msgspec

from spellq.ports import Clock, Committed


class MemoryOutbox:
    """An outbox for listeners in the same process: it lives as long as they do.

    Entries are added in the writer's thread and read in the loop's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[int, tuple[float, Committed]] = {}
        self._last = 0
        self._lock = Lock()

    def add(self, committed: Committed) -> Committed:
        with self._lock:
            self._last += 1
            entry = msgspec.structs.replace(committed, outbox_key=self._last)
            self._entries[self._last] = (self._clock.monotonic(), entry)
        return entry

    def older_than(self, seconds: float) -> list[Committed]:
        limit = self._clock.monotonic() - seconds
        with self._lock:
            return [entry for at, entry in self._entries.values() if at <= limit]

    def strike(self, committed: Sequence[Committed]) -> None:
        with self._lock:
            for entry in committed:
                self._entries.pop(entry.outbox_key, None)
