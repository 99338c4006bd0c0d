"""What simulated clients want: runs and workflows, their ends, their logs, and to interfere."""

import asyncio
from typing import Any, Final

from spellq.control.errors import Rejected
from spellq.runs import FINAL, Status
from spellq.wire import RunRequest
from tests.simulation.client import OWNER, Client
from tests.simulation.gateway import Door
from tests.simulation.machine import Script
from tests.simulation.store import Disk
from tests.simulation.world import World

_WAITED_FOR: Final = (
    FINAL, FINAL, FINAL, (Status.RUNNING,), (Status.SAVING, Status.KILLING), (Status.COMPLETE,),
    (Status.BUILDING,), (Status.STOPPING, Status.MOUNT_FAILED),
)  # fmt: skip

_ENDLESS_SECONDS: Final = 1e6


class Life:
    """One client's; `world.random` says what it wants."""

    def __init__(self, world: World, client: Client, disk: Disk) -> None:
        self._world = world
        self._client = client
        self._disk = disk

    async def live(self) -> None:
        """Launch some runs and see each to its end."""
        world = self._world
        async with asyncio.TaskGroup() as tasks:
            for _ in range(world.random.randint(1, 3)):
                await world.take_time(0.001, 20.0)
                if world.chance(0.25):
                    tasks.create_task(self._workflow())
                else:
                    tasks.create_task(self._batch())

    async def _batch(self) -> None:
        world = self._world
        requests = [self._request(None) for _ in range(world.random.choice((1, 1, 2, 3)))]
        endless = world.chance(0.1)
        if endless:
            requests[0] = _endless_request(None)
        numbers = await self._client.launch(requests, f"{world.random.getrandbits(64):x}")
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                self._look_after(number, tasks)
            if endless:
                await world.take_time(1.0, 40.0)
                await self._order(numbers[0], world.random.choice(("stop", "kill")))

    def _look_after(self, number: int, tasks: asyncio.TaskGroup) -> None:
        world = self._world
        tasks.create_task(self._client.wait(number, FINAL))
        for _ in range(world.random.randint(0, 2)):
            tasks.create_task(self._client.wait(number, world.random.choice(_WAITED_FOR)))
        if world.chance(0.4):
            tasks.create_task(self._client.follow(number))
        if world.chance(0.4):
            tasks.create_task(self._interfere(number))

    async def _workflow(self) -> None:
        world = self._world
        endless = world.chance(0.3)
        script = Script(master=True, endless=endless)
        workflow, master = await self._client.launch_workflow(
            RunRequest(command=script.command()), f"{world.random.getrandbits(64):x}"
        )
        async with asyncio.TaskGroup() as tasks:
            self._look_after(master, tasks)
            if endless or world.chance(0.2):
                tasks.create_task(self._end_workflow(workflow))

    async def as_master(self, workflow: int, command_id: str, *, endless: bool) -> int:
        """What a master's script does: launch workers and wait for them; its exit code."""
        requests = [self._request(workflow), self._request(workflow)]
        if endless:
            requests[0] = _endless_request(workflow)
        try:
            numbers = await self._client.launch(requests, command_id)
        except Rejected:
            return 1
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                tasks.create_task(self._client.wait(number, FINAL))
        return 0

    async def _interfere(self, number: int) -> None:
        """Stop it, kill it or label it, at some time, once or twice."""
        world = self._world
        for _ in range(world.random.randint(1, 2)):
            await world.take_time(0.001, 30.0)
            await self._order(number, world.random.choice(("stop", "kill", "label")))

    async def _order(self, number: int, what: str) -> None:
        async def handle(door: Door) -> Any:
            if what == "stop":
                return await door.runs.stop(number, OWNER)
            if what == "kill":
                return await door.runs.kill(number, OWNER)
            return await door.runs.label(number, OWNER, ("seen",), ())

        self._world.tell(f"{self._client.name}: {what} run {number}")
        await self._client.ask(handle)

    async def _end_workflow(self, workflow: int) -> None:
        world = self._world
        await world.take_time(0.01, 20.0)
        kill = world.chance(0.5)
        world.tell(f"{self._client.name}: {'kill' if kill else 'stop'} workflow {workflow}")
        if kill:
            await self._client.ask(lambda door: door.runs.kill_workflow(workflow, OWNER))
        else:
            await self._client.ask(lambda door: door.runs.stop_workflow(workflow, OWNER))

    def _request(self, workflow: int | None) -> RunRequest:
        random = self._world.random
        script = Script(
            seconds=random.choice((0.0, 0.0, 0.01, 0.5, 4.0, 7.0, 60.0)),
            code=random.choice((0, 0, 0, 3)),
            lines=tuple(random.choice((0.0, 0.001, 0.3)) for _ in range(random.randint(0, 4))),
            heeds=random.choice((0.0, 0.0, 2.0, None)),
            outputs=random.choice((0, 0, 1, 2)),
        )
        return RunRequest(
            command=script.command(),
            labels=("simulated",),
            workflow_id=workflow,
            attached_resources=self._mounts(),
            timeout_minutes=random.choice((None, None, None, 0.1, 0.5)),
            grace_seconds=random.choice((0.0, 1.0, 5.0)),
        )

    def _mounts(self) -> dict[str, str]:
        saved = [run.id for run in self._disk.runs.values() if run.outputs]
        if not saved or self._world.chance(0.7):
            return {}
        return {f"runs/{self._world.random.choice(saved)}": "/spell/input"}


def _endless_request(workflow: int | None) -> RunRequest:
    script = Script(seconds=_ENDLESS_SECONDS)
    return RunRequest(command=script.command(), workflow_id=workflow, grace_seconds=1.0)
