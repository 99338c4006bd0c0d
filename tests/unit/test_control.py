"""Launching and ending, in one process and without an agent: what comes in between."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from spellq.control import launch
from spellq.control.errors import Conflict, NotFound, Rejected
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.lifecycle import Advance, Claim, End, Kill
from spellq.outbox import Outbox
from spellq.ports import AgentInfo, NewRun
from spellq.runs import MASTER_QUEUE, MAX_NUMBER, Run, Status
from spellq.seal import Sealer
from spellq.trees import Tree, TreeEntry, encode_tree
from spellq.wire import RunRequest
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from tests.clocks import HandClock

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class World:
    def __init__(self, store: SqliteStore, artifacts: DiskArtifacts, clock: HandClock) -> None:
        self.store = store
        self.clock = clock
        self.artifacts = artifacts
        bus = InProcessBus()
        self.outbox = Outbox(store, bus)
        self.runs = Runs(store, self.outbox)
        self.outputs = SavedOutputs(store, artifacts, entries=100)
        self.launcher = Launcher(
            store, self.outbox, artifacts, Sealer(bytes(32)), clock, self.runs, self.outputs
        )

    async def serve(self, **slots: int) -> None:
        await self.store.renew(AgentInfo("box.1", "box", slots, "0"), 10)

    async def launch(
        self, *, owner: str = "ada", sees: str | None = "ada", **request: object
    ) -> Run:
        asked = RunRequest(command="true", **request)  # type: ignore[arg-type]
        (run,) = await self.launcher.launch([asked], owner, self.clock.fresh_id(), sees=sees)
        return run

    async def workflow(self) -> int:
        workflow, _ = await self.launcher.launch_workflow(
            RunRequest(command="true"), "ada", self.clock.fresh_id(), sees="ada"
        )
        return workflow.id

    async def saved(self, tree: Tree) -> int:
        """A run of ada's that has saved the tree."""
        tree_id, data = encode_tree(tree)
        await self.artifacts.put_bytes(data)
        run = await self.launch()
        await self.store.apply(
            run.id,
            [
                Claim(1, "box.1", "cpu-0", "claim"),
                Advance(1, Status.RUNNING),
                Advance(1, Status.SAVING),
                Advance(1, Status.PUSHING),
                End(1, user_exit_code=0, outputs=tree_id),
            ],
        )
        return run.id


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = HandClock()
    store = await SqliteStore.in_memory(clock)
    world = World(store, await DiskArtifacts.make(tmp_path), clock)
    await world.serve(cpu=1, **{MASTER_QUEUE: 16})
    yield world
    await store.close()


@pytest.mark.parametrize("kill", [False, True])
async def test_a_run_made_while_its_workflow_is_ended_is_ended_too(
    world: World, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    """The launcher has looked, then the workflow is ended, then the launcher creates."""
    number = await world.workflow()
    create = world.outbox.create

    async def end_first(new: Sequence[NewRun]) -> list[Run]:
        await (world.runs.kill_workflow if kill else world.runs.stop_workflow)(number, "ada")
        return await create(new)

    monkeypatch.setattr(world.outbox, "create", end_first)
    with pytest.raises(Conflict, match=f"Workflow {number} takes no more runs"):
        await world.launch(workflow_id=number)
    _, master, (worker,) = await world.runs.workflow(number, None)
    assert (master.status, worker.status) == (Status.KILLED, Status.KILLED)


async def test_a_workflow_whose_master_is_over_takes_no_runs(world: World) -> None:
    number = await world.workflow()
    await world.launch(workflow_id=number)
    workflow, master, _ = await world.runs.workflow(number, "ada")
    await world.store.apply(master.id, [Kill()])
    with pytest.raises(Conflict, match=r"managing run \d+ is killed"):
        await world.launch(workflow_id=workflow.id)
    assert len((await world.runs.workflow(number, "ada"))[2]) == 1


async def test_who_sees_a_workflow_may_launch_into_it(world: World) -> None:
    number = await world.workflow()
    assert (await world.launch(owner="root", sees=None, workflow_id=number)).workflow == number
    with pytest.raises(NotFound, match=f"There is no workflow {number}"):
        await world.launch(owner="bob", sees="bob", workflow_id=number)


async def test_who_sees_outputs_may_mount_them(world: World) -> None:
    run = await world.saved(Tree((TreeEntry("a", 0, EMPTY),)))
    mounts = {f"runs/{run}/a": "/m"}
    mounted = await world.launch(owner="root", sees=None, attached_resources=mounts)
    assert [mount.target for mount in mounted.spec.mounts] == ["/m"]
    with pytest.raises(NotFound, match=f"there is no run {run}"):
        await world.launch(owner="bob", sees="bob", attached_resources=mounts)


async def test_masters_are_no_machine_type(world: World) -> None:
    with pytest.raises(Rejected, match="is no machine type"):
        await world.launch(machine_type="Masters")
    with pytest.raises(Rejected, match=r"here: cpu\. Serve it with: .* cpu=\d+,k80$"):
        await world.launch(machine_type="k80")


async def test_an_agent_that_was_stopped_for_a_while_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was stopped with its agent in it; a client is there before the next heartbeat."""
    monkeypatch.setattr(launch, "HEARD_AGAIN_SECONDS", 0.01)
    world.clock.pass_seconds(60)
    assert await world.store.agents() == []
    launching = asyncio.create_task(world.launch())
    await asyncio.sleep(0)
    await world.serve(cpu=1)
    assert (await launching).status is Status.MACHINE_REQUESTED


async def test_a_workflow_wants_a_slot_for_masters(world: World) -> None:
    await world.serve(cpu=1, **{MASTER_QUEUE: 0})
    with pytest.raises(Rejected, match="SPELLQ_MASTER_SLOTS=16"):
        await world.workflow()
    assert await world.store.get_workflow(1) is None


async def test_numbers_beyond_all_runs_are_of_none(world: World) -> None:
    for number in (MAX_NUMBER + 1, 10**30, 0, -1, -(10**30)):
        with pytest.raises(NotFound):
            await world.runs.get(number, None)
        with pytest.raises(NotFound):
            await world.runs.workflow(number, None)


async def test_labels_have_limits(world: World) -> None:
    run = await world.launch(labels=tuple(str(number) for number in range(100)))
    with pytest.raises(Rejected, match="at most 100 labels, not 101"):
        await world.runs.label(run.id, None, ("another",), ())
    assert "another" in (await world.runs.label(run.id, None, ("another",), ("7",))).labels
    with pytest.raises(Rejected, match="A label is empty"):
        await world.runs.label(run.id, None, (" ",), ())


async def test_all_runs_are_listed(world: World) -> None:
    requests = [RunRequest(command="true")] * 500
    for _ in range(5):
        await world.launcher.launch(requests, "ada", world.clock.fresh_id(), sees="ada")
    rows = await world.outputs.ls("runs", "ada")
    assert [row.path for row in rows] == [f"{number}/" for number in range(2500, 0, -1)]
    assert await world.outputs.ls("runs", "bob") == []


async def test_trees_used_last_stay_in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = [
        Tree(tuple(TreeEntry(f"{name}{n:03}", 0, EMPTY) for n in range(count)))
        for name, count in (("a", 40), ("b", 40), ("c", 40), ("huge", 2000))
    ]
    runs = [await world.saved(tree) for tree in trees]
    read: list[str] = []
    get_bytes = world.artifacts.get_bytes

    async def counted(sha256: str) -> bytes:
        read.append(sha256)
        return await get_bytes(sha256)

    monkeypatch.setattr(world.artifacts, "get_bytes", counted)

    async def reads(*places: int) -> int:
        read.clear()
        for place in places:
            assert await world.outputs.subtree(f"runs/{runs[place]}", "ada") == trees[place]
        return len(read)

    assert await reads(0, 1) == 2
    assert await reads(0, 1, 0) == 0
    assert await reads(2) == 1  # and 1, not used for the longest time, goes
    assert await reads(0, 2) == 0
    assert await reads(1) == 1
    assert await reads(3, 3) == 2  # too large to be kept, and drives nothing out
    assert await reads(1, 2) == 0
    names = await world.outputs.ls(f"runs/{runs[3]}", "ada")
    assert len(names) == 2000


async def test_a_run_waits_for_what_all_its_agents_lack(world: World) -> None:
    run = await world.launch()
    short = AgentInfo("box.1", "box", {"cpu": 1}, "0", "disk space: none")
    await world.store.renew(short, 10)
    await world.store.renew(AgentInfo("box.2", "box", {"t4": 1}, "0"), 10)
    (told,) = await world.runs.explained([run])
    assert told.reason == "Waiting for disk space: none."
    ended, _ = await world.runs.kill(run.id, "ada")
    assert await world.runs.explained([ended]) == [ended]
    await world.store.renew(AgentInfo("box.3", "box", {"cpu": 1}, "0"), 10)
    assert await world.runs.explained([run]) == [run]


@pytest.mark.parametrize("seconds", [-1, 86_401, float("nan")])
async def test_a_stop_with_a_grace_that_cannot_be_changes_nothing(
    world: World, seconds: float
) -> None:
    run = await world.launch()
    with pytest.raises(Rejected, match="grace"):
        await world.runs.stop(run.id, "ada", seconds)
    assert await world.runs.get(run.id, "ada") == run
