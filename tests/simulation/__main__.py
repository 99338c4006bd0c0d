"""`make simulate SEED=n` replays one history and tells it; `make simulate-long` lives many."""

import argparse
import sys
import time
from contextlib import suppress

from tests.simulation.history import run_history
from tests.simulation.runner import Summary, run_seeds, summary_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int, help="the seed, or the first of several")
    parser.add_argument("--count", type=int, help="how many seeds; only what fails is told")
    arguments = parser.parse_args()
    if arguments.count is None:
        summary = _replay(arguments.seed)
    else:
        summary = _live_many(arguments.seed, arguments.count)
    print(summary)
    sys.exit(not summary.is_clean)


def _replay(seed: int) -> Summary:
    history = run_history(seed)
    print("\n".join(history.lines))
    return summary_of(history)


def _live_many(first: int, count: int) -> Summary:
    """Tells of each failure when it is found; interrupted, of what was lived through until then."""
    began = time.monotonic()
    latest = Summary()

    def tell(summary: Summary) -> None:
        nonlocal latest
        for failure in summary.failures[len(latest.failures) :]:
            print(f"\rseed {failure.seed}: {failure}", flush=True)
        latest = summary
        rate = summary.histories / (time.monotonic() - began)
        text = f"{summary.histories}/{count}, {rate:.0f}/s, {len(summary.failures)} failed"
        print(f"\r{text}", end="", file=sys.stderr, flush=True)

    with suppress(KeyboardInterrupt):
        run_seeds(first, count, tell=tell)
    print(file=sys.stderr)
    return latest


if __name__ == "__main__":
    main()
