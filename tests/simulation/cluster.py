"""A cluster in a simulated world: agents and gateways of their own over one store and one bus."""

import asyncio

import anyio

from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.outbox import Outbox
from spellq.ports import EventLog, Store
from spellq.seal import Sealer
from spellq_brokers.embedded import SqliteStore
from spellq_workers.agent import Agent, AgentSettings
from tests.simulation.chaos import ChaoticBus
from tests.simulation.gateway import Door, Gateway, Gateways
from tests.simulation.installation import (
    MASTER_SLOTS,
    strike_machine,
    strike_service,
    strike_store,
)
from tests.simulation.loop import Process
from tests.simulation.machine import AgentsMachine, SimExecutor, SimMachine
from tests.simulation.network import Log, Remote, RemoteLog
from tests.simulation.service import Service
from tests.simulation.store import Disk, SimArtifacts, StoresWriter
from tests.simulation.world import SimClock, World


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

    async def log(self) -> EventLog:
        return RemoteLog(self._world, self._log)

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
        return Remote(self._world, self._store)  # type: ignore[return-value]

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
            async with anyio.create_task_group() as tasks:
                await tasks.start(agent.run)
                self._world.tell(f"{process.name} serves")
                await leave.wait()
                tasks.cancel_scope.cancel()

        return Service(self._world, f"agent{number}", live, away_seconds=200.0)

    async def _live_as_gateway(self, process: Process, leave: asyncio.Event) -> None:
        world, bus, artifacts = self._world, self._bus, self._artifacts
        clock = SimClock(world)
        store = self._remote()
        outbox = Outbox(store, bus)
        feed = Feed(store, RemoteLog(world, self._log), bus, clock)
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
