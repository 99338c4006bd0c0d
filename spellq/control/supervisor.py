"""The supervisor keeps every deadline: timeouts, lost agents, and what a crash left unpublished.

It sleeps until the earliest deadline and learns of nearer ones from events; every five seconds it
looks all the same, as a net.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import anyio

from spellq.control.feed import Feed
from spellq.events import EventFilter
from spellq.lifecycle import Command, Expire, Find, Lose, Refused
from spellq.outbox import RELAY_AFTER_SECONDS, Outbox, ticket_of
from spellq.ports import LEASE_SECONDS, Bus, Clock, RunQuery, Store, StoreUnavailable, UnknownRun
from spellq.runs import Run, Status

_log = logging.getLogger(__name__)

NET_SECONDS: Final = 5.0
LOST_AFTER_SECONDS: Final = 50.0


class Supervisor:
    """One loop. It never executes anything: it only re-offers or ends."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        outbox: Outbox,
        feed: Feed,
        clock: Clock,
        *,
        lost_after_seconds: float = LOST_AFTER_SECONDS,
    ) -> None:
        self._store = store
        self._bus = bus
        self._outbox = outbox
        self._feed = feed
        self._clock = clock
        self._lost_after_seconds = lost_after_seconds
        self._silent_since: dict[str, float] = {}
        self._nearer = anyio.Event()

    async def refill(self) -> None:
        """Offer every run that waits; for a bus whose queues are made anew with this process."""
        waiting = await self._store.find(
            RunQuery(limit=None, live=True, status=Status.MACHINE_REQUESTED)
        )
        await self._bus.offer([ticket_of(run) for run in reversed(waiting)])

    async def run(self) -> None:
        """Keep deadlines until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._learn_nearer_deadlines)
            while True:
                self._nearer = anyio.Event()
                try:
                    seconds = await self.look()
                except StoreUnavailable as error:
                    _log.warning("deadlines cannot be looked at: %s", error)
                    seconds = NET_SECONDS
                with anyio.move_on_after(seconds):
                    await self._nearer.wait()

    async def _learn_nearer_deadlines(self) -> None:
        while True:
            try:
                async for logged in self._feed.events(EventFilter(), None):
                    if logged.event.data.get("due_at") is not None:
                        self._nearer.set()
            except StoreUnavailable as error:
                _log.warning("events cannot be read: %s", error)
                await anyio.sleep(NET_SECONDS)

    async def look(self) -> float:
        """Do all that is due; returns the seconds until there may be more."""
        stale = await self._store.unpublished(RELAY_AFTER_SECONDS)
        await self._outbox.publish(stale)
        await self._look_for_lost_agents()
        now = self._clock.now()
        numbers, next_at = await self._store.due(now)
        for number in numbers:
            await self._apply(number, Expire())
        if next_at is None:
            return NET_SECONDS
        return min(NET_SECONDS, max(0.0, (next_at - self._clock.now()).total_seconds()))

    async def _look_for_lost_agents(self) -> None:
        """An agent is lost when it was silent for a whole lease in which we could have heard it."""
        heard = {agent.id for agent in await self._store.agents()}
        owners = await self._store.owners()
        now = self._clock.monotonic()
        for agent in owners:
            if agent not in heard:
                since = self._silent_since.setdefault(agent, now)
                if now - since >= LEASE_SECONDS:
                    for run in await self._runs_of(agent):
                        await self._apply(run.id, Lose(agent, self._lost_after_seconds))
            elif self._silent_since.pop(agent, None) is not None:
                for run in await self._runs_of(agent):
                    await self._apply(run.id, Find(run.attempt, agent))
        for agent in set(self._silent_since).difference(owners):
            del self._silent_since[agent]

    async def _runs_of(self, agent: str) -> Sequence[Run]:
        return await self._store.find(RunQuery(limit=None, agent=agent))

    async def _apply(self, number: int, command: Command) -> None:
        with suppress(Refused, UnknownRun):
            await self._outbox.apply(number, command)
