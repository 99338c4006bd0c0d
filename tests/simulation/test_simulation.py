"""Thousands of histories without a broken promise, and each the same whenever it is replayed."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.simulation.history import run_history
from tests.simulation.runner import Failure, Summary, run_seeds

CHUNK = 500
ROOT = Path(__file__).parents[2]

DIGESTS = """
import sys
from tests.simulation.history import run_history
for seed in sys.argv[1:]:
    print(run_history(int(seed)).digest)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(1, 2001, CHUNK))
def test_no_promise_is_broken(first: int) -> None:
    summary = run_seeds(first, CHUNK)
    assert summary.is_clean, f"\n{summary}"
    assert summary.histories == CHUNK
    assert summary.crashes > 100


@pytest.mark.timeout(120)
def test_one_seed_gives_one_trace() -> None:
    """In this process twice, and in others whose strings hash differently."""
    seeds = range(3001, 3013)
    digests = [run_history(seed).digest for seed in seeds]
    assert len(set(digests)) == len(digests)
    assert [run_history(seed).digest for seed in seeds] == digests
    for hash_seed in ("1", "2"):
        assert digests_elsewhere(seeds, hash_seed) == digests


def digests_elsewhere(seeds: Sequence[int], hash_seed: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, *map(str, seeds)],
        cwd=ROOT,
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_failing_seed_says_how_to_replay_it() -> None:
    summary = Summary(histories=1, runs=3, waits_missed=1, failures=(Failure(7, "a wait"),))
    assert not summary.is_clean
    assert "make simulate SEED=7" in str(summary)
    assert "waits missed 1" in str(summary + Summary(histories=1))
