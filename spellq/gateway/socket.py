"""The event socket: one WebSocket a client, on which it multiplexes all its waits.

A wait is answered from the run's history when it was reached before, else by the event that
reaches it; so a client that comes back simply asks again. No task is kept for a wait.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any, Final

import anyio
import msgspec
from anyio.abc import TaskGroup
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect

from spellq.control.errors import Rejected
from spellq.control.feed import Feed
from spellq.events import Cursor, Event
from spellq.gateway.auth import Caller
from spellq.gateway.services import Provided, Services
from spellq.ports import StoreUnavailable
from spellq.runs import FINAL, Run, reached
from spellq.wire import (
    AnyRequest,
    Cancel,
    ClientMessage,
    EndedElsewhere,
    EventMessage,
    Reached,
    RequestFailed,
    ServerMessage,
    Subscribe,
    Wait,
    event_view,
)

MAX_OPEN: Final = 100_000
MAX_UNSENT: Final = 100_000
"""Answers that may wait for a client that does not read."""

GOODBYE_SECONDS: Final = 1.0

_NOT_JSON: Final = 1007
_POLICY: Final = 1008
_OUR_FAULT: Final = 1011
_TRY_AGAIN: Final = 1013
_REASON_BYTES: Final = 120

_log = logging.getLogger(__name__)
_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_any_decoder = msgspec.json.Decoder(AnyRequest)
_encode = msgspec.json.Encoder().encode


@websocket("/socket")
async def event_socket(socket: WebSocket[Caller, Any, Any], services: Provided) -> None:
    """Waits and subscriptions of one client, as `spellq.wire` names them."""
    await socket.accept()
    await _Conversation(socket, services).run()


class _NotAMessage(Exception):
    """What came is no JSON object, or too deep a one: there is nothing to answer to."""


class _Conversation:
    """One client's open requests. Each gets one answer, and is closed by it."""

    def __init__(self, socket: WebSocket[Caller, Any, Any], services: Services) -> None:
        self._socket = socket
        self._services = services
        self._caller: Caller = socket.user
        self._open: dict[int, Callable[[], None]] = {}
        self._answers: deque[ServerMessage] = deque()
        self._answered = anyio.Event()
        self._end = anyio.CancelScope()
        self._goodbye: tuple[int, str] | None = None

    async def run(self) -> None:
        try:
            with self._end:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._send_answers)
                    await self._receive(tasks)
        except* (WebSocketDisconnect, OSError):
            self._goodbye = None  # the client is gone, or the server closes the socket itself
        except* StoreUnavailable as group:
            self._leave(_TRY_AGAIN, str(group.exceptions[0]))
        except* Exception as group:
            _log.error("the event socket broke", exc_info=group)
            self._leave(_OUR_FAULT, "an internal error of spellq; its log tells more")
        finally:
            for number in tuple(self._open):
                self._close(number)
        if self._goodbye is not None:
            code, reason = self._goodbye
            # A client that does not read takes no goodbye either.
            with anyio.move_on_after(GOODBYE_SECONDS), suppress(OSError):
                await self._socket.close(code, _fitting(reason))

    def _leave(self, code: int, reason: str) -> None:
        self._goodbye = (code, reason)
        self._end.cancel()

    # What the client asks

    async def _receive(self, tasks: TaskGroup) -> None:
        while True:
            text = await self._socket.receive_text()
            try:
                message = _decode(text)
            except _NotAMessage as error:
                self._leave(_NOT_JSON, f"not a message: {error}")
                return
            if isinstance(message, RequestFailed):
                self._enqueue(message)
            elif isinstance(message, Cancel):
                self._close(message.id)
            elif message.id in self._open:
                self._refuse(message.id, 400, f"A request {message.id} is open already.")
            elif len(self._open) >= MAX_OPEN:
                self._refuse(message.id, 429, f"More than {MAX_OPEN} open requests on one socket.")
            elif isinstance(message, Wait):
                await self._wait(message)
            else:
                self._subscribe(message, tasks)

    async def _wait(self, wait: Wait) -> None:
        """Watch first, then look: what is reached in between is seen by one of the two."""
        watch = _Watch(self._services.feed, wait, self._answer)
        self._begin(wait.id, watch.stop)
        try:
            run = await self._services.runs.get(wait.run, self._caller.sees)
        except Rejected as error:
            self._fail(wait.id, error.status, str(error))
        else:
            watch.look(run)

    def _subscribe(self, request: Subscribe, tasks: TaskGroup) -> None:
        """Begin at the cursor, or now; where that is, is said at once."""
        scope = anyio.CancelScope()
        self._begin(request.id, scope.cancel)
        after = request.after or self._services.feed.newest
        tasks.start_soon(self._send_events, request, after, scope)

    async def _send_events(
        self, request: Subscribe, after: Cursor, scope: anyio.CancelScope
    ) -> None:
        wanted = request.filter
        if self._caller.sees is not None:
            wanted = msgspec.structs.replace(wanted, owner=self._caller.sees)
        with scope:
            try:
                await self._send(EventMessage(id=request.id, cursor=after))
                async with aclosing(self._services.feed.events(wanted, after)) as found:
                    async for logged in found:
                        event = event_view(logged.event)
                        message = EventMessage(id=request.id, cursor=logged.cursor, event=event)
                        await self._send(message)
            except (ValueError, OverflowError):
                self._fail(request.id, 400, f"{after[:40]!r} is no cursor of this event log.")

    # What is open, and its answers

    def _begin(self, number: int, close: Callable[[], None]) -> None:
        if not self._open:
            self._services.activity.begin()
        self._open[number] = close

    def _close(self, number: int) -> None:
        close = self._open.pop(number, None)
        if close is not None:
            close()
            if not self._open:
                self._services.activity.end()

    def _fail(self, number: int, status: int, error: str) -> None:
        self._answer(RequestFailed(number, status, error))

    def _answer(self, message: ServerMessage) -> None:
        """Answer an open request and close it."""
        if message.id in self._open:
            self._close(message.id)
            self._enqueue(message)

    def _refuse(self, number: int, status: int, error: str) -> None:
        """Answer a request that was never opened."""
        self._enqueue(RequestFailed(number, status, error))

    def _enqueue(self, message: ServerMessage) -> None:
        if len(self._answers) >= MAX_UNSENT:
            self._leave(_POLICY, f"{MAX_UNSENT} answers wait to be read")
            return
        self._answers.append(message)
        self._answered.set()

    async def _send(self, message: ServerMessage) -> None:
        await self._socket.send_text(_encode(message).decode())

    async def _send_answers(self) -> None:
        while True:
            while self._answers:
                await self._send(self._answers.popleft())
            self._answered = anyio.Event()
            if not self._answers:
                await self._answered.wait()


class _Watch:
    """Watches a run for one wait. Events count once the run was looked at, and may be seen."""

    def __init__(self, feed: Feed, wait: Wait, answer: Callable[[ServerMessage], None]) -> None:
        self._feed = feed
        self._wait = wait
        self._answer = answer
        self._early: list[Event] | None = []
        feed.add_watcher(wait.run, self._on_event)

    def stop(self) -> None:
        self._feed.remove_watcher(self._wait.run, self._on_event)

    def look(self, run: Run) -> None:
        """The caller may see the run, and this is where it is."""
        status = reached(run, self._wait.statuses)
        if status is not None:
            self._answer(Reached(self._wait.id, status))
        elif run.is_final:
            self._answer(EndedElsewhere(self._wait.id, run.status))
        else:
            early, self._early = self._early or [], None
            for event in early:
                self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if self._early is not None:
            self._early.append(event)
        elif event.status in self._wait.statuses:
            self._answer(Reached(self._wait.id, event.status))
        elif event.status in FINAL:
            self._answer(EndedElsewhere(self._wait.id, event.status))


def _decode(text: str) -> ClientMessage | RequestFailed:
    """The message, or the answer to one that cannot be; its id is 0 if it has no usable one.

    Raises:
        _NotAMessage: no JSON object.
    """
    try:
        return _decoder.decode(text)
    except (msgspec.ValidationError, UnicodeError) as error:
        problem = str(error)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _NotAMessage(str(error)) from error
    try:
        number = _any_decoder.decode(text).id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        number = 0
    return RequestFailed(number, 400, f"Not a message: {problem}")


def _fitting(reason: str) -> str:
    """As much of the reason as a close frame has room for."""
    return reason.encode(errors="replace")[:_REASON_BYTES].decode(errors="ignore")
