"""The bus inside one process: queues of tickets, listeners, hints."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from spellq.events import Logged
from spellq.ports import Committed, Ticket, TicketSource

T = TypeVar("T")


class InProcessBus:
    """Implements `spellq.ports.Bus`. Nothing is lost, doubled or late.

    Its listeners live in the same loop as who publishes, so what they have not read yet is short.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._listeners: list[_Mailbox[Logged]] = []
        self._log_readers: list[_Lengths] = []
        self._agents: dict[str, list[asyncio.Event]] = {}

    async def publish(self, committed: Sequence[Committed]) -> None:
        logged = [each for entry in committed for each in entry.logged]
        for listener in self._listeners:
            listener.put(logged)

    async def offer(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self._queue(ticket.queue).put(ticket)

    @asynccontextmanager
    async def consume(self, queue: str) -> AsyncIterator[TicketSource]:
        source = _Source(self._queue(queue))
        try:
            yield source
        except BaseException:
            source.give_back()
            raise

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Sequence[Logged]]]:
        mailbox: _Mailbox[Logged] = _Mailbox()
        self._listeners.append(mailbox)
        try:
            yield mailbox.batches()
        finally:
            self._listeners.remove(mailbox)

    def log_grew(self, number: int, length: int) -> None:
        for reader in self._log_readers:
            reader.put(number, length)

    @asynccontextmanager
    async def log_lengths(self) -> AsyncIterator[AsyncIterator[tuple[int, int]]]:
        reader = _Lengths()
        self._log_readers.append(reader)
        try:
            yield reader.items()
        finally:
            self._log_readers.remove(reader)

    async def hint(self, agent: str) -> None:
        for event in self._agents.get(agent, ()):
            event.set()

    @asynccontextmanager
    async def hints(self, agent: str) -> AsyncIterator[AsyncIterator[None]]:
        event = asyncio.Event()
        self._agents.setdefault(agent, []).append(event)

        async def items() -> AsyncIterator[None]:
            while True:
                await event.wait()
                event.clear()
                yield

        try:
            yield items()
        finally:
            self._agents[agent].remove(event)

    def _queue(self, name: str) -> "_Queue":
        return self._queues.setdefault(name, _Queue())


class _Queue:
    """Tickets in order, and the consumers that wait, the longest first."""

    def __init__(self) -> None:
        self.tickets: deque[Ticket] = deque()
        self.waiting: deque[asyncio.Future[Ticket]] = deque()

    def put(self, ticket: Ticket, *, front: bool = False) -> None:
        while self.waiting:
            consumer = self.waiting.popleft()
            if not consumer.done():
                consumer.set_result(ticket)
                return
        if front:
            self.tickets.appendleft(ticket)
        else:
            self.tickets.append(ticket)


class _Source:
    def __init__(self, queue: _Queue) -> None:
        self._queue = queue
        self._delivery: _Delivery | None = None

    async def take(self) -> "_Delivery":
        if self._delivery is not None and not self._delivery.acknowledged:
            raise RuntimeError("the delivery before has not been acknowledged yet")
        self._delivery = _Delivery(await self._ticket())
        return self._delivery

    def give_back(self) -> None:
        """The consumer failed: what it has not acknowledged goes back to where it was."""
        if self._delivery is not None and not self._delivery.acknowledged:
            self._queue.put(self._delivery.ticket, front=True)

    async def _ticket(self) -> Ticket:
        if self._queue.tickets:
            return self._queue.tickets.popleft()
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._queue.waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._queue.put(future.result(), front=True)
            elif future in self._queue.waiting:
                self._queue.waiting.remove(future)
            raise


class _Delivery:
    """A ticket in a consumer's hand."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.acknowledged = False

    @property
    def ticket(self) -> Ticket:
        return self._ticket

    async def ack(self) -> None:
        self.acknowledged = True


class _Mailbox(Generic[T]):
    """What one listener has not read yet."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._filled = asyncio.Event()

    def put(self, items: Sequence[T]) -> None:
        self._items.extend(items)
        self._filled.set()

    async def batches(self) -> AsyncIterator[Sequence[T]]:
        while True:
            await self._filled.wait()
            self._filled.clear()
            batch = tuple(self._items)
            self._items.clear()
            if batch:
                yield batch


class _Lengths:
    """The newest length of each log that grew since the reader looked."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self._filled = asyncio.Event()

    def put(self, number: int, length: int) -> None:
        self._lengths[number] = length
        self._filled.set()

    async def items(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            await self._filled.wait()
            self._filled.clear()
            lengths, self._lengths = self._lengths, {}
            for item in lengths.items():
                yield item
