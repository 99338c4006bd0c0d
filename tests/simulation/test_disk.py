"""Agents on a disk that fills up: nothing ends because of it, and nothing is kept from leaving."""

import asyncio

import pytest

import spellq_workers.room
from spellq.ports import Job, StoreFull, WorldError
from spellq.runs import Run, Status
from tests.simulation.machine import Script, SimExecution, SimExecutor
from tests.simulation.network import Remote
from tests.simulation.test_found import Story, told

RESERVE = 256 << 20


class FullDisk:
    """Fills up while the first world is made, for as long as a story likes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = RESERVE
        self._prepare = SimExecutor.prepare
        monkeypatch.setattr(spellq_workers.room, "free_bytes", lambda _: self.free)
        monkeypatch.setattr(SimExecutor, "prepare", lambda executor, job: self._make(executor, job))

    async def _make(self, executor: SimExecutor, job: Job) -> SimExecution:
        if job.attempt == 1:
            self.free = 0
        if not self.free:
            raise WorldError("No space left on device")
        return await self._prepare(executor, job)


def test_a_run_that_is_built_when_the_disk_fills_up_waits_again_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = FullDisk(monkeypatch)

    async def story(it: Story) -> Run:
        number = await it.launch(Script(code=3))
        run = await it.until(lambda run: run.attempt == 2, number)
        assert (run.status, run.agent) == (Status.MACHINE_REQUESTED, None)
        await asyncio.sleep(60)
        assert it.cluster.disk.runs[number] == run
        disk.free = RESERVE
        return await it.ended(number)

    run = told(story, RESERVE)
    assert (run.status, run.user_exit_code, run.attempt) == (Status.COMPLETE, 3, 2)


def test_a_run_that_waits_again_for_the_disk_is_killed_like_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FullDisk(monkeypatch)

    async def story(it: Story) -> Run:
        number = await it.launch(Script(code=3))
        await it.until(lambda run: run.attempt == 2, number)
        await it.client.ask(lambda door: door.runs.kill(number, None))
        return await it.ended(number)

    assert told(story, RESERVE).status is Status.KILLED


def test_an_agent_leaves_though_what_it_would_store_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk without a byte: `running` cannot be stored, and nothing is executed."""

    disk_is_full = asyncio.Event()
    reach, prepare = Remote._reach, SimExecutor.prepare

    async def write(remote: Remote, name: str) -> None:
        if disk_is_full.is_set():
            raise StoreFull("The disk is full.")
        await reach(remote, name)

    async def fill(executor: SimExecutor, job: Job) -> SimExecution:
        execution = await prepare(executor, job)
        if job.attempt == 1:
            disk_is_full.set()
        return execution

    monkeypatch.setattr(Remote, "_reach", write)
    monkeypatch.setattr(SimExecutor, "prepare", fill)

    async def story(it: Story) -> Run:
        number = await it.launch(Script(code=3))
        await disk_is_full.wait()
        await asyncio.sleep(60)
        it.agent.leave()
        await it.has_left()
        disk_is_full.clear()
        run = await it.ended(number)
        assert it.world.starts[number] == 1
        return run

    run = told(story)
    assert (run.status, run.user_exit_code) == (Status.COMPLETE, 3)
