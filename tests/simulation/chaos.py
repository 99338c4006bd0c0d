"""A bus that is late, double, out of order and forgetful, as far as its contract allows.

It is simulated as what it will be: an engine across a network that outlives every process.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from spellq.events import Logged
from spellq.ports import Committed, StoreUnavailable, Ticket, TicketSource
from tests.simulation.loop import current_process
from tests.simulation.network import Log
from tests.simulation.world import Signal, World

SILENT_LINK_SECONDS: Final = 15.0
"""After that long the bus takes a consumer that does not answer for dead."""


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
    async def listen(self) -> AsyncIterator[AsyncIterator[Sequence[Logged]]]:
        yield self._messages_from(len(self._log.messages))

    async def _messages_from(self, place: int) -> AsyncIterator[Sequence[Logged]]:
        messages = self._log.messages
        while True:
            known = place
            await self._published.until(lambda known=known: len(messages) > known)  # type: ignore[misc]
            await self._world.take_time(0.0005, 0.02)
            if self._world.chance(0.02) and not self._world.faults_are_over:
                place = max(0, place - 3)
            batch, place = messages[place:], len(messages)
            yield [logged for message in batch for logged in message]

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
