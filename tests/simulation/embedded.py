"""An embedded installation in a simulated world: one daemon on one machine, again and again."""

import asyncio
from typing import Final

import anyio

from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.outbox import Outbox
from spellq.ports import Store, StoreUnavailable
from spellq.runs import MASTER_QUEUE
from spellq.seal import Sealer
from spellq_brokers.embedded import InProcessBus, SqliteStore
from spellq_workers.agent import Agent, AgentSettings
from tests.simulation.gateway import Door, Gateway, Gateways
from tests.simulation.loop import Process
from tests.simulation.machine import AgentsMachine, SimExecutor, SimMachine
from tests.simulation.store import Disk, SimArtifacts, SimWriter
from tests.simulation.world import SimClock, World

LONGEST_START: Final = 40.0


class Embedded:
    """The daemon of one home. Killed, it is started again by the next client."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.gateways = Gateways(world)
        self.disk = Disk(world)
        self.machine = SimMachine(world, "machine")
        self.slots = {"cpu": world.random.choice((1, 2, 3))}
        self.store: Store | None = None
        self._artifacts = SimArtifacts(world)
        self._sealer = Sealer(bytes(32))
        self._master_slots = 2
        self._daemon: Process | None = None
        self._leave = asyncio.Event()
        self._lives = 0

    # What a history does to it

    def start(self) -> None:
        """Start the daemon unless it lives."""
        if self._daemon is not None and self._daemon.alive:
            return
        self._lives += 1
        self._daemon = daemon = self.world.process(f"daemon#{self._lives}")
        self.world.tell(f"{daemon.name} starts")
        if self.world.chance(0.5):
            points = int(self.world.moment(1, 400))
            self.world.doom(daemon, points)
        daemon.when_dead(self._come_back)
        daemon.spawn(self._serve(daemon))

    def _come_back(self) -> None:
        if self.world.told_to_the_end:
            return
        wait = 0.1 if self.world.faults_are_over else self.world.moment(0.01, 120.0)
        self.world.loop.call_later(wait, self.start)

    def strike(self) -> None:
        """Something bad happens."""
        world, daemon = self.world, self._daemon
        assert daemon is not None
        what = world.random.choice(_FAULTS)
        if what == "kill" and daemon.alive:
            world.tell(f"kill -9 {daemon.name}")
            world.crashes += 1
            daemon.kill()
        elif what == "leave" and daemon.alive:
            world.tell(f"{daemon.name} is asked to leave")
            self._leave.set()
        elif what == "pause" and daemon.runs:
            self._pause(daemon, world.moment(0.01, 120.0))
        elif what == "helper":
            slots = self.machine.slots_in_use()
            if slots:
                slot = world.random.choice(slots)
                world.tell(f"kill -9 the helper of {slot}")
                self.machine.kill_helper(slot)
        elif what == "reboot":
            world.tell("the machine is restarted")
            world.crashes += 1
            self.machine.reboot()
            daemon.kill()
        elif what == "store":
            seconds = world.moment(0.01, 8.0)
            world.tell(f"the store is away for {seconds:.2f} s")
            world.take_store_away(seconds)
        elif what == "clock":
            seconds = world.random.choice((-300.0, -5.0, 5.0, 300.0))
            world.tell(f"the wall clock jumps by {seconds} s")
            self.machine.clock.jump(seconds)

    async def leave_in_peace(self) -> None:
        """No faults any more: whoever is stopped goes on, whoever is dead comes back."""
        self.world.faults_are_over = True
        if self._daemon is not None and self._daemon.paused:
            self._resume(self._daemon)
        self.start()
        await self.gateways.any()

    def _pause(self, daemon: Process, seconds: float) -> None:
        self.world.tell(f"{daemon.name} is stopped for {seconds:.2f} s")
        daemon.pause()
        self.world.loop.call_later(seconds, self._resume, daemon)

    def _resume(self, daemon: Process) -> None:
        if daemon.alive:
            self.world.tell(f"{daemon.name} goes on")
            daemon.resume()

    # The daemon, as `spellq.compose` puts it together

    async def _serve(self, daemon: Process) -> None:
        self._leave = asyncio.Event()
        try:
            await self._live(daemon)
        except* StoreUnavailable as group:
            self.world.tell(f"{daemon.name} cannot go on: {group.exceptions[0]!r}")
        except* Exception as group:
            self.world.violated("faults", f"{daemon.name} fell: {group.exceptions!r}")
        self.world.tell(f"{daemon.name} has left")
        daemon.kill()

    async def _live(self, daemon: Process) -> None:
        world, clock = self.world, self.machine.clock
        store = await SqliteStore.over(SimWriter(world, self.disk), clock, self.disk.log)
        bus = InProcessBus()
        outbox = Outbox(store, bus)
        feed = Feed(store, bus, clock)
        supervisor = Supervisor(store, bus, outbox, feed, clock)
        executor = SimExecutor(self.machine)
        agent = Agent(
            AgentSettings(
                name="local", slots=self.slots, master_slots=self._master_slots, gateway_url=""
            ),
            store,
            bus,
            outbox,
            self._artifacts,
            executor,
            AgentsMachine(self.machine),
            self._sealer,
            clock,
        )
        runs = Runs(store, outbox, bus)
        outputs = SavedOutputs(store, self._artifacts)
        launcher = Launcher(store, outbox, self._artifacts, self._sealer, clock, runs, outputs)
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            await tasks.start(agent.run)
            await supervisor.refill()
            tasks.start_soon(supervisor.run)
            self.store = store
            gateway = Gateway(world, daemon, Door(store, feed, launcher, runs))
            self.gateways.add(gateway)
            world.tell(f"{daemon.name} serves")
            await self._leave.wait()
            gateway.close()
            tasks.cancel_scope.cancel()
        await executor.close()
        await store.close()

    def capacity(self) -> dict[str, int]:
        """Slots by queue."""
        return {**self.slots, MASTER_QUEUE: self._master_slots}

    def clocks(self) -> list[SimClock]:
        return [self.machine.clock]


_FAULTS: Final = (
    "kill", "kill", "leave", "pause", "pause", "helper", "helper", "reboot", "store", "clock",
)  # fmt: skip
