"""A gateway without HTTP: requests are handled in its process, and die with it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.runs import Runs
from spellq.ports import Store
from tests.simulation.loop import Process
from tests.simulation.world import Signal, World

T = TypeVar("T")


class ConnectionCut(Exception):
    """The client does not know what became of its request."""


@dataclass(frozen=True)
class Door:
    """What handlers work with."""

    store: Store
    feed: Feed
    launcher: Launcher
    runs: Runs


class Gateway:
    """Serves clients while its process lives and has opened its door."""

    def __init__(self, world: World, process: Process, door: Door) -> None:
        self._world = world
        self._process = process
        self._door = door
        self._answers: dict[asyncio.Future[object], asyncio.Task[None]] = {}
        self.open = True
        process.when_dead(self.close)

    def close(self) -> None:
        """Whoever still waits for an answer is cut off."""
        self.open = False
        for answer in tuple(self._answers):
            self._cut(answer)

    async def serve(
        self, handle: Callable[[Door], Awaitable[T]], patience: float | None, *, stream: bool
    ) -> T:
        """The handler's result; after `patience` seconds the client cuts the connection itself.

        A handler whose client is gone goes on, unless it is a `stream`.

        Raises:
            ConnectionCut: the request may have been handled, or be handled yet.
        """
        if not self.open:
            raise ConnectionCut
        answer: asyncio.Future[object] = self._world.loop.create_future()
        self._answers[answer] = self._process.spawn(self._handle(handle, answer))
        if patience is not None:
            self._world.loop.call_later(patience, self._cut, answer)
        try:
            return await answer  # type: ignore[return-value]
        finally:
            handling = self._answers.pop(answer)
            if stream:
                handling.cancel()

    async def _handle(
        self, handle: Callable[[Door], Awaitable[object]], answer: asyncio.Future[object]
    ) -> None:
        try:
            result = await handle(self._door)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(result)

    def _cut(self, answer: asyncio.Future[object]) -> None:
        if not answer.done():
            answer.set_exception(ConnectionCut())


class Gateways:
    """Those that serve now."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._serving: list[Gateway] = []
        self._changed = Signal(world.loop)

    def add(self, gateway: Gateway) -> None:
        self._serving.append(gateway)
        self._changed.give()

    async def any(self) -> Gateway:
        """One that serves; waits until there is one."""
        return self._world.random.choice(await self._changed.until(self._open))

    def _open(self) -> list[Gateway]:
        self._serving = [gateway for gateway in self._serving if gateway.open]
        return self._serving
