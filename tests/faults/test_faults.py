"""A few of the faults that `make test-faults` tries all of, and the examiner's own tests."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from spellq.clock import SystemClock
from spellq.lifecycle import Advance, Claim, End
from spellq.ports import LEASE_SECONDS, NewRun
from spellq.runs import Reached, RunSpec, Status
from spellq_brokers.embedded import SqliteStore
from tests.faults.evidence import Starts, Tally, examine, examine_run
from tests.faults.kills import kill_at_random
from tests.faults.report import load, report_of, table, table_in_readme
from tests.faults.standstill import stand_still
from tests.faults.sweep import SWEEPS, Arm, crash
from tests.simulation import Summary


@pytest.mark.parametrize("at", [30, 110, 190, 270, 350])
async def test_a_daemon_that_dies_in_the_middle_of_something_leaves_no_trace(at: int) -> None:
    done = await crash(Arm(at))
    assert len(done.points) == 1
    assert done.tally.faults == []


async def test_a_daemon_that_dies_while_it_takes_over(tmp_path: Path) -> None:
    done = await crash(Arm(180), Arm(40))
    assert len(done.points) == 2
    assert done.tally.faults == []


@pytest.mark.parametrize("slot", ["cpu-0", "masters-0"])
async def test_a_helper_that_dies_in_the_middle_of_something(slot: str) -> None:
    done = await crash(Arm(12, slot))
    assert len(done.points) == 1
    assert done.tally.faults == []


@pytest.mark.timeout(120)
async def test_kills_at_random() -> None:
    tally = await kill_at_random(15, 7, lambda _: None)
    assert tally.kills == 15
    assert tally.faults == []


@pytest.mark.timeout(90)
async def test_a_daemon_that_stands_still_beyond_its_lease() -> None:
    tally = await stand_still(LEASE_SECONDS + 3)
    assert tally == Tally(runs=2)


@pytest.fixture
async def starts() -> AsyncIterator[Starts]:
    async with Starts.listening() as starts:
        yield starts


async def make_runs(home: Path, ended: bool) -> None:
    store = await SqliteStore.open(home, SystemClock())
    await store.create([NewRun(number=1, owner="ada", spec=RunSpec(command="true"))])
    if ended:
        claim = Claim(attempt=1, agent="a", slot="cpu-0", claim="c", token_hash=None)
        await store.apply(1, [claim, Advance(1, Status.RUNNING), Advance(1, Status.SAVING)])
        await store.apply(1, [Advance(1, Status.PUSHING), End(1, user_exit_code=0)])
    await store.close()


async def test_the_examiner_is_content_with_what_is_right(tmp_path: Path, starts: Starts) -> None:
    await make_runs(tmp_path, ended=True)
    starts.counts[1] = 1
    tally = Tally()
    await examine(tmp_path, [1], starts, tally)
    assert tally == Tally(runs=1)


async def test_the_examiner_sees_what_is_lost(tmp_path: Path, starts: Starts) -> None:
    await make_runs(tmp_path, ended=False)
    tally = Tally()
    await examine(tmp_path, [1, 2], starts, tally)
    assert tally.lost == 2


async def test_the_examiner_sees_a_command_that_was_started_twice(
    tmp_path: Path, starts: Starts
) -> None:
    await make_runs(tmp_path, ended=True)
    for _ in range(2):
        command = await asyncio.create_subprocess_exec(
            "bash", "-c", starts.words, env={"SPELL_RUN": "1"}
        )
        await command.wait()
    async with asyncio.timeout(10), starts.changed:
        await starts.changed.wait_for(lambda: starts.counts[1] == 2)
    tally = Tally()
    await examine(tmp_path, [1], starts, tally)
    assert tally.started_twice == 1


async def test_the_examiner_sees_a_final_status_that_changed(tmp_path: Path) -> None:
    await make_runs(tmp_path, ended=True)
    store = await SqliteStore.open(tmp_path, SystemClock())
    run, history = await store.get(1), await store.history(1)
    await store.close()
    assert run is not None
    killed = Reached(Status.KILLED, run.version + 1, run.history[-1].at)
    changed = replace(run, history=(*run.history, killed))
    tally = Tally()
    examine_run(changed, history, 1, tally)
    assert tally.finals_changed == 1
    assert tally.faults[1:] == [
        "run 1 went from complete to killed",
        "run 1: its events do not give its state",
    ]


async def test_the_examiner_sees_that_an_event_is_lost(tmp_path: Path, starts: Starts) -> None:
    """In the file itself."""
    await make_runs(tmp_path, ended=True)
    with closing(sqlite3.connect(tmp_path / "state.db")) as file, file:
        assert file.execute("DELETE FROM events WHERE rowid = 2").rowcount == 1
    tally = Tally()
    await examine(tmp_path, [1], starts, tally)
    assert tally.faults == ["run 1: its events do not give its state"]


@pytest.mark.parametrize(
    "kind", ["lost", "started_twice", "finals_changed", "waits_missed", "faults"]
)
def test_whatever_the_simulation_finds_is_in_the_report(kind: str) -> None:
    assert report_of(Tally(), Summary(histories=1), {}, 0).is_clean
    simulated = Summary(histories=1, **{kind: 1})  # type: ignore[arg-type]
    assert not report_of(Tally(), simulated, {}, 0).is_clean


def test_the_readme_has_the_figures_that_are_kept() -> None:
    report = load()
    assert table_in_readme() == table(report)
    assert report.is_clean
    assert report.histories >= 2_000
    assert report.kills >= 200
    assert set(report.points) == set(SWEEPS)
    assert min(report.points.values()) > 20
