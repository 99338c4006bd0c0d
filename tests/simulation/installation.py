"""What a history is about: some processes, a store, machines, and what may happen to them."""

from typing import Final, Protocol

from spellq.ports import EventLog, Store
from spellq.runs import MASTER_QUEUE
from tests.simulation.gateway import Gateways
from tests.simulation.machine import SimMachine
from tests.simulation.service import Service
from tests.simulation.store import Disk
from tests.simulation.world import World

MASTER_SLOTS: Final = 2


class Installation(Protocol):
    """An installation of spellq in a simulated world."""

    gateways: Gateways
    disk: Disk
    machines: list[SimMachine]
    services: list[Service]
    agents_may_be_lost: bool

    async def start(self) -> None:
        """Start every process."""

    async def leave_in_peace(self) -> None:
        """Undo every fault; returns when clients are served."""

    async def store(self) -> Store:
        """The store that serves now."""

    async def log(self) -> EventLog:
        """The log of events that is read now."""

    def strike(self) -> None:
        """Something bad happens."""


def capacity(machines: list[SimMachine]) -> dict[str, int]:
    """Slots by queue."""
    total: dict[str, int] = {}
    for machine in machines:
        for queue, count in (*machine.slots.items(), (MASTER_QUEUE, MASTER_SLOTS)):
            total[queue] = total.get(queue, 0) + count
    return total


def strike_machine(world: World, machine: SimMachine, service: Service) -> None:
    """Kill a helper, restart the machine, or set its clock."""
    what = world.random.choice(("helper", "helper", "reboot", "clock"))
    if what == "helper":
        slots = machine.slots_in_use()
        if slots:
            slot = world.random.choice(slots)
            world.tell(f"kill -9 the helper of {slot} on {machine.name}")
            machine.kill_helper(slot)
    elif what == "reboot":
        world.tell(f"{machine.name} is restarted")
        machine.reboot()
        service.kill()
    else:
        seconds = world.random.choice((-300.0, -5.0, 5.0, 300.0))
        world.tell(f"the wall clock of {machine.name} jumps by {seconds} s")
        machine.clock.jump(seconds)


def strike_service(world: World, service: Service) -> None:
    """Kill it, stop it for a while, or have it leave in good order."""
    what = world.random.choice(("kill", "kill", "pause", "pause", "leave"))
    if what == "kill":
        service.kill()
    elif what == "pause":
        service.pause(world.moment(0.01, 120.0))
    else:
        service.leave()


def strike_store(world: World) -> None:
    seconds = world.moment(0.01, 8.0)
    world.tell(f"the store is away for {seconds:.2f} s")
    world.take_store_away(seconds)
