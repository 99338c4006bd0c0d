"""The one WebSocket on which a client's waits and event subscriptions travel.

A wait is level-triggered, and a subscription knows its cursor; so after a lost connection all that
is still open is simply asked again, and nothing is missed.
"""

import asyncio
import collections
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from typing import Final, Protocol

import msgspec

from spellq.events import Cursor, EventFilter
from spellq.runs import Status
from spellq.wire import (
    Cancel,
    ClientMessage,
    EndedElsewhere,
    EventMessage,
    Reached,
    RequestFailed,
    ServerMessage,
    Subscribe,
    Wait,
)
from spellq_sdk.backoff import backoff
from spellq_sdk.exceptions import ClientException, exception_for
from spellq_sdk.transport import (
    PATIENCE_SECONDS,
    Connection,
    ConnectionLost,
    Transport,
    Unreachable,
)

UNREAD_EVENTS: Final = 10_000
"""A subscription whose reader is this far behind is cancelled, and resumed when it caught up."""

PATH: Final = "/api/socket"
_log = logging.getLogger("spellq")
_decoder = msgspec.json.Decoder(ServerMessage)


class _Request(Protocol):
    """Something asked on the socket and not yet answered to the end."""

    id: int

    def message(self) -> ClientMessage: ...
    def receive(self, message: ServerMessage) -> None: ...
    def fail(self, error: Exception) -> None: ...


class EventSocket:
    """Carries any number of waits and subscriptions; connects when there is one.

    While nobody answers, a client that was answered before tries for ever; one that never was
    gives up after 10 s.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._ids = itertools.count(1)
        self._open: dict[int, _Request] = {}
        self._outbox: asyncio.Queue[ClientMessage] | None = None
        self._task: asyncio.Task[None] | None = None

    async def wait(self, run: int, statuses: tuple[Status, ...]) -> Reached | EndedElsewhere:
        """Return when the run has been in one of `statuses`, or has ended without.

        Raises:
            ClientException: no such run, or the gateway cannot be reached or refuses the token.
        """
        request = _Waiting(next(self._ids), run, statuses)
        self._ask(request)
        try:
            return await request.answer
        finally:
            self._drop(request)

    async def events(
        self, wanted: EventFilter, after: Cursor | None = None
    ) -> AsyncGenerator[EventMessage, None]:
        """The events that match, from after the cursor or from now on; never ends by itself.

        None is missed. After a lost connection the latest may come again.

        Raises:
            ClientException: the cursor is refused, or the gateway cannot be reached.
        """
        cursor = after
        while True:
            feed = _Feed(next(self._ids), wanted, cursor)
            self._ask(feed)
            try:
                while not (feed.overflowed and not feed.unread):
                    yield await feed.next()
            finally:
                self._drop(feed)
            cursor = feed.cursor

    async def aclose(self) -> None:
        """Close the connection; what still waits raises."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail_all(ClientException("This client was closed."))

    def _ask(self, request: _Request) -> None:
        self._open[request.id] = request
        if self._outbox is not None:
            self._outbox.put_nowait(request.message())
        elif self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._serve())

    def _drop(self, request: _Request) -> None:
        if self._open.pop(request.id, None) and self._outbox is not None:
            self._outbox.put_nowait(Cancel(request.id))

    async def _serve(self) -> None:
        try:
            await self._keep_connected()
        except ClientException as error:
            self._fail_all(error)
        except Exception as error:
            _log.exception("the event socket broke")
            self._fail_all(ClientException(None, None, error))

    async def _keep_connected(self) -> None:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        delays = backoff()
        failed = None
        while self._open:
            try:
                connection = await self._transport.connect(PATH, failed)
            except Unreachable as error:
                if not self._transport.was_reached and time.monotonic() > give_up_at:
                    raise
                failed = error.address
            else:
                if await self._converse(connection):
                    delays = backoff()
                failed = connection.address
                if not self._open:
                    return
            await asyncio.sleep(next(delays))

    async def _converse(self, connection: Connection) -> bool:
        """Ask all that is open, and hand out what comes until the connection is gone."""
        heard = False
        outbox = self._outbox = asyncio.Queue()
        for request in self._open.values():
            outbox.put_nowait(request.message())
        writer = asyncio.ensure_future(_write(connection, outbox))
        try:
            async for text in connection.messages():
                heard = True
                self._receive(text)
        finally:
            self._outbox = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await connection.aclose()
        return heard

    def _receive(self, text: str) -> None:
        try:
            message = _decoder.decode(text)
        except msgspec.DecodeError as error:
            _log.warning("a message of the gateway was not understood: %s", error)
            return
        request = self._open.get(message.id)
        if request is None:
            return
        if not isinstance(message, EventMessage):
            del self._open[message.id]
        if isinstance(message, RequestFailed):
            request.fail(exception_for(message.status, message.error))
            return
        request.receive(message)
        if isinstance(request, _Feed) and request.overflowed:
            self._drop(request)

    def _fail_all(self, error: Exception) -> None:
        requests, self._open = list(self._open.values()), {}
        for request in requests:
            request.fail(error)


async def _write(connection: Connection, outbox: asyncio.Queue[ClientMessage]) -> None:
    with contextlib.suppress(ConnectionError, ConnectionLost):
        while True:
            message = await outbox.get()
            await connection.send(msgspec.json.encode(message).decode())


class _Waiting:
    def __init__(self, number: int, run: int, statuses: tuple[Status, ...]) -> None:
        self.id = number
        self.answer: asyncio.Future[Reached | EndedElsewhere]
        self.answer = asyncio.get_running_loop().create_future()
        self._wait = Wait(number, run, statuses)

    def message(self) -> ClientMessage:
        return self._wait

    def receive(self, message: ServerMessage) -> None:
        if isinstance(message, Reached | EndedElsewhere) and not self.answer.done():
            self.answer.set_result(message)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class _Feed:
    def __init__(self, number: int, wanted: EventFilter, cursor: Cursor | None) -> None:
        self.id = number
        self.cursor = cursor
        self.unread: collections.deque[EventMessage] = collections.deque()
        self.overflowed = False
        self._wanted = wanted
        self._changed = asyncio.Event()
        self._failure: Exception | None = None

    def message(self) -> ClientMessage:
        return Subscribe(self.id, self._wanted, self.cursor)

    def receive(self, message: ServerMessage) -> None:
        if isinstance(message, EventMessage) and not self.overflowed:
            self.cursor = message.cursor
            self.unread.append(message)
            self.overflowed = len(self.unread) >= UNREAD_EVENTS
            self._changed.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._changed.set()

    async def next(self) -> EventMessage:
        while not self.unread:
            if self._failure:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        return self.unread.popleft()
