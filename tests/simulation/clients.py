"""Simulated clients: they launch, wait, stop, kill, label and follow, and never give up.

A client checks every answer it gets as soon as the end of the run is known.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from spellq.control.errors import Conflict, Rejected
from spellq.events import BEGINNING, Cursor, EventFilter
from spellq.gateway.services import Services
from spellq.gateway.socket import _Watch
from spellq.gateway.streams import _lines
from spellq.logs import LogEntry
from spellq.ports import StoreUnavailable
from spellq.runs import FINAL, Run, Status, reached
from spellq.wire import EndedElsewhere, LogLine, Reached, RunRequest, ServerMessage, Wait
from tests.simulation.gateway import ConnectionCut, Door, Gateways
from tests.simulation.loop import Process, current_process
from tests.simulation.machine import Script
from tests.simulation.store import Disk
from tests.simulation.world import World

T = TypeVar("T")

OWNER: Final = "ada"
_WAITED_FOR: Final = (
    FINAL, FINAL, FINAL, (Status.RUNNING,), (Status.SAVING, Status.KILLING), (Status.COMPLETE,),
    (Status.BUILDING,), (Status.STOPPING, Status.MOUNT_FAILED),
)  # fmt: skip

_ENDLESS: Final = 1e6

_line = msgspec.json.Decoder(LogLine)


class Client:
    """One client; `world.random` says what it wants."""

    def __init__(
        self, world: World, gateways: Gateways, record: "Record", disk: Disk, name: str
    ) -> None:
        self._world = world
        self._gateways = gateways
        self._disk = disk
        self._record = record
        self.name = name

    # Asking

    async def ask(self, handle: Callable[[Door], Awaitable[T]], *, stream: bool = False) -> T:
        """Ask until there is an answer; a repeat after a lost answer is the same request."""
        world = self._world
        while True:
            gateway = await self._gateways.any()
            patience = None
            if not world.faults_are_over and world.chance(0.1):
                patience = world.moment(0.0005, 1.0)
            try:
                return await gateway.serve(handle, patience, stream=stream)
            except (ConnectionCut, StoreUnavailable):
                await world.take_time(0.01, 1.0)

    async def launch(self, requests: Sequence[RunRequest], command_id: str) -> list[int]:
        async def handle(door: Door) -> list[Run]:
            return await door.launcher.launch(requests, OWNER, command_id, sees=OWNER)

        runs = await self._until_served(handle)
        return self._accepted(runs)

    async def launch_workflow(self, request: RunRequest, command_id: str) -> tuple[int, int]:
        async def handle(door: Door) -> tuple[int, Run]:
            workflow, run = await door.launcher.launch_workflow(
                request, OWNER, command_id, sees=OWNER
            )
            return workflow.id, run

        workflow, run = await self._until_served(handle)
        self._accepted([run])
        return workflow, run.id

    async def _until_served(self, handle: Callable[[Door], Awaitable[T]]) -> T:
        """Where every agent is lost nothing is served; people try again then."""
        while True:
            try:
                return await self.ask(handle)
            except Conflict:
                raise
            except Rejected as error:
                if not self._record.agents_may_be_lost:
                    raise
                self._world.tell(f"{self.name}: {error}")
                await self._world.take_time(1.0, 5.0)

    def _accepted(self, runs: Sequence[Run]) -> list[int]:
        numbers = [run.id for run in runs]
        self._world.tell(f"{self.name}: launched {numbers}")
        self._record.accepted.extend(numbers)
        return numbers

    async def wait(self, number: int, statuses: tuple[Status, ...]) -> Status | None:
        """As the event socket answers: the status reached, or None for another end."""
        open_wait = (number, statuses, current_process())
        self._record.waits_open.append(open_wait)

        async def handle(door: Door) -> ServerMessage:
            answer: asyncio.Future[ServerMessage] = self._world.loop.create_future()
            watch = _Watch(door.feed, Wait(1, number, statuses), _give(answer))
            try:
                watch.look(await door.runs.get(number, OWNER))
                return await answer
            finally:
                watch.stop()

        answer = await self.ask(handle, stream=True)
        assert isinstance(answer, Reached | EndedElsewhere)
        self._world.tell(f"{self.name}: run {number} {answer}")
        self._record.waits_open.remove(open_wait)
        self._record.waits.append((number, statuses, answer))
        return answer.status if isinstance(answer, Reached) else None

    async def follow(self, number: int) -> None:
        """Read the run's log to its end, coming back from where the answer broke off."""
        entries: list[LogEntry] = []

        async def handle(door: Door) -> bool:
            services = cast(Services, door)
            async for chunk in _lines(services, number, len(entries), follow=True):
                for text in chunk.splitlines():
                    line = _line.decode(text)
                    if line.offset != len(entries):
                        self._world.violated("faults", f"log of run {number} jumps to {line}")
                    entries.append(line.entry)
            return (await door.runs.get(number, OWNER)).is_final

        while not await self.ask(handle, stream=True):
            pass
        self._record.logs.append((number, entries))

    async def subscribe(self) -> None:
        """Read every event to the end of the history, coming back with the cursor."""
        cursor: Cursor = BEGINNING
        seen = self._record.subscriptions.setdefault(self.name, [])

        async def handle(door: Door) -> None:
            nonlocal cursor
            async for logged in door.feed.events(EventFilter(owner=OWNER), cursor):
                cursor = logged.cursor
                seen.append((logged.event.run, logged.event.version))

        while True:
            await self.ask(handle, stream=True)

    # Whole lives

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
        numbers = await self.launch(requests, f"{world.random.getrandbits(64):x}")
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                self._look_after(number, tasks)
            if endless:
                await world.take_time(1.0, 40.0)
                await self._order(numbers[0], world.random.choice(("stop", "kill")))

    def _look_after(self, number: int, tasks: asyncio.TaskGroup) -> None:
        world = self._world
        tasks.create_task(self.wait(number, FINAL))
        for _ in range(world.random.randint(0, 2)):
            tasks.create_task(self.wait(number, world.random.choice(_WAITED_FOR)))
        if world.chance(0.4):
            tasks.create_task(self.follow(number))
        if world.chance(0.4):
            tasks.create_task(self._interfere(number))

    async def _workflow(self) -> None:
        world = self._world
        endless = world.chance(0.3)
        script = Script(master=True, endless=endless)
        workflow, master = await self.launch_workflow(
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
            numbers = await self.launch(requests, command_id)
        except Rejected:
            return 1
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                tasks.create_task(self.wait(number, FINAL))
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

        self._world.tell(f"{self.name}: {what} run {number}")
        await self.ask(handle)

    async def _end_workflow(self, workflow: int) -> None:
        world = self._world
        await world.take_time(0.01, 20.0)
        kill = world.chance(0.5)
        world.tell(f"{self.name}: {'kill' if kill else 'stop'} workflow {workflow}")
        await self.ask(lambda door: door.runs.end_workflow(workflow, OWNER, kill=kill))

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


class Record:
    """What clients were told, to be compared with what is."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.waits: list[tuple[int, tuple[Status, ...], Reached | EndedElsewhere]] = []
        self.waits_open: list[tuple[int, tuple[Status, ...], Process | None]] = []
        self.logs: list[tuple[int, list[LogEntry]]] = []
        self.subscriptions: dict[str, list[tuple[int, int]]] = {}
        self.agents_may_be_lost = False


def _endless_request(workflow: int | None) -> RunRequest:
    script = Script(seconds=_ENDLESS)
    return RunRequest(command=script.command(), workflow_id=workflow, grace_seconds=1.0)


def right_answer(run: Run, statuses: tuple[Status, ...]) -> Reached | EndedElsewhere:
    """What whoever waited for `statuses` has to be told, of a run that has ended."""
    status = reached(run, statuses)
    return EndedElsewhere(1, run.status) if status is None else Reached(1, status)


def _give(answer: "asyncio.Future[ServerMessage]") -> Callable[[ServerMessage], None]:
    def give(message: ServerMessage) -> None:
        if not answer.done():
            answer.set_result(message)

    return give
