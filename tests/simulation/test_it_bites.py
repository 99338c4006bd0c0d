"""What the simulation is for: with a rule of the product switched off, it finds the fault."""

from typing import Final

import pytest

from spellq import lifecycle
from spellq.control import supervisor
from spellq.control.feed import Feed
from spellq.runs import Status
from spellq_brokers.embedded.outbox import MemoryOutbox
from spellq_workers.attempt import Attempt
from tests.simulation.history import run_history

SEEDS: Final = 400
"""So many histories may pass by before a fault has to be found."""


def kinds_found() -> set[str]:
    """The kinds of promises that the first failing history breaks."""
    for seed in range(SEEDS):
        violations = run_history(seed).violations
        if violations:
            print(f"seed {seed}: {violations[0]}")
            return {violation.kind for violation in violations}
    return set()


def test_without_the_attempt_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_same_attempt", lambda moves, attempt: None)
    assert kinds_found()


def test_without_the_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryOutbox, "older_than", lambda outbox, seconds: [])
    assert "waits_missed" in kinds_found()


def test_with_running_stored_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_first(attempt, execution) -> None:  # type: ignore[no-untyped-def]
        await execution.start()
        run = await attempt._advance(Status.RUNNING)
        await attempt._see_to_the_end(run, execution)

    monkeypatch.setattr(Attempt, "_execute", start_first)
    assert kinds_found() & {"started_twice", "lost", "faults"}


def test_with_agents_lost_at_their_first_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LEASE_SECONDS", 0.0)
    assert "lost" in kinds_found()


def test_without_the_feed_filling_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave_gaps(feed, number) -> None:  # type: ignore[no-untyped-def]
        pass

    monkeypatch.setattr(Feed, "_fill", leave_gaps)
    assert "waits_missed" in kinds_found()
