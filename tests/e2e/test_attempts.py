"""An agent and its attempts, in this process, over real slot helpers: what may go wrong."""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from anyio.abc import TaskStatus

import spellq_workers.attempt
from spellq.clock import SystemClock
from spellq.control.feed import Feed
from spellq.events import Event
from spellq.lifecycle import Advance, Claim, Command, Expire, Kill, Lose, Requeue, Stop
from spellq.outbox import Outbox
from spellq.ports import Committed, Execution, Job, NewRun, RunQuery, StoreUnavailable
from spellq.runs import FINAL, Cause, Run, RunSpec, Status
from spellq.seal import Sealer
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from spellq_workers.agent import Agent, AgentSettings
from spellq_workers.machine import LocalMachine
from spellq_workers.process import ProcessExecutor
from spellq_workers.rawlog import OutputWatcher


class Started(TaskStatus[None]):
    def __init__(self) -> None:
        self.event = asyncio.Event()

    def started(self, value: None = None) -> None:
        self.event.set()


class PausingExecutor(ProcessExecutor):
    """The real executor; a test may come in between its steps."""

    before_start: Callable[[Execution], Awaitable[None]] | None = None

    async def prepare(self, job: Job) -> Execution:  # type: ignore[override]
        execution = await super().prepare(job)
        start = execution.start

        async def pausing_start() -> None:
            if self.before_start is not None:
                await self.before_start(execution)
            await start()

        execution.start = pausing_start  # type: ignore[method-assign]
        return execution


class FaultyStore(SqliteStore):
    """The real store; its reads fail while a test says so, and others may come after them."""

    away = False
    after_find: Callable[[Sequence[Run]], Awaitable[None]] | None = None

    async def get(self, number: int) -> Run | None:
        if self.away:
            raise StoreUnavailable("away")
        return await super().get(number)

    async def find(self, query: RunQuery) -> list[Run]:
        runs = await super().find(query)
        if query.agent is not None and self.after_find is not None:
            await self.after_find(runs)
        return runs


class Machine:
    """A machine with one cpu slot, and everything around it."""

    def __init__(self, home: Path, store: FaultyStore, artifacts: DiskArtifacts) -> None:
        self.home = home
        self.store = store
        self.artifacts = artifacts
        self.bus = InProcessBus()
        self.outbox = Outbox(store, self.bus)
        self.feed = Feed(store, store, self.bus, SystemClock())
        self.executor = PausingExecutor(home)
        self._tasks: list[asyncio.Task[None]] = []

    async def start_agent(self) -> None:
        self.executor = PausingExecutor(self.home)
        watcher = await OutputWatcher().__aenter__()
        agent = Agent(
            AgentSettings(
                name="test",
                slots={"cpu": 1},
                master_slots=0,
                gateway_url="http://127.0.0.1:1",
            ),
            self.store,
            self.bus,
            self.outbox,
            self.artifacts,
            self.executor,
            LocalMachine(self.home / "agent", self.artifacts, watcher),
            Sealer(bytes(32)),
            SystemClock(),
        )
        await self.start(agent.run)

    async def start(self, run: Callable[..., Awaitable[None]]) -> None:
        async def body(started: Started) -> None:
            await run(task_status=started)

        started = Started()
        self._tasks.append(asyncio.create_task(body(started)))
        await started.event.wait()

    async def lose_agent(self) -> None:
        """The agent dies as by kill -9: nothing of it is done any more."""
        await self._end(self._tasks.pop())

    async def close(self) -> None:
        while self._tasks:
            await self._end(self._tasks.pop())
        await self.executor.close()
        await self.store.close()

    async def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def launch(self, command: str) -> int:
        (number,) = await self.store.allot("run", 1, os.urandom(8).hex())
        await self.outbox.create([NewRun(number, "ada", RunSpec(command, grace_seconds=1))])
        return number

    async def want(self, number: int, *commands: Command) -> Committed:
        committed = await self.outbox.apply(number, *commands)
        if committed.run.agent is not None:
            await self.bus.hint(committed.run.agent)
        return committed

    async def reached(self, number: int, *statuses: Status) -> Run:
        """The run as it is when it has reached one of the statuses."""
        there = asyncio.Event()

        def watch(event: Event) -> None:
            if event.status in statuses:
                there.set()

        self.feed.add_watcher(number, watch)
        run = await SqliteStore.get(self.store, number)
        if run is None or run.status not in statuses:
            await there.wait()
        self.feed.remove_watcher(number, watch)
        after = await SqliteStore.get(self.store, number)
        assert after is not None
        return after

    async def ended(self, number: int) -> Run:
        return await self.reached(number, *FINAL)

    async def serves(self) -> bool:
        """Whether the slot still executes runs."""
        run = await self.ended(await self.launch("exit 5"))
        return (run.status, run.user_exit_code) == (Status.COMPLETE, 5)

    def helper_pid(self) -> int:
        return int((self.home / "agent" / "slots" / "cpu-0" / "helper.pid").read_text())


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    store = await FaultyStore.open(tmp_path, SystemClock())
    artifacts = await DiskArtifacts.make(tmp_path / "artifacts")
    machine = Machine(tmp_path, store, artifacts)  # type: ignore[arg-type]
    await machine.start(machine.feed.run)
    await machine.start_agent()
    yield machine
    await machine.close()


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [(Stop(), Status.STOPPED, 143), (Kill(), Status.KILLED, None)],
)
async def test_a_stop_between_running_and_start_is_not_lost(
    machine: Machine, tmp_path: Path, wanted: Command, status: Status, code: int | None
) -> None:
    looked = asyncio.Event()

    async def come_in_between(execution: Execution) -> None:
        stop, kill = execution.stop, execution.kill

        async def stopping(grace_seconds: float) -> None:
            await stop(grace_seconds)
            looked.set()

        async def killing() -> None:
            await kill()
            looked.set()

        execution.stop, execution.kill = stopping, killing  # type: ignore[method-assign]
        await machine.want(execution.run, wanted)
        await looked.wait()

    machine.executor.before_start = come_in_between
    number = await machine.launch("echo executed")
    run = await machine.ended(number)
    assert (run.status, run.user_exit_code) == (status, code)
    assert "executed" not in [entry.log for entry in await machine.store.read(number, 0)]
    machine.executor.before_start = None
    assert await machine.serves()


@pytest.mark.parametrize("wanted", [Stop(), Kill()])
async def test_a_run_that_was_to_end_before_its_command_began_ends_after_a_restart(
    machine: Machine, wanted: Command
) -> None:
    paused = asyncio.Event()

    async def forever(_: Execution) -> None:
        paused.set()
        await asyncio.Event().wait()

    machine.executor.before_start = forever
    number = await machine.launch("echo executed")
    await paused.wait()
    await machine.outbox.apply(number, wanted)
    dying = machine._tasks.pop()
    dying.cancel()  # the agent shields the step it is in: it dies with the process only
    await machine.start_agent()
    run = await machine.ended(number)
    assert run.status in (Status.STOPPED, Status.KILLED)
    assert "executed" not in [entry.log for entry in await machine.store.read(number, 0)]
    assert await machine.serves()


async def test_a_claimed_run_whose_helper_is_gone_runs_as_the_next_attempt(
    machine: Machine,
) -> None:
    assert await machine.serves()
    number = await machine.launch("sleep 60")
    await machine.reached(number, Status.RUNNING)
    await machine.lose_agent()
    os.kill(machine.helper_pid(), signal.SIGKILL)
    await machine.start_agent()
    run = await machine.ended(number)
    assert (run.status, run.cause) == (Status.INTERRUPTED, Cause.HELPER_LOST)
    assert await machine.serves()


async def test_a_lost_run_that_somebody_else_requeued_meanwhile_is_left_to_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a supervisor, in the moment between the agent's look and its step."""
    preparing = asyncio.Event()

    async def forever(*_: object) -> None:
        preparing.set()
        await asyncio.Event().wait()

    async def be_quicker(runs: Sequence[Run]) -> None:
        for run in runs:
            claim = Claim(attempt=2, agent="other", slot="cpu-0", claim="c", token_hash=None)
            requeued = (Requeue(1, "Lost."), claim, Advance(2, Status.RUNNING))
            await machine.store.apply(run.id, requeued)

    monkeypatch.setattr(machine.executor, "prepare", forever)
    number = await machine.launch("true")
    await preparing.wait()
    await machine.lose_agent()
    machine.store.after_find = be_quicker
    await machine.start_agent()
    run = await machine.store.get(number)
    assert run is not None
    assert (run.status, run.attempt, run.agent) == (Status.RUNNING, 2, "other")
    assert await machine.serves()


async def test_a_helper_that_is_killed_interrupts_its_run_and_nothing_else(
    machine: Machine,
) -> None:
    number = await machine.launch("sleep 60")
    await machine.reached(number, Status.RUNNING)
    os.kill(machine.helper_pid(), signal.SIGKILL)
    run = await machine.ended(number)
    assert (run.status, run.cause) == (Status.INTERRUPTED, Cause.HELPER_LOST)
    assert await machine.serves()


async def test_a_store_that_is_away_while_the_agent_looks(machine: Machine) -> None:
    number = await machine.launch("sleep 60")
    run = await machine.reached(number, Status.RUNNING)
    assert run.agent is not None
    machine.store.away = True
    await machine.bus.hint(run.agent)
    await asyncio.sleep(0)
    machine.store.away = False
    await machine.want(number, Kill())
    assert (await machine.ended(number)).status is Status.KILLED
    assert await machine.serves()


async def test_outputs_that_cannot_be_saved_do_not_cost_the_exit_code(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> tuple[str, int]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(machine.artifacts, "adopt", full)
    run = await machine.ended(await machine.launch("echo x > x; exit 66"))
    assert (run.status, run.user_exit_code) == (Status.FAILED, 66)
    assert run.cause is Cause.OUTPUTS
    assert "No space left" in run.reason
    assert await machine.serves()


async def test_outputs_are_saved_once_there_is_a_thread_for_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LocalMachine.save
    refused = 0

    async def save_at_the_second_try(self: LocalMachine, *arguments: Any) -> Any:
        nonlocal refused
        if not refused:
            refused += 1
            raise RuntimeError("can't start new thread")
        return await save(self, *arguments)

    monkeypatch.setattr(LocalMachine, "save", save_at_the_second_try)
    run = await machine.ended(await machine.launch("echo x > x; exit 66"))
    assert (refused, run.status, run.user_exit_code) == (1, Status.COMPLETE, 66)
    assert run.outputs_files == 1


async def test_a_fault_of_ours_does_not_cost_the_exit_code(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def faulty(*_: object) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr(LocalMachine, "save", faulty)
    run = await machine.ended(await machine.launch("echo x > x; exit 66"))
    assert (run.status, run.user_exit_code) == (Status.FAILED, 66)
    assert await machine.serves()


async def test_a_run_that_was_given_up_is_killed_where_it_still_runs(machine: Machine) -> None:
    number = await machine.launch("sleep 60")
    run = await machine.reached(number, Status.RUNNING)
    assert run.agent is not None
    await machine.want(number, Lose(run.agent, 0), Expire())
    assert (await machine.ended(number)).status is Status.INTERRUPTED
    assert await machine.serves()


async def test_a_log_over_its_limit_stops_the_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spellq_workers.attempt, "LOG_BYTES", 1 << 20)
    run = await machine.ended(await machine.launch("yes | head -c 3000000; sleep 60"))
    assert (run.status, run.cause) == (Status.STOPPED, Cause.LOG)
    assert await machine.serves()


async def test_a_kill_does_not_wait_for_outputs_to_be_saved(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = asyncio.Event()

    async def slow(*_: object, **__: object) -> tuple[str, int]:
        saving.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    monkeypatch.setattr(machine.artifacts, "adopt", slow)
    number = await machine.launch("echo x > x")
    await saving.wait()
    await machine.want(number, Kill())
    assert (await machine.ended(number)).status is Status.KILLED
    assert await machine.serves()
