"""The bus of a cluster: RabbitMQ carries events and tickets."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final

import anyio
import msgspec
from aiormq.abc import DeliveredMessage
from anyio.abc import TaskStatus

from spellq.events import Logged
from spellq.ports import Committed, StoreUnavailable, Ticket, TicketSource
from spellq.runs import machine_type_key
from spellq_brokers.cluster.link import (
    AWAY,
    TIMEOUT_SECONDS,
    Channel,
    Connection,
    Link,
    close,
    delivered,
    together,
    unavailable,
    whole,
)
from spellq_brokers.cluster.publisher import EventBatches, Publisher
from spellq_brokers.cluster.stream import ARGUMENTS as STREAM_ARGUMENTS
from spellq_brokers.cluster.stream import StreamLog

_TICKETS: Final[dict[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
_AGAIN_SECONDS: Final = 1.0

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode_ticket = msgspec.json.Decoder(Ticket).decode
_decode_lengths = msgspec.json.Decoder(dict[int, int]).decode


class RabbitBus:
    """Implements `spellq.ports.Bus`; `log` is the log that its events come into.

    Publishes on one connection, consumes on another. What must not be lost is persistent and
    confirmed; hints are neither.
    """

    def __init__(self, url: str, namespace: str, epoch: str) -> None:
        self._namespace = namespace
        self._out = Link(url, f"{namespace} publishes", [self._declare, self._open_publisher])
        self._in = Link(url, f"{namespace} consumes", [self._hear])
        self.log = StreamLog(self._in, self._name("log"), epoch, self._mark)
        self._publisher = Publisher()
        self._batches = EventBatches(self._send_events)
        self._hinter: Channel | None = None
        self._declared: set[str] = set()
        self._control: tuple[Channel, str] | None = None
        self._hinted: dict[str, list[anyio.Event]] = {}
        self._readers: list[_Lengths] = []
        self._grown: dict[int, int] = {}
        self._growing = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; started once both connections are there and the log is read."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._out.run)
            await tasks.start(self._in.run)
            await tasks.start(self.log.run)
            tasks.start_soon(self._tell_of_growth)
            task_status.started()

    async def connected(self) -> None:
        """Return when both connections are there."""
        await self._out.connection()
        await self._in.connection()

    def _name(self, name: str) -> str:
        return f"{self._namespace}.{name}"

    # Connections

    async def _declare(self, connection: Connection) -> None:
        channel = await connection.channel()
        events, control, log = self._name("events"), self._name("control"), self._name("log")
        for exchange in (events, control):
            await channel.exchange_declare(
                exchange, exchange_type="topic", durable=True, timeout=TIMEOUT_SECONDS
            )
        await channel.queue_declare(
            log, durable=True, arguments=STREAM_ARGUMENTS, timeout=TIMEOUT_SECONDS
        )
        await channel.queue_bind(log, events, "events", timeout=TIMEOUT_SECONDS)
        await channel.close()

    async def _open_publisher(self, connection: Connection) -> None:
        self._declared.clear()
        await self._publisher.open(connection)
        self._hinter = await connection.channel(publisher_confirms=False)

    async def _hear(self, connection: Connection) -> None:
        """A queue of this process's own for hints, with a name of the server's choice."""
        channel = await connection.channel()
        declared = await channel.queue_declare(exclusive=True, timeout=TIMEOUT_SECONDS)
        assert declared is not None
        assert declared.queue is not None
        self._control = (channel, declared.queue)
        for key in (*map(_agent_key, self._hinted), *(["log"] if self._readers else ())):
            await self._bind(key)
        await channel.basic_consume(
            declared.queue, self._take_hint, no_ack=True, timeout=TIMEOUT_SECONDS
        )
        for waiting in self._hinted.values():  # what was said meanwhile is lost
            for event in waiting:
                event.set()

    async def _bind(self, key: str) -> None:
        """Where the link is away, the next connection is bound to all."""
        if self._control is not None:
            channel, queue = self._control
            with suppress(*AWAY):
                await channel.queue_bind(queue, self._name("control"), key, timeout=TIMEOUT_SECONDS)

    # Events

    async def publish(self, committed: Sequence[Committed]) -> None:
        await together(*(self._publish(entry) for entry in committed if entry.logged))

    async def _publish(self, entry: Committed) -> None:
        kind = machine_type_key(entry.run.spec.machine_type)
        events = [logged.event for logged in entry.logged]
        keys = [f"run.{event.status}.{kind}.{event.run}" for event in events]
        await self._batches.publish([_encode(event) for event in events], keys)

    async def _send_events(self, body: bytes, keys: list[str]) -> None:
        await self._publisher.send(
            self._name("events"),
            "events",
            body,
            headers={"CC": keys},
            content_type="application/json",
        )

    async def _mark(self, name: str) -> None:
        await self._publisher.send("", self._name("log"), b"", message_id=name)

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Logged]]]:
        return self.log.listen()

    # Tickets

    async def offer(self, tickets: Sequence[Ticket]) -> None:
        for queue in dict.fromkeys(ticket.queue for ticket in tickets):
            await whole(self._declare_tickets(queue))
        await together(
            *(
                self._publisher.send("", self._name(f"tickets.{ticket.queue}"), _encode(ticket))
                for ticket in tickets
            )
        )

    async def _declare_tickets(self, queue: str) -> None:
        if queue in self._declared:
            return
        connection = await self._out.connection()
        try:
            channel = await connection.channel()
            await channel.queue_declare(
                self._name(f"tickets.{queue}"),
                durable=True,
                arguments=_TICKETS,
                timeout=TIMEOUT_SECONDS,
            )
            await channel.close()
        except AWAY as error:
            raise unavailable(error) from error
        self._declared.add(queue)

    @asynccontextmanager
    async def consume(self, queue: str) -> AsyncIterator[TicketSource]:
        source = _Source(self, queue)
        try:
            yield source
        except BaseException:
            await source.drop()
            raise
        await source.leave()

    async def open_consumer(
        self, queue: str, take: Callable[[Channel, DeliveredMessage], None]
    ) -> Channel:
        """A channel of its own on which a queue's tickets come, one at a time.

        Raises:
            StoreUnavailable: it cannot be had now.
        """
        await self._declare_tickets(queue)
        connection = await self._in.connection()

        async def on_message(message: DeliveredMessage) -> None:
            take(channel, message)

        try:
            channel = await connection.channel()
            await channel.basic_qos(prefetch_count=1, timeout=TIMEOUT_SECONDS)
            await channel.basic_consume(
                self._name(f"tickets.{queue}"), on_message, timeout=TIMEOUT_SECONDS
            )
        except AWAY as error:
            raise unavailable(error) from error
        return channel

    # Hints

    def log_grew(self, number: int, length: int) -> None:
        self._grown[number] = max(length, self._grown.get(number, 0))
        self._growing.set()

    async def _tell_of_growth(self) -> None:
        while True:
            await self._growing.wait()
            self._growing = anyio.Event()
            grown, self._grown = self._grown, {}
            await self._say("log", _encode(grown))

    @asynccontextmanager
    async def log_lengths(self) -> AsyncIterator[AsyncIterator[tuple[int, int]]]:
        reader = _Lengths()
        self._readers.append(reader)
        try:
            if len(self._readers) == 1:
                await whole(self._bind("log"))
            yield reader.items()
        finally:
            self._readers.remove(reader)

    async def hint(self, agent: str) -> None:
        await self._say(_agent_key(agent), b"")

    @asynccontextmanager
    async def hints(self, agent: str) -> AsyncIterator[AsyncIterator[None]]:
        event = anyio.Event()
        waiting = self._hinted.setdefault(agent, [])
        waiting.append(event)

        async def items() -> AsyncIterator[None]:
            nonlocal event
            while True:
                await event.wait()
                fresh = anyio.Event()
                waiting[waiting.index(event)] = event = fresh
                yield

        try:
            await whole(self._bind(_agent_key(agent)))
            yield items()
        finally:
            waiting.remove(event)
            if not waiting:
                self._hinted.pop(agent, None)

    async def _say(self, key: str, body: bytes) -> None:
        """A hint; it may be lost."""
        with suppress(*AWAY):
            if self._hinter is not None:
                await self._hinter.basic_publish(
                    body,
                    exchange=self._name("control"),
                    routing_key=key,
                    timeout=TIMEOUT_SECONDS,
                )

    async def _take_hint(self, message: DeliveredMessage) -> None:
        _, key = delivered(message)
        if key == "log":
            for number, length in _decode_lengths(message.body).items():
                for reader in self._readers:
                    reader.put(number, length)
            return
        for event in self._hinted.get(key.removeprefix("agent."), ()):
            event.set()


class _Source:
    """Implements `spellq.ports.TicketSource`; over a new channel after each loss of the old."""

    def __init__(self, bus: RabbitBus, queue: str) -> None:
        self._bus = bus
        self._queue = queue
        self._channel: Channel | None = None
        self._waiting: _Delivery | None = None
        self._taken: _Delivery | None = None
        self._changed = anyio.Event()

    async def take(self) -> "_Delivery":
        if self._taken is not None and not self._taken.acknowledged:
            raise RuntimeError("the delivery before has not been acknowledged yet")
        while True:
            self._changed = anyio.Event()
            if self._channel is None or self._channel.is_closed:
                await self._open()
            elif self._waiting is not None:
                self._taken, self._waiting = self._waiting, None
                return self._taken
            else:
                await self._changed.wait()

    async def _open(self) -> None:
        """A delivery of a channel that has died comes again."""
        self._waiting = None
        try:
            await whole(self._open_channel())
        except StoreUnavailable as error:
            _log.warning("tickets of %s cannot be had yet: %s", self._queue, error)
            await anyio.sleep(_AGAIN_SECONDS)

    async def _open_channel(self) -> None:
        self._channel = await self._bus.open_consumer(self._queue, self._put)
        self._channel.closing.add_done_callback(lambda _: self._changed.set())

    def _put(self, channel: Channel, message: DeliveredMessage) -> None:
        self._waiting = _Delivery(channel, message)
        self._changed.set()

    async def drop(self) -> None:
        """What is not acknowledged is offered again."""
        if self._channel is not None:
            await close(self._channel)

    async def leave(self) -> None:
        """Take part no more. A delivery that is not acknowledged yet still can be."""
        taken = self._taken
        if taken is None or taken.acknowledged or self._channel is None:
            await self.drop()
            return
        taken.is_last = True


class _Delivery:
    def __init__(self, channel: Channel, message: DeliveredMessage) -> None:
        self.ticket: Ticket = _decode_ticket(message.body)
        self.acknowledged = False
        self.is_last = False
        self._channel = channel
        self._tag, _ = delivered(message)

    async def ack(self) -> None:
        """Where the channel is gone meanwhile, the ticket comes again, and nobody wants it."""
        if self.acknowledged:
            return
        self.acknowledged = True
        with suppress(*AWAY):
            await self._channel.basic_ack(self._tag)
        if self.is_last:
            await close(self._channel)


class _Lengths:
    """The newest length of each log that grew, not read yet."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self._filled = anyio.Event()

    def put(self, number: int, length: int) -> None:
        self._lengths[number] = max(length, self._lengths.get(number, 0))
        self._filled.set()

    async def items(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            await self._filled.wait()
            lengths, self._lengths = self._lengths, {}
            self._filled = anyio.Event()
            for each in lengths.items():
                yield each


def _agent_key(agent: str) -> str:
    return f"agent.{agent}"
