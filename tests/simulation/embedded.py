"""An embedded installation in a simulated world: one daemon on one machine, again and again."""

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
from spellq_brokers.embedded import InProcessBus, SqliteStore
from spellq_workers.agent import Agent, AgentSettings
from tests.simulation.gateway import Door, Gateway, Gateways
from tests.simulation.installation import (
    MASTER_SLOTS,
    strike_machine,
    strike_service,
    strike_store,
)
from tests.simulation.loop import Process
from tests.simulation.machine import AgentsMachine, SimExecutor, SimMachine
from tests.simulation.service import Service
from tests.simulation.store import Disk, SimArtifacts, SimWriter
from tests.simulation.world import World


class Embedded:
    """Implements `Installation`. Killed, the daemon is started again by the next client."""

    agents_may_be_lost = False

    def __init__(self, world: World) -> None:
        self.gateways = Gateways(world)
        self.disk = Disk(world)
        self.machines = [SimMachine(world, "the machine", {"cpu": world.random.choice((1, 2, 3))})]
        self._daemon = Service(world, "daemon", self._live, away_seconds=120.0)
        self.services = [self._daemon]
        self._serving: SqliteStore | None = None
        self._world = world
        self._machine = self.machines[0]
        self._artifacts = SimArtifacts(world)
        self._sealer = Sealer(bytes(32))

    async def start(self) -> None:
        self._daemon.start()

    async def leave_in_peace(self) -> None:
        self._world.faults_are_over = True
        self._daemon.have_peace()
        await self.gateways.any()

    async def store(self) -> Store:
        assert self._serving is not None
        return self._serving

    async def log(self) -> EventLog:
        assert self._serving is not None
        return self._serving

    def strike(self) -> None:
        what = self._world.random.random()
        if what < 0.5:
            strike_service(self._world, self._daemon)
        elif what < 0.85:
            strike_machine(self._world, self._machine, self._daemon)
        else:
            strike_store(self._world)

    async def _live(self, process: Process, leave: asyncio.Event) -> None:
        """The daemon, as `spellq.compose` puts it together."""
        world, machine = self._world, self._machine
        clock, artifacts = machine.clock, self._artifacts
        store = await SqliteStore.over(SimWriter(world, self.disk), clock, self.disk.log)
        bus = InProcessBus()
        outbox = Outbox(store, bus)
        feed = Feed(store, store, bus, clock)
        supervisor = Supervisor(store, bus, outbox, feed, clock)
        executor = SimExecutor(machine)
        settings = AgentSettings(
            name="local", slots=machine.slots, master_slots=MASTER_SLOTS, gateway_url=""
        )
        agent = Agent(
            settings, store, bus, outbox, artifacts, executor, AgentsMachine(machine),
            self._sealer, clock,
        )  # fmt: skip
        runs = Runs(store, outbox)
        outputs = SavedOutputs(store, artifacts)
        launcher = Launcher(store, outbox, artifacts, self._sealer, clock, runs, outputs)
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            await tasks.start(agent.run)
            await supervisor.refill()
            tasks.start_soon(supervisor.run)
            gateway = Gateway(world, process, Door(store, feed, launcher, runs))
            self._serving = store
            self.gateways.add(gateway)
            world.tell(f"{process.name} serves")
            await leave.wait()
            gateway.close()
            tasks.cancel_scope.cancel()
        await executor.close()
        await store.close()
