"""One history: a world is made, lived in, struck, left in peace, and looked through."""

import asyncio
import gc
import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.simulation.client import Client, Record
from tests.simulation.cluster import Cluster
from tests.simulation.embedded import Embedded
from tests.simulation.installation import Installation
from tests.simulation.invariants import look_through
from tests.simulation.lives import Life
from tests.simulation.loop import Stuck, VirtualLoop
from tests.simulation.sealed import sealed
from tests.simulation.world import Violation, World

STRUCK_SECONDS = 90.0
"""For how long faults may strike."""

PEACE_SECONDS = 3600.0
"""How long, after the last fault, everything may take to come to its end."""


@dataclass(frozen=True)
class History:
    """What a seed came to."""

    seed: int
    runs: int
    crashes: int
    violations: tuple[Violation, ...]
    lines: tuple[str, ...] = field(repr=False)

    @property
    def digest(self) -> str:
        """The same for every replay of the seed."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def run_history(seed: int) -> History:
    """Live through the history of a seed. Takes no real time and touches nothing real."""
    with sealed(), _quiet(), _no_collection():
        loop = VirtualLoop()
        world = World(seed, loop)
        loop.set_exception_handler(world.on_fault)
        record = Record()
        try:
            loop.run_until_complete(_live_through(world, record))
        except Stuck as stuck:
            world.violated("faults", str(stuck))
        finally:
            world.told_to_the_end = True
            loop.bury(world.processes)
            loop.close()
    return History(
        seed, len(record.accepted), world.crashes, tuple(world.violations), tuple(world.lines)
    )


async def _live_through(world: World, record: Record) -> None:
    installation: Installation = Cluster(world) if world.chance(0.5) else Embedded(world)
    disk, gateways = installation.disk, installation.gateways
    record.agents_may_be_lost = installation.agents_may_be_lost
    master = Life(world, Client(world, gateways, record, "master"), disk)

    async def as_master(number: int, *, endless: bool) -> int:
        workflow = disk.runs[number].workflow
        assert workflow is not None
        return await master.as_master(workflow, f"of master {number}", endless=endless)

    for machine in installation.machines:
        machine.as_master = as_master
    await installation.start()
    clients = [
        Client(world, gateways, record, f"client {number}")
        for number in range(world.random.randint(1, 2))
    ]
    reader = None
    if isinstance(installation, Embedded):
        reader = asyncio.get_running_loop().create_task(clients[0].subscribe())
    lives = asyncio.gather(*(Life(world, client, disk).live() for client in clients))
    await _strike(world, installation)
    world.tell("the faults are over")
    await installation.leave_in_peace()
    try:
        async with asyncio.timeout(PEACE_SECONDS):
            await lives
            await disk.every_run_ended()
    except TimeoutError:
        world.violated("waits_missed", "a client waits for ever, or a run never ends")
    except Exception as error:
        world.violated("faults", f"a client fell: {error!r}")
    await look_through(world, installation, record, clients[0])
    if reader is not None:
        reader.cancel()


async def _strike(world: World, installation: Installation) -> None:
    end = world.loop.time() + STRUCK_SECONDS * world.random.random()
    for _ in range(world.random.choice((0, 1, 2, 4, 8))):
        await world.take_time(0.01, 40.0)
        if world.loop.time() > end:
            break
        installation.strike()


@contextmanager
def _quiet() -> Iterator[None]:
    """What the product says of faults that were injected is not for the reader's eyes."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """When garbage is collected depends on what was before; here it is once, at the end."""
    gc.disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            # A task that died before its first step leaves a coroutine that nobody awaited.
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        gc.enable()
