"""The event socket: one WebSocket a client, on which it multiplexes all its waits.

A wait is answered from the run's history when it was reached before, else by the event that
reaches it; so a client that comes back simply asks again. No task is kept for a wait.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import anyio
import msgspec
from anyio.abc import TaskGroup
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect

from spellq.control.errors import Rejected
from spellq.events import Cursor, Event
from spellq.gateway.auth import Caller
from spellq.gateway.services import Provided, Services
from spellq.runs import FINAL, reached
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
    event_view,
)

MAX_OPEN: Final = 100_000

_decoder = msgspec.json.Decoder(ClientMessage)
_encode = msgspec.json.Encoder().encode


@websocket("/socket")
async def event_socket(socket: WebSocket[Caller, Any, Any], services: Provided) -> None:
    """Waits and subscriptions of one client, as `spellq.wire` names them."""
    await socket.accept()
    await _Conversation(socket, services).run()


class _Conversation:
    """One client's open requests."""

    def __init__(self, socket: WebSocket[Caller, Any, Any], services: Services) -> None:
        self._socket = socket
        self._services = services
        self._caller: Caller = socket.user
        self._open: dict[int, Callable[[], None]] = {}
        self._answers: deque[ServerMessage] = deque()
        self._answered = anyio.Event()

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send_answers)
                await self._receive(tasks)
                tasks.cancel_scope.cancel()
        except* WebSocketDisconnect:
            pass
        finally:
            for close in self._open.values():
                close()

    async def _receive(self, tasks: TaskGroup) -> None:
        while True:
            text = await self._socket.receive_text()
            try:
                message = _decoder.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                await self._socket.close(code=1007, reason=f"not a message: {error}"[:120])
                return
            if isinstance(message, Cancel):
                self._close(message.id)
            elif len(self._open) >= MAX_OPEN:
                self._fail(message.id, 429, f"More than {MAX_OPEN} open requests on one socket.")
            elif message.id in self._open:
                self._fail(message.id, 400, f"A request {message.id} is open already.")
            elif isinstance(message, Wait):
                await self._wait(message)
            else:
                self._subscribe(message, tasks)

    async def _wait(self, wait: Wait) -> None:
        """Watch first, then look: what was reached in between is seen by one of the two."""
        watcher = partial(self._on_event, wait)
        feed = self._services.feed
        feed.add_watcher(wait.run, watcher)
        self._open[wait.id] = partial(feed.remove_watcher, wait.run, watcher)
        try:
            run = await self._services.runs.get(wait.run, self._caller.sees)
        except Rejected as error:
            self._fail(wait.id, error.status, str(error))
            return
        status = reached(run, wait.statuses)
        if status is not None:
            self._answer(Reached(wait.id, status))
        elif run.is_final:
            self._answer(EndedElsewhere(wait.id, run.status))

    def _on_event(self, wait: Wait, event: Event) -> None:
        if event.status in wait.statuses:
            self._answer(Reached(wait.id, event.status))
        elif event.status in FINAL:
            self._answer(EndedElsewhere(wait.id, event.status))

    def _subscribe(self, request: Subscribe, tasks: TaskGroup) -> None:
        """Begin at the cursor, or now; where that is, is said at once."""
        scope = anyio.CancelScope()
        self._open[request.id] = scope.cancel
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
                async for logged in self._services.feed.events(wanted, after):
                    event = event_view(logged.event)
                    await self._send(EventMessage(id=request.id, cursor=logged.cursor, event=event))
            except ValueError as error:
                self._fail(request.id, 400, f"{error}.")

    def _fail(self, number: int, status: int, error: str) -> None:
        self._answer(RequestFailed(number, status, error))

    def _answer(self, message: ServerMessage) -> None:
        """Answer a request, once."""
        self._close(message.id)
        self._answers.append(message)
        self._answered.set()

    def _close(self, number: int) -> None:
        close = self._open.pop(number, None)
        if close is not None:
            close()

    async def _send(self, message: ServerMessage) -> None:
        await self._socket.send_text(_encode(message).decode())

    async def _send_answers(self) -> None:
        while True:
            while self._answers:
                await self._send(self._answers.popleft())
            self._answered = anyio.Event()
            if not self._answers:
                await self._answered.wait()
