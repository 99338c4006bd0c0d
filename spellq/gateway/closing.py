"""Answers without a foreseeable end, and how they end when the gateway closes."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final

import anyio
from anyio import CancelScope
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Send

KEEP_ALIVE_SECONDS: Final = 15.0


class Closing:
    """Says once that the gateway closes. Whatever never ends by itself ends then."""

    def __init__(self) -> None:
        self._begun = anyio.Event()

    def begin(self) -> None:
        self._begun.set()

    async def wait(self) -> None:
        """Wait until the gateway closes."""
        await self._begun.wait()


class OpenEnded(ASGIStreamingResponse):
    """A stream that goes on until it is over, its reader leaves, or the gateway closes.

    A closing gateway ends it as if it were over: whoever follows knows by what it read whether it
    was, and comes back otherwise. `keep_alive` is sent every 15 seconds between the pieces, which
    tells proxies and readers that somebody is there.
    """

    __slots__ = ("_closing", "_keep_alive", "_keep_alive_seconds", "_pieces")

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        closing: Closing,
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        keep_alive: bytes | None = None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        super().__init__(iterator=pieces, media_type=media_type, headers=dict(headers or {}))
        self._pieces = pieces
        self._closing = closing
        self._keep_alive = keep_alive
        self._keep_alive_seconds = keep_alive_seconds

    async def send_body(self, send: Send, receive: Receive) -> None:
        async with anyio.create_task_group() as tasks:
            scope = tasks.cancel_scope
            tasks.start_soon(self._leave_with_the_reader, receive, scope)
            tasks.start_soon(self._leave_with_the_gateway, scope)
            if self._keep_alive is not None:
                tasks.start_soon(self._say_something, self._keep_alive, send)
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    await _send(send, piece)
            scope.cancel()
        await _send(send, b"", more=False)

    async def _leave_with_the_reader(self, receive: Receive, scope: CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _leave_with_the_gateway(self, scope: CancelScope) -> None:
        await self._closing.wait()
        scope.cancel()

    async def _say_something(self, comment: bytes, send: Send) -> None:
        while True:
            await anyio.sleep(self._keep_alive_seconds)
            await _send(send, comment)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
