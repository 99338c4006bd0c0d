"""A simulated client: it asks until it is answered, and notes what it was told."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar, cast

import msgspec

from spellq.control.errors import Conflict, Rejected
from spellq.events import BEGINNING, Cursor, EventFilter
from spellq.gateway.services import Services
from spellq.gateway.socket import _Watch
from spellq.gateway.streams import _lines
from spellq.logs import LogEntry
from spellq.ports import StoreUnavailable
from spellq.runs import Run, Status, reached
from spellq.wire import EndedElsewhere, LogLine, Reached, RunRequest, ServerMessage, Wait
from tests.simulation.gateway import ConnectionCut, Door, Gateways
from tests.simulation.loop import Process, current_process
from tests.simulation.world import World

T = TypeVar("T")

OWNER: Final = "ada"

_line = msgspec.json.Decoder(LogLine)


class Record:
    """What clients were told, to be compared with what is."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.asked_for = 0
        self.waits: list[tuple[int, tuple[Status, ...], Reached | EndedElsewhere]] = []
        self.waits_open: list[tuple[int, tuple[Status, ...], Process | None]] = []
        self.logs: list[tuple[int, list[LogEntry]]] = []
        self.subscriptions: dict[str, list[tuple[int, int]]] = {}
        self.agents_may_be_lost = False


class Client:
    """One client; `world.random` says what it wants."""

    def __init__(self, world: World, gateways: Gateways, record: Record, name: str) -> None:
        self.name = name
        self.record = record
        self._world = world
        self._gateways = gateways

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

        self.record.asked_for += len(requests)
        return self._accepted(await self._until_served(handle))

    async def launch_workflow(self, request: RunRequest, command_id: str) -> tuple[int, int]:
        async def handle(door: Door) -> tuple[int, Run]:
            workflow, run = await door.launcher.launch_workflow(
                request, OWNER, command_id, sees=OWNER
            )
            return workflow.id, run

        self.record.asked_for += 1
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
                if not self.record.agents_may_be_lost:
                    raise
                self._world.tell(f"{self.name}: {error}")
                await self._world.take_time(1.0, 5.0)

    def _accepted(self, runs: Sequence[Run]) -> list[int]:
        numbers = [run.id for run in runs]
        self._world.tell(f"{self.name}: launched {numbers}")
        self.record.accepted.extend(numbers)
        return numbers

    async def wait(self, number: int, statuses: tuple[Status, ...]) -> Status | None:
        """As the event socket answers: the status reached, or None for another end."""
        open_wait = (number, statuses, current_process())
        self.record.waits_open.append(open_wait)

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
        self.record.waits_open.remove(open_wait)
        self.record.waits.append((number, statuses, answer))
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
        self.record.logs.append((number, entries))

    async def subscribe(self) -> None:
        """Read every event to the end of the history, coming back with the cursor."""
        cursor: Cursor = BEGINNING
        seen = self.record.subscriptions.setdefault(self.name, [])

        async def handle(door: Door) -> None:
            nonlocal cursor
            async for logged in door.feed.events(EventFilter(owner=OWNER), cursor):
                cursor = logged.cursor
                seen.append((logged.event.run, logged.event.version))

        while True:
            await self.ask(handle, stream=True)


def right_answer(run: Run, statuses: tuple[Status, ...]) -> Reached | EndedElsewhere:
    """What whoever waited for `statuses` has to be told, of a run that has ended."""
    status = reached(run, statuses)
    return EndedElsewhere(1, run.status) if status is None else Reached(1, status)


def _give(answer: "asyncio.Future[ServerMessage]") -> Callable[[ServerMessage], None]:
    def give(message: ServerMessage) -> None:
        if not answer.done():
            answer.set_result(message)

    return give
