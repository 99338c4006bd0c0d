"""A connection to RabbitMQ under a supervisor of our own: lost, it is made anew."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import aio_pika
import anyio
import anyio.lowlevel
from aio_pika.connection import Connection as PikaConnection
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from aiormq.exceptions import AMQPError
from anyio.abc import TaskStatus
from pamqp.commands import Basic

from spellq.ports import StoreUnavailable

T = TypeVar("T")

TIMEOUT_SECONDS: Final = 5.0
_HEARTBEAT_SECONDS: Final = 6
"""A dead link is noticed after three heartbeats' worth of silence."""
_BACK_OFF_SECONDS: Final = (0.1, 0.3, 1.0, 3.0, 5.0)

AWAY: Final = (AMQPError, OSError, TimeoutError, RuntimeError, asyncio.InvalidStateError)
"""What the libraries raise where the broker is away, or goes away in between."""

Channel = AbstractChannel
Connection = AbstractConnection
Prepare = Callable[[Connection], Awaitable[None]]

_log = logging.getLogger(__name__)


class Link:
    """One connection. `prepare` is called with each new one, before anybody else gets it."""

    def __init__(self, url: str, name: str, prepare: Sequence[Prepare]) -> None:
        self._url = url
        self._name = name
        self._prepare = prepare
        self._connection: Connection | None = None
        self._connected = anyio.Event()
        self._lost = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the connection until cancelled; started once there is one."""
        tries = 0
        while True:
            try:
                with anyio.fail_after(2 * TIMEOUT_SECONDS):
                    pika = await self._connect()
            except AWAY as error:
                if tries == 0:
                    _log.warning("RabbitMQ cannot be reached: %s", error or type(error).__name__)
                seconds = _BACK_OFF_SECONDS[min(tries, len(_BACK_OFF_SECONDS) - 1)]
                tries += 1
                await anyio.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311
                continue
            if tries:
                _log.info("RabbitMQ is back")
            tries = 0
            task_status.started()
            task_status = anyio.TASK_STATUS_IGNORED
            try:
                await self._lost.wait()
            finally:
                self._lose()
                with anyio.CancelScope(shield=True), anyio.move_on_after(TIMEOUT_SECONDS):
                    await pika.close()

    async def _connect(self) -> PikaConnection:
        pika = await aio_pika.connect(
            self._url,
            timeout=TIMEOUT_SECONDS,
            heartbeat=_HEARTBEAT_SECONDS,
            client_properties={"connection_name": self._name},
        )
        assert isinstance(pika, PikaConnection)
        assert pika.transport is not None
        connection = pika.transport.connection
        try:
            for prepare in self._prepare:
                await prepare(connection)
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(TIMEOUT_SECONDS):
                await pika.close()
            raise
        self._connection, self._lost = connection, anyio.Event()
        connection.closing.add_done_callback(lambda _: self._lose())
        self._connected.set()
        return pika

    def _lose(self) -> None:
        if self._connection is not None:
            self._connection, self._connected = None, anyio.Event()
            self._lost.set()

    async def connection(self) -> Connection:
        """The connection; while there is none, wait for it."""
        while self._connection is None or self._connection.is_closed:
            await self._connected.wait()
            await anyio.lowlevel.checkpoint()  # that it has closed is told in this turn of the loop
        return self._connection


def unavailable(error: BaseException) -> StoreUnavailable:
    """What callers are told when one of AWAY is raised."""
    return StoreUnavailable(f"RabbitMQ cannot be used now: {error or type(error).__name__}")


def delivered(message: DeliveredMessage) -> tuple[int, str]:
    """A consumed message's delivery tag and its routing key."""
    delivery = message.delivery
    assert isinstance(delivery, Basic.Deliver)
    assert delivery.delivery_tag is not None
    return delivery.delivery_tag, delivery.routing_key or ""


async def together(*steps: Awaitable[Any]) -> None:
    """Do all the steps at once; when all are over, raise what the first that failed raised."""
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def whole(step: Coroutine[Any, Any, T]) -> T:
    """The result of a step that is not cut short: cancelled, we wait for its end first.

    A call to the broker that is cancelled on its way closes its channel without knowing whether it
    is open, and the broker takes that for an error of the whole connection (aiormq 7.2).
    """
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


async def close(channel: Channel) -> None:
    """Close it, even while being cancelled; where the link is away, it is closed already."""

    async def step() -> None:
        await channel.close()

    with suppress(*AWAY):
        await whole(step())
