"""Faults that the simulation found, each told as a story of its own in a calm world.

Seeds are those of the day a fault was found; a simulation that grows tells other histories by them.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from spellq.events import EventType
from spellq.lifecycle import Kill
from spellq.ports import NewRun
from spellq.runs import FINAL, Cause, Run, RunSpec, Status
from spellq.wire import RunRequest
from spellq_workers.machine import Incarnation
from spellq_workers.outputs import Scan
from tests.simulation.calm import in_a_calm_world
from tests.simulation.chaos import ChaoticBus
from tests.simulation.client import OWNER, Client, Record
from tests.simulation.cluster import Cluster
from tests.simulation.gateway import Door
from tests.simulation.machine import AgentsMachine, Script
from tests.simulation.service import Service
from tests.simulation.world import World

T = TypeVar("T")
AGES = 1e6


class Story:
    """A client and a cluster of one agent, in which only what the story says goes wrong."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cluster = Cluster(world, machines=1)
        self.client = Client(world, self.cluster.gateways, Record(), "client")
        self.agent: Service = self.cluster.services[0]

    async def launch(self, script: Script) -> int:
        (number,) = await self.client.launch([RunRequest(command=script.command())], "it")
        return number

    async def running(self, script: Script) -> int:
        number = await self.launch(script)
        await self.client.wait(number, (Status.RUNNING,))
        await asyncio.sleep(1)
        return number

    async def ended(self, number: int) -> Run:
        await self.client.wait(number, FINAL)
        return self.cluster.disk.runs[number]

    async def has_left(self) -> None:
        """The agent that was asked to leave is gone; another one begins."""
        gone = asyncio.Event()
        self.agent.when_dead(gone.set)
        await gone.wait()

    async def executing_nothing(self) -> None:
        (folder,) = self.cluster.machines[0].starts
        await folder.changed.until(lambda: not folder.is_executing)

    async def until(self, holds: Callable[[Run], bool], number: int) -> Run:
        runs = self.cluster.disk.runs
        await self.cluster.disk.until(lambda: holds(runs[number]))
        return runs[number]


def told(story: Callable[[Story], Awaitable[T]], reserve_bytes: int = 0) -> T:
    """What a story comes to. It has no faults but its own; `reserve_bytes` as of a `Room`."""

    async def tell(world: World) -> T:
        it = Story(world)
        it.cluster.machines[0].reserve_bytes = reserve_bytes
        await it.cluster.start()
        return await story(it)

    return in_a_calm_world(tell)


def test_the_exit_code_of_a_run_that_was_given_up_is_kept() -> None:
    """Seeds 1015, 14796: the agent goes on after its run was given up, and was asked to kill it."""

    async def story(it: Story) -> Run:
        number = await it.running(Script(seconds=10, code=3))
        it.agent.pause(200)
        assert (await it.ended(number)).cause is Cause.AGENT_LOST
        return await it.until(lambda run: run.late_exit_code is not None, number)

    assert told(story).late_exit_code == 3


def test_an_agent_that_comes_back_tells_how_a_run_given_up_had_ended() -> None:
    """Seed 2096: the journal is there, and the run was given up meanwhile."""

    async def story(it: Story) -> Run:
        number = await it.running(Script(seconds=10, code=3))
        it.agent.kill(away_seconds=200)
        assert (await it.ended(number)).cause is Cause.AGENT_LOST
        return await it.until(lambda run: run.late_exit_code is not None, number)

    assert told(story).late_exit_code == 3


def test_an_agent_that_was_stopped_for_long_kills_what_is_not_its_own_any_more() -> None:
    """Its lease ran out, nobody could tell it anything, and its slot would be lost for ages."""

    async def story(it: Story) -> Status:
        number = await it.running(Script(seconds=AGES))
        it.agent.pause(200)
        assert (await it.ended(number)).cause is Cause.AGENT_LOST
        await it.executing_nothing()
        return it.cluster.disk.runs[number].status

    assert told(story) is Status.INTERRUPTED


def test_an_agent_that_takes_long_to_find_its_runs_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seed 309: it owned a run again before it was heard of for the first time."""

    async def forget_slowly(machine: AgentsMachine, incarnations: Sequence[Incarnation]) -> None:
        if len(incarnations) == 1:
            await asyncio.sleep(50)

    async def story(it: Story) -> list[str]:
        number = await it.running(Script(seconds=300))
        monkeypatch.setattr(AgentsMachine, "remember", forget_slowly)
        it.agent.kill(away_seconds=1)
        await it.ended(number)
        events = await (await it.cluster.store()).history(number)
        return [event.type for event in events]

    assert EventType.RUN_LOST not in told(story)


def test_a_kill_reaches_the_agent_though_its_gateway_dies_right_after_storing_it() -> None:
    """The relay tells the agent, too."""

    async def story(it: Story) -> Status:
        number = await it.running(Script(seconds=AGES))
        await it.client.ask(lambda door: store_only(door, number))
        return (await it.ended(number)).status

    async def store_only(door: Door, number: int) -> None:
        await door.store.apply(number, [Kill()])

    assert told(story) is Status.KILLED


def test_a_run_launched_into_a_workflow_that_ends_does_not_stay_behind() -> None:
    """Seed 100225: its launcher died after storing it, before it looked at the master again."""

    async def story(it: Story) -> Status:
        master = RunRequest(command=Script(seconds=AGES).command())
        workflow, managing_run = await it.client.launch_workflow(master, "master")
        await it.client.wait(managing_run, (Status.RUNNING,))
        await it.client.ask(lambda door: door.runs.kill_workflow(workflow, OWNER))
        worker = NewRun(100, OWNER, RunSpec(Script(seconds=AGES).command()), workflow)
        await it.client.ask(lambda door: door.store.create([worker]))
        return (await it.ended(100)).status

    assert told(story) is Status.KILLED


def test_a_follower_of_a_log_reads_it_to_the_end_though_hints_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seed 1064: the hint that the last lines are there was lost."""
    monkeypatch.setattr(ChaoticBus, "log_grew", lambda bus, number, length: None)

    async def story(it: Story) -> list[str]:
        record = it.client.record
        number = await it.launch(Script(lines=(0.1, 0.1), seconds=5))
        await it.client.follow(number)
        return [entry.log for entry in record.logs[0][1]]

    log = told(story)
    assert "line 1 of run 1" in log
    assert log[-1] == "Run 1 complete"


@pytest.mark.parametrize(
    "lack",
    [
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("can't start new thread"),
    ],
)
def test_outputs_are_saved_once_there_is_again_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    scan = AgentsMachine.scan
    lacks = [lack, lack]

    async def scan_in_need(machine: AgentsMachine, *arguments: Any) -> Scan:
        if lacks:
            raise lacks.pop()
        return await scan(machine, *arguments)

    monkeypatch.setattr(AgentsMachine, "scan", scan_in_need)

    async def story(it: Story) -> Run:
        return await it.ended(await it.launch(Script(code=3, outputs=2)))

    run = told(story)
    assert (run.status, run.user_exit_code, run.outputs_files) == (Status.COMPLETE, 3, 2)
