"""Publishing what must not be lost: persistent, confirmed, events in batches."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiormq.exceptions import DeliveryError
from pamqp.commands import Basic

from spellq.ports import StoreUnavailable
from spellq_brokers.cluster.link import AWAY, TIMEOUT_SECONDS, Channel, Connection, unavailable

_WINDOW: Final = 32
_PERSISTENT: Final = 2
_MOST_KEYS: Final = 500
"""The keys of a message stand in its header, which has to fit into a frame of 128 KiB."""
_MOST_BYTES: Final = 1 << 20


class Publisher:
    """Publishes on the latest connection, so many messages at once at most."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._window = asyncio.Semaphore(_WINDOW)

    async def open(self, connection: Connection) -> None:
        self._channel = await connection.channel(on_return_raises=True)

    async def send(self, exchange: str, key: str, body: bytes, **properties: Any) -> None:
        """Publish, and return when the broker owns the message.

        Raises:
            StoreUnavailable: it is away, or has no place for it.
        """
        async with self._window:
            if self._channel is None:
                raise StoreUnavailable("RabbitMQ cannot be used now: not connected")
            try:
                await self._channel.basic_publish(
                    body,
                    exchange=exchange,
                    routing_key=key,
                    properties=Basic.Properties(delivery_mode=_PERSISTENT, **properties),
                    mandatory=True,
                    timeout=TIMEOUT_SECONDS,
                )
            except (DeliveryError, *AWAY) as error:
                raise unavailable(error) from error


@dataclass(frozen=True)
class _Share:
    """One caller's events, encoded, and their keys."""

    events: Sequence[bytes]
    keys: Sequence[str]
    sent: "asyncio.Future[None]"


class EventBatches:
    """While one message with events is on its way, those of everybody gather for the next one.

    `send` gets a JSON array of events and their keys.
    """

    def __init__(self, send: Callable[[bytes, list[str]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[_Share] = []
        self._sending: asyncio.Task[None] | None = None

    async def publish(self, events: Sequence[bytes], keys: Sequence[str]) -> None:
        """Return when the message they are in is confirmed. Raises what `send` raises."""
        loop = asyncio.get_running_loop()
        share = _Share(events, keys, loop.create_future())
        self._waiting.append(share)
        if self._sending is None:
            self._sending = loop.create_task(self._send_all())
        await share.sent

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                await self._send_batch(self._next_batch())
        finally:
            self._sending = None

    def _next_batch(self) -> list[_Share]:
        count = keys = size = 0
        for share in self._waiting:
            keys += len(share.keys)
            size += sum(map(len, share.events))
            if count and (keys > _MOST_KEYS or size > _MOST_BYTES):
                break
            count += 1
        batch = self._waiting[:count]
        del self._waiting[:count]
        return batch

    async def _send_batch(self, batch: Sequence[_Share]) -> None:
        body = b"[" + b",".join(event for share in batch for event in share.events) + b"]"
        error: StoreUnavailable | None = None
        try:
            await self._send(
                body, list(dict.fromkeys(key for share in batch for key in share.keys))
            )
        except StoreUnavailable as away:
            error = away
        for share in batch:
            if share.sent.done():
                continue
            if error is None:
                share.sent.set_result(None)
            else:
                share.sent.set_exception(error)
