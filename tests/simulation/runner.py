"""Many histories: on every core, counted, the failing ones named with how to replay them."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import Final

from tests.simulation.history import History, run_history

_CHUNK: Final = 20
_TOLD: Final = 10


@dataclass(frozen=True)
class Failure:
    """A history that broke a promise."""

    seed: int
    text: str

    def __str__(self) -> str:
        return f"{self.text}\n    replay it with: make simulate SEED={self.seed}"


@dataclass(frozen=True)
class Summary:
    """What many histories came to. `faults` are broken promises that are none of the four."""

    histories: int = 0
    runs: int = 0
    crashes: int = 0
    lost: int = 0
    started_twice: int = 0
    finals_changed: int = 0
    waits_missed: int = 0
    faults: int = 0
    failures: tuple[Failure, ...] = ()

    @property
    def is_clean(self) -> bool:
        return not self.failures

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )

    def __str__(self) -> str:
        counts = (
            f"{self.histories} histories, {self.runs} runs, {self.crashes} crashes: "
            f"lost {self.lost}, started twice {self.started_twice}, "
            f"finals changed {self.finals_changed}, waits missed {self.waits_missed}, "
            f"other faults {self.faults}"
        )
        more = len(self.failures) - _TOLD
        told = [f"seed {failure.seed}: {failure}" for failure in self.failures[:_TOLD]]
        return "\n".join([*told, *([f"… and {more} more"] if more > 0 else []), counts])


def summary_of(history: History) -> Summary:
    kinds = [violation.kind for violation in history.violations]
    failures = (Failure(history.seed, str(history.violations[0])),) if history.violations else ()
    return Summary(
        1,
        history.runs,
        history.crashes,
        kinds.count("lost"),
        kinds.count("started_twice"),
        kinds.count("finals_changed"),
        kinds.count("waits_missed"),
        kinds.count("faults"),
        failures,
    )


def run_seeds(
    first: int,
    count: int,
    *,
    processes: int | None = None,
    tell: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """The histories of `count` seeds from `first` on, on every core (or so many processes).

    `tell` gets the sum so far, now and then.
    """
    chunks = list(_chunks(first, count))
    total = Summary()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), context, _settle) as pool:
        try:
            for done in pool.map(_run_chunk, chunks):
                total += done
                tell(total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return total


def _settle() -> None:
    """What is there before the first history is not looked through again after each."""
    gc.collect()
    gc.freeze()


def _chunks(first: int, count: int) -> Iterator[range]:
    end = first + count
    for start in range(first, end, _CHUNK):
        yield range(start, min(start + _CHUNK, end))


def _run_chunk(seeds: range) -> Summary:
    return sum((summary_of(run_history(seed)) for seed in seeds), Summary())
