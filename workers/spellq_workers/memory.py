"""Whether the kernel kills for lack of memory, and whom first. Only the standard library."""

import os
from collections.abc import Iterator
from contextlib import suppress

_CONTROLLERS = "/sys/fs/cgroup"
_WHOLE_MACHINE = "/proc/vmstat"
_SACRIFICE = 300
"""As much as if a command had 30 % of the machine's memory more than it has."""


class OomKills:
    """How many processes the kernel has killed for lack of memory.

    Counted are those of this process's own control group, where it has one that tells (version 1
    or 2), else those of the whole machine.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        for path in (*_own_groups(), _WHOLE_MACHINE):
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            if self.count() is not None:
                return
            os.close(self._file)
            self._file = None

    def count(self) -> int | None:
        """None where this kernel does not tell."""
        if self._file is None:
            return None
        try:
            told = os.pread(self._file, 1 << 16, 0)
        except OSError:
            return None
        for line in told.splitlines():
            name, _, number = line.partition(b" ")
            if name == b"oom_kill":
                return int(number)
        return None


class Sacrifice:
    """While it is entered, what is spawned is what the kernel kills first for lack of memory.

    Sooner than this process, and than the agent it came from.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._own = 0
        with suppress(OSError, ValueError):
            self._file = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
            self._own = int(os.pread(self._file, 16, 0))

    def __enter__(self) -> None:
        self._set(min(1000, self._own + _SACRIFICE))

    def __exit__(self, *_: object) -> None:
        self._set(self._own)

    def _set(self, score: int) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, str(score).encode(), 0)


def _own_groups() -> Iterator[str]:
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            yield f"{_CONTROLLERS}/memory{path}/memory.oom_control"
        elif not controllers:
            yield f"{_CONTROLLERS}{path}/memory.events"
