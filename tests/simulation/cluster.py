"""A cluster in a simulated world: agents and gateways of their own over one store and one bus.

The store and the bus are simulated as what they will be: engines across a network, which outlive
every process. Each call takes its time, and the caller may die before it or after it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import msgspec

from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.events import BEGINNING, Cursor, Logged
from spellq.outbox import Outbox
from spellq.ports import Committed, Store, StoreUnavailable, Ticket, TicketSource
from spellq.seal import Sealer
from spellq_brokers.embedded import SqliteStore
from spellq_workers.agent import Agent, AgentSettings
from tests.simulation.gateway import Door, Gateway, Gateways
from tests.simulation.installation import (
    MASTER_SLOTS,
    strike_machine,
    strike_service,
    strike_store,
)
from tests.simulation.loop import Process, current_process
from tests.simulation.machine import AgentsMachine, SimExecutor, SimMachine
from tests.simulation.service import Service
from tests.simulation.store import Disk, SimArtifacts, StoresWriter
from tests.simulation.world import Signal, SimClock, World

SILENT_LINK_SECONDS: Final = 15.0
"""After that long the bus takes a consumer that does not answer for dead."""


class Remote:
    """Implements `spellq.ports.Store` across a network."""

    def __init__(self, world: World, store: Store, log: "Log") -> None:
        self._world = world
        self._store = store
        self._log = log

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **named: Any) -> Any:
            await self._reach(name)
            answer = await getattr(self._store, name)(*arguments, **named)
            await self._world.point(f"{name}, after")
            await self._world.take_time(0.0001, 0.005)
            return answer

        return call

    async def head(self) -> Cursor:
        await self._reach("head")
        return self._log.head

    async def events_after(self, cursor: Cursor, limit: int = 1000) -> list[Logged]:
        await self._reach("events_after")
        return self._log.after(cursor, limit)

    async def _reach(self, name: str) -> None:
        await self._world.point(f"{name}, before")
        await self._world.take_time(0.0001, 1.0 if self._world.chance(0.02) else 0.005)
        if self._world.store_is_away:
            raise StoreUnavailable("The store is away.")


class Log:
    """The stream: what was published, in the order in which it came, as often as it came."""

    def __init__(self) -> None:
        self.messages: list[Committed] = []
        self._events: list[Logged] = []

    @property
    def head(self) -> Cursor:
        return str(len(self._events))

    def after(self, cursor: Cursor, limit: int) -> list[Logged]:
        start = 0 if cursor == BEGINNING else int(cursor)
        return self._events[start : start + limit]

    def append(self, committed: Committed) -> None:
        logged = []
        for entry in committed.logged:
            self._events.append(Logged(str(len(self._events) + 1), entry.event))
            logged.append(self._events[-1])
        self.messages.append(msgspec.structs.replace(committed, logged=tuple(logged)))


class ChaoticBus:
    """Implements `spellq.ports.Bus`: late, twice and out of order, as its contract allows."""

    def __init__(self, world: World, log: Log) -> None:
        self._world = world
        self._log = log
        self._published = Signal(world.loop)
        self._queues: dict[str, _Queue] = {}
        self._readers: list[_Lengths] = []
        self._hinted: dict[str, list[asyncio.Event]] = {}

    async def publish(self, committed: Sequence[Committed]) -> None:
        for entry in committed:
            await self._reach("publish")
            self._append(entry)
            if self._world.chance(0.05):
                self._later(5.0, self._append, entry)
        await self._world.point("publish, after")

    def _append(self, entry: Committed) -> None:
        self._log.append(entry)
        self._published.give()

    async def offer(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            await self._reach("offer")
            self._queue(ticket.queue).put(ticket)
            if self._world.chance(0.1):
                self._later(30.0, self._queue(ticket.queue).put, ticket)
        await self._world.point("offer, after")

    @asynccontextmanager
    async def consume(self, queue: str) -> AsyncIterator[TicketSource]:
        source = _Source(self._world, self._queue(queue))
        try:
            yield source
        except BaseException:
            source.give_back()
            raise

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Sequence[Committed]]]:
        yield self._messages_from(len(self._log.messages))

    async def _messages_from(self, place: int) -> AsyncIterator[Sequence[Committed]]:
        messages = self._log.messages
        while True:
            known = place
            await self._published.until(lambda known=known: len(messages) > known)  # type: ignore[misc]
            await self._world.take_time(0.0005, 0.02)
            if self._world.chance(0.02) and not self._world.faults_are_over:
                place = max(0, place - 3)
            batch, place = tuple(messages[place:]), len(messages)
            yield batch

    def log_grew(self, number: int, length: int) -> None:
        for reader in self._readers:
            if not self._world.chance(0.1):
                self._later(0.05, reader.put, number, length)

    @asynccontextmanager
    async def log_lengths(self) -> AsyncIterator[AsyncIterator[tuple[int, int]]]:
        reader = _Lengths(self._world)
        self._readers.append(reader)
        try:
            yield reader.items()
        finally:
            self._readers.remove(reader)

    async def hint(self, agent: str) -> None:
        await self._reach("hint")
        for event in self._hinted.get(agent, ()):
            if not self._world.chance(0.3):
                self._later(0.05, event.set)

    @asynccontextmanager
    async def hints(self, agent: str) -> AsyncIterator[AsyncIterator[None]]:
        event = asyncio.Event()
        self._hinted.setdefault(agent, []).append(event)

        async def items() -> AsyncIterator[None]:
            while True:
                await event.wait()
                event.clear()
                yield

        yield items()

    async def _reach(self, name: str) -> None:
        await self._world.point(f"{name}, before")
        await self._world.take_time(0.0002, 1.0 if self._world.chance(0.05) else 0.01)
        if self._world.bus_is_away:
            raise StoreUnavailable("The bus is away.")

    def _later(self, longest: float, call: Callable[..., object], *arguments: Any) -> None:
        self._world.later(self._world.moment(0.001, longest), call, *arguments)

    def _queue(self, name: str) -> "_Queue":
        return self._queues.setdefault(name, _Queue())


class _Queue:
    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.waiting: list[_Source] = []

    def put(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        self.hand_out()

    def hand_out(self) -> None:
        while self.tickets and self.waiting:
            self.waiting.pop(0).receive(self.tickets.pop(0))


class _Source:
    """One consumer, with prefetch 1; the bus takes back what it holds when its process dies."""

    def __init__(self, world: World, queue: _Queue) -> None:
        self._world = world
        self._queue = queue
        self._process = current_process()
        self._delivery: _Delivery | None = None
        self._arrived: asyncio.Future[_Delivery] | None = None
        assert self._process is not None
        self._process.when_dead(self.give_back)

    async def take(self) -> "_Delivery":
        if self._delivery is not None and not self._delivery.acknowledged:
            raise RuntimeError("the delivery before has not been acknowledged yet")
        self._delivery = None
        self._arrived = self._world.loop.create_future()
        self._queue.waiting.append(self)
        self._queue.hand_out()
        return await self._arrived

    def receive(self, ticket: Ticket) -> None:
        self._delivery = _Delivery(self._world, self._queue, ticket)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(self._delivery)
        self._world.later(SILENT_LINK_SECONDS, self._look_at_link, self._delivery)

    def _look_at_link(self, delivery: "_Delivery") -> None:
        if self._process is not None and self._process.paused and not delivery.acknowledged:
            self._queue.put(delivery.ticket)

    def give_back(self) -> None:
        if self in self._queue.waiting:
            self._queue.waiting.remove(self)
        if self._delivery is not None and not self._delivery.acknowledged:
            delivery, self._delivery = self._delivery, None
            self._world.later(self._world.moment(0.001, 10.0), self._queue.put, delivery.ticket)


class _Delivery:
    def __init__(self, world: World, queue: _Queue, ticket: Ticket) -> None:
        self.ticket = ticket
        self.acknowledged = False
        self._world = world
        self._queue = queue

    async def ack(self) -> None:
        await self._world.point("ack, before")
        await self._world.take_time(0.0002, 0.01)
        if not self.acknowledged and self._world.chance(0.03):
            self._world.later(self._world.moment(0.01, 10.0), self._queue.put, self.ticket)
        self.acknowledged = True


class _Lengths:
    def __init__(self, world: World) -> None:
        self._lengths: dict[int, int] = {}
        self._filled = Signal(world.loop)

    def put(self, number: int, length: int) -> None:
        self._lengths[number] = length
        self._filled.give()

    async def items(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            await self._filled.until(lambda: bool(self._lengths))
            lengths, self._lengths = self._lengths, {}
            for item in lengths.items():
                yield item


class Cluster:
    """Implements `Installation`."""

    agents_may_be_lost = True

    def __init__(self, world: World, machines: int | None = None) -> None:
        self.gateways = Gateways(world)
        self.disk = Disk(world)
        self._world = world
        self._artifacts = SimArtifacts(world)
        self._sealer = Sealer(bytes(32))
        self._log = Log()
        self._bus = ChaoticBus(world, self._log)
        self._clock = SimClock(world)
        self._store: SqliteStore | None = None
        self._lost_after_seconds = world.random.choice((0.0, 5.0, 50.0))
        self.machines = []
        self._agents = []
        for number in range(machines or world.random.choice((1, 2, 2, 3))):
            machine = SimMachine(world, f"machine {number}", {"cpu": world.random.choice((1, 2))})
            self.machines.append(machine)
            self._agents.append(self._agent(machine, number))
        self._gateways = [
            Service(world, f"gateway{number}", self._live_as_gateway, away_seconds=20.0)
            for number in range(world.random.choice((1, 2)))
        ]
        self.services = [*self._agents, *self._gateways]

    async def start(self) -> None:
        self._store = await SqliteStore.over(StoresWriter(self.disk), self._clock, self.disk.log)
        for service in self.services:
            service.start()

    async def leave_in_peace(self) -> None:
        self._world.faults_are_over = True
        for service in self.services:
            service.have_peace()
        await self.gateways.any()

    async def store(self) -> Store:
        assert self._store is not None
        return self._store

    def strike(self) -> None:
        world = self._world
        what = world.random.random()
        if what < 0.6:
            strike_service(world, world.random.choice(self.services))
        elif what < 0.8:
            place = world.random.randrange(len(self.machines))
            strike_machine(world, self.machines[place], self._agents[place])
        elif what < 0.9:
            strike_store(world)
        else:
            seconds = world.moment(0.01, 8.0)
            world.tell(f"the bus is away for {seconds:.2f} s")
            world.take_bus_away(seconds)

    def _remote(self) -> Store:
        assert self._store is not None
        return Remote(self._world, self._store, self._log)  # type: ignore[return-value]

    def _agent(self, machine: SimMachine, number: int) -> Service:
        async def live(process: Process, leave: asyncio.Event) -> None:
            store = self._remote()
            settings = AgentSettings(
                name=f"box{number}", slots=machine.slots, master_slots=MASTER_SLOTS, gateway_url=""
            )
            agent = Agent(
                settings, store, self._bus, Outbox(store, self._bus), self._artifacts,
                SimExecutor(machine), AgentsMachine(machine), self._sealer, machine.clock,
            )  # fmt: skip
            self._world.incarnations[agent.info.id] = process
            async with anyio.create_task_group() as tasks:
                await tasks.start(agent.run)
                self._world.tell(f"{process.name} serves")
                await leave.wait()
                tasks.cancel_scope.cancel()

        return Service(self._world, f"agent{number}", live, away_seconds=200.0)

    async def _live_as_gateway(self, process: Process, leave: asyncio.Event) -> None:
        world, bus, clock, artifacts = (
            self._world,
            self._bus,
            SimClock(self._world),
            self._artifacts,
        )
        store = self._remote()
        outbox = Outbox(store, bus)
        feed = Feed(store, bus, clock)
        supervisor = Supervisor(
            store, bus, outbox, feed, clock, lost_after_seconds=self._lost_after_seconds
        )
        runs = Runs(store, outbox)
        outputs = SavedOutputs(store, artifacts)
        launcher = Launcher(store, outbox, artifacts, self._sealer, clock, runs, outputs)
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            tasks.start_soon(supervisor.run)
            gateway = Gateway(world, process, Door(store, feed, launcher, runs))
            self.gateways.add(gateway)
            world.tell(f"{process.name} serves")
            await leave.wait()
            gateway.close()
            tasks.cancel_scope.cancel()
