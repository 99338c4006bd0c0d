"""The engines of a cluster, across a network: a store, and a log that is the bus's stream.

Each call takes its time, and the caller may die before it or after it.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from spellq.events import BEGINNING, Cursor, Logged
from spellq.ports import AgentInfo, Committed, Store, StoreUnavailable
from tests.simulation.world import World


class Log:
    """The stream: what was published, in the order in which it came, as often as it came."""

    def __init__(self) -> None:
        self.messages: list[list[Logged]] = []
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
        self.messages.append(logged)


class Remote:
    """Implements `spellq.ports.Store` across a network."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **named: Any) -> Any:
            await self._reach(name)
            answer = await getattr(self._store, name)(*arguments, **named)
            await self._world.point(f"{name}, after")
            await self._world.take_time(0.0001, 0.005)
            return answer

        return call

    async def renew(self, agent: AgentInfo, lease_seconds: float) -> int:
        await self._reach("renew")
        self._world.renewed_at[agent.id] = self._world.loop.time()
        counter = await self._store.renew(agent, lease_seconds)
        await self._world.point("renew, after")
        await self._world.take_time(0.0001, 0.005)
        return counter

    async def _reach(self, name: str) -> None:
        await _reach_store(self._world, name)


class RemoteLog:
    """Implements `spellq.ports.EventLog` across a network; where the store is away, so is it."""

    def __init__(self, world: World, log: Log) -> None:
        self._world = world
        self._log = log

    async def head(self) -> Cursor:
        await _reach_store(self._world, "head")
        return self._log.head

    async def events_after(self, cursor: Cursor, limit: int = 1000) -> list[Logged]:
        await _reach_store(self._world, "events_after")
        return self._log.after(cursor, limit)


async def _reach_store(world: World, name: str) -> None:
    await world.point(f"{name}, before")
    await world.take_time(0.0001, 1.0 if world.chance(0.02) else 0.005)
    if world.store_is_away:
        raise StoreUnavailable("The store is away.")
