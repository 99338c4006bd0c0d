"""Publish after commit: whoever changes a run tells everybody at once.

The control plane and agents change runs through here and in no other way.
"""

from collections.abc import Sequence
from typing import Final

import anyio

from spellq.lifecycle import Command
from spellq.logs import LogEntry
from spellq.ports import Bus, Committed, NewRun, Store, Ticket
from spellq.runs import Run, Status

RELAY_AFTER_SECONDS: Final = 1.0
"""What its committer has not published by then, the relay publishes."""


class Outbox:
    """Commits to the store and publishes on the bus.

    Should this process die between the two, the entry stays in the store's outbox and the relay
    publishes it; so events may come twice or late, never not at all. Whoever is cancelled in
    between publishes first: what one process commits, it publishes in that order.
    """

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store = store
        self._bus = bus

    async def create(self, new: Sequence[NewRun]) -> list[Run]:
        """Create the runs that are absent and offer them to agents."""
        with anyio.CancelScope(shield=True):
            committed = await self._store.create(new)
            await self.publish(committed)
        return [entry.run for entry in committed]

    async def apply(self, number: int, *commands: Command) -> Committed:
        """Apply the commands as one step.

        Raises:
            UnknownRun, Refused: as `RunStore.apply`.
        """
        with anyio.CancelScope(shield=True):
            committed = await self._store.apply(number, commands)
            await self.publish([committed])
        return committed

    async def append(self, number: int, entries: Sequence[LogEntry]) -> None:
        """Append to a run's log and wake its followers."""
        with anyio.CancelScope(shield=True):
            self._bus.log_grew(number, await self._store.append(number, entries))

    async def publish(self, committed: Sequence[Committed]) -> None:
        """Publish steps, offer the tickets they call for, tell agents what is wanted of them; then
        strike the steps."""
        told = [entry for entry in committed if entry.logged]
        if not told:
            return
        tickets = [ticket_of(entry.run) for entry in told if _calls_for_an_offer(entry)]
        if tickets:
            await self._bus.offer(tickets)
        await self._bus.publish(told)
        for agent in dict.fromkeys(filter(None, map(_asked, told))):
            await self._store.nudge(agent)
            await self._bus.hint(agent)
        await self._store.strike(told)


def ticket_of(run: Run) -> Ticket:
    """The ticket that offers the run's present attempt."""
    return Ticket(run=run.id, attempt=run.attempt, queue=run.spec.queue)


def _calls_for_an_offer(entry: Committed) -> bool:
    """Whether the step left the run waiting for a machine; it may have moved on meanwhile."""
    if entry.run.status is not Status.MACHINE_REQUESTED:
        return False
    return any(logged.event.status is Status.MACHINE_REQUESTED for logged in entry.logged)


def _asked(entry: Committed) -> str | None:
    """The agent of which the step wants something."""
    return entry.run.agent if entry.run.status in (Status.STOPPING, Status.KILLING) else None
