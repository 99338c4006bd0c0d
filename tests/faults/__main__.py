"""`make test-faults`: a simulated world, every crash point, kills at random; and what came of it.

    python -m tests.faults [--record] [--kills 200]

Exit status 1 if anything was lost, came twice, changed or was missed. `--record` keeps the figures
in docs/reliability.json and the README.
"""

import argparse
import asyncio
import sys
import time

from tests.faults.evidence import Tally
from tests.faults.kills import kill_at_random
from tests.faults.report import record, report_of, table
from tests.faults.standstill import stand_still
from tests.faults.sweep import SWEEPS, Crash, sweep
from tests.simulation import Summary, run_seeds

HISTORIES = 2_000
AT_ONCE = 2
STILL_SECONDS = 65.0


class Progress:
    """One line for each campaign; on a terminal it counts up."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._count = 0
        self._faults: list[str] = []

    def step(self, tally: Tally | None = None, count: int = 1) -> None:
        self._count += count
        if tally is not None:
            self._faults += tally.faults
        if sys.stdout.isatty():
            print(f"\r{self._what}: {self._count}", end="", flush=True)

    def over(self) -> None:
        seconds = time.monotonic() - self._began
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{self._what}: {self._count} in {seconds:.0f} s", flush=True)
        for fault in self._faults:
            print(fault, flush=True)


def simulate() -> Summary:
    progress = Progress("simulated histories")
    before = 0

    def tell(summary: Summary) -> None:
        nonlocal before
        progress.step(count=summary.histories - before)
        before = summary.histories

    simulated = run_seeds(0, HISTORIES, tell=tell)
    progress.over()
    if not simulated.is_clean:
        print(simulated, flush=True)
    return simulated


async def run_all(kills: int) -> tuple[Tally, dict[str, int], int]:
    tally = Tally()
    points = {}
    for what, arms in SWEEPS.items():
        progress = Progress(f"crash points of {what}")

        def seen(crash: Crash, progress: Progress = progress) -> None:
            tally.add(crash.tally)
            progress.step(crash.tally, count=int(crash.is_complete))

        points[what] = await sweep(arms, AT_ONCE, seen)
        progress.over()
    at_points = tally.kills
    progress = Progress("kills at random")
    killing = await kill_at_random(kills, seed=1, shown=lambda _: progress.step())
    progress.step(killing, count=0)
    progress.over()
    tally.add(killing)
    progress = Progress(f"standing still for {STILL_SECONDS:.0f} s")
    still = await stand_still(STILL_SECONDS)
    progress.step(still)
    progress.over()
    tally.add(still)
    return tally, points, tally.kills - at_points


def main() -> None:
    parser = argparse.ArgumentParser(prog="make test-faults")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--kills", type=int, default=200)
    options = parser.parse_args()
    try:
        simulated = simulate()
        tally, points, kills = asyncio.run(run_all(options.kills))
    except KeyboardInterrupt:
        sys.exit(130)
    report = report_of(tally, simulated, points, kills)
    print(f"\n{table(report)}")
    if options.record:
        record(report)
    sys.exit(0 if report.is_clean else 1)


if __name__ == "__main__":
    main()
