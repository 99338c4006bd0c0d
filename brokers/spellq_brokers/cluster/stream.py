"""The log of events: a stream of RabbitMQ, read by offset."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

import anyio
import msgspec
from aiormq.abc import DeliveredMessage
from anyio.abc import TaskStatus

from spellq.events import BEGINNING, Cursor, Event, Logged
from spellq.runs import parse_number
from spellq_brokers.cluster.link import (
    AWAY,
    TIMEOUT_SECONDS,
    Channel,
    Connection,
    Link,
    close,
    delivered,
    unavailable,
    whole,
)

ARGUMENTS: Final[dict[str, Any]] = {
    "x-queue-type": "stream",
    "x-max-age": "90D",
    "x-stream-max-segment-size-bytes": 100_000_000,
}
_PREFETCH: Final = 256
_ACK_EVERY: Final = 64

Place = tuple[int, int]
"""An offset in the stream, and an event's index in the message there."""

_decode = msgspec.json.Decoder(list[Event]).decode


class StreamLog:
    """Implements `spellq.ports.EventLog`. One reader follows the stream for the whole process.

    `mark` puts a message without events, with this id, at the end of the stream.
    """

    def __init__(
        self, link: Link, queue: str, epoch: str, mark: Callable[[str], Awaitable[None]]
    ) -> None:
        self._link = link
        self._queue = queue
        self._epoch = epoch
        self._mark = mark
        self._newest: Place = (-1, 0)
        self._marks: dict[str, anyio.Event] = {}
        self._listeners: list[_Mailbox] = []

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow the stream until cancelled; a new connection goes on where the last one was."""
        while True:
            connection = await self._link.connection()
            try:
                channel = await connection.channel()
                begin = "next" if self._newest[0] < 0 else self._newest[0] + 1
                await self._consume(channel, begin, self._take)
                if self._newest[0] < 0:
                    await self.head()
            except AWAY:
                continue
            task_status.started()
            task_status = anyio.TASK_STATUS_IGNORED
            await asyncio.wait([channel.closing])

    async def _take(self, offset: int, message: DeliveredMessage) -> None:
        logged = self._logged(offset, message)
        self._newest = (offset, max(0, len(logged) - 1))
        if logged:
            for listener in self._listeners:
                listener.put(logged)
        elif (waiting := self._marks.get(_message_id(message))) is not None:
            waiting.set()

    async def head(self) -> Cursor:
        """Found by putting a mark at the end and reading up to it."""
        name = uuid4().hex
        arrived = self._marks[name] = anyio.Event()
        try:
            with anyio.fail_after(TIMEOUT_SECONDS):
                await self._mark(name)
                await arrived.wait()
        except TimeoutError as error:
            raise unavailable(error) from error
        finally:
            del self._marks[name]
        return self._cursor(self._newest)

    async def events_after(self, cursor: Cursor, limit: int = 1000) -> list[Logged]:
        after = self._place(cursor)
        newest = self._newest
        if after >= newest:
            return []
        found: list[Logged] = []
        over = anyio.Event()

        async def take(offset: int, message: DeliveredMessage) -> None:
            found.extend(
                logged
                for logged in self._logged(offset, message)
                if self._place(logged.cursor) > after
            )
            if offset >= newest[0] or len(found) >= limit:
                over.set()

        connection = await self._link.connection()
        try:
            with anyio.fail_after(TIMEOUT_SECONDS):
                channel = await whole(_channel(connection))
                try:
                    await whole(self._consume(channel, max(after[0], 0), take))
                    await over.wait()
                finally:
                    await close(channel)
        except AWAY as error:
            raise unavailable(error) from error
        return found[:limit]

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Sequence[Logged]]]:
        """As `spellq.ports.Bus.listen`."""
        mailbox = _Mailbox()
        self._listeners.append(mailbox)
        try:
            yield mailbox.batches()
        finally:
            self._listeners.remove(mailbox)

    async def _consume(
        self,
        channel: Channel,
        begin: int | str,
        take: Callable[[int, DeliveredMessage], Awaitable[None]],
    ) -> None:
        unread = 0

        async def on_message(message: DeliveredMessage) -> None:
            nonlocal unread
            headers = message.header.properties.headers or {}
            await take(int(str(headers["x-stream-offset"])), message)
            unread += 1
            if unread >= _ACK_EVERY:
                unread = 0
                await channel.basic_ack(delivered(message)[0], multiple=True, wait=False)

        await channel.basic_qos(prefetch_count=_PREFETCH, timeout=TIMEOUT_SECONDS)
        await channel.basic_consume(
            self._queue,
            on_message,
            arguments={"x-stream-offset": begin},
            timeout=TIMEOUT_SECONDS,
        )

    def _logged(self, offset: int, message: DeliveredMessage) -> list[Logged]:
        if not message.body:
            return []
        return [
            Logged(self._cursor((offset, index)), event)
            for index, event in enumerate(_decode(message.body))
        ]

    def _cursor(self, place: Place) -> Cursor:
        return f"{self._epoch}.{place[0]}.{place[1]}"

    def _place(self, cursor: Cursor) -> Place:
        if cursor == BEGINNING:
            return (-1, 0)
        epoch, _, place = cursor.partition(".")
        offset, index = (parse_number(part) for part in (place.partition(".")[::2]))
        if epoch != self._epoch or offset is None or index is None:
            raise ValueError(f"{cursor!r} is no cursor of this event log")
        if (offset, index) > self._newest:
            raise ValueError(f"{cursor!r} is ahead of this event log")
        return (offset, index)


class _Mailbox:
    """What one listener has not read yet."""

    def __init__(self) -> None:
        self._waiting: list[Logged] = []
        self._filled = anyio.Event()

    def put(self, logged: Sequence[Logged]) -> None:
        self._waiting.extend(logged)
        self._filled.set()

    async def batches(self) -> AsyncIterator[Sequence[Logged]]:
        while True:
            await self._filled.wait()
            batch, self._waiting = self._waiting, []
            self._filled = anyio.Event()
            yield batch


async def _channel(connection: Connection) -> Channel:
    return await connection.channel()


def _message_id(message: DeliveredMessage) -> str:
    return message.header.properties.message_id or ""
