"""Room on the disk an agent works on: looked at with every heartbeat, waited for where it lacks."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import anyio

from spellq.files import free_bytes
from spellq.ports import StoreFull
from spellq.sizes import human_size

T = TypeVar("T")

Say = Callable[[Sequence[str]], Awaitable[None]]


class Room:
    """What is free on the disk of `folder` beyond `reserve_bytes`.

    The reserve is for the store's own small writes: states, exit codes, stops, logs. With none,
    the disk is not looked at.
    """

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._looked = anyio.Event()

    def lack(self, more_bytes: int = 0) -> str | None:
        """What lacks now for `more_bytes` beside the reserve; None: it is there."""
        wanted = self._reserve_bytes + more_bytes
        try:
            if not wanted or (free := free_bytes(self._folder)) >= wanted:
                return None
        except OSError:
            return None
        return f"disk space: {human_size(free)} free, {human_size(wanted)} wanted on {self._folder}"

    def look(self) -> None:
        """Have everybody who waits look again; the agent's heartbeat does this."""
        self._looked.set()
        self._looked = anyio.Event()

    async def wait(self, more_bytes: int = 0) -> None:
        """Return once nothing lacks."""
        while self.lack(more_bytes) is not None:
            await self.next_look()

    async def next_look(self) -> None:
        """Return when everybody looks again."""
        await self._looked.wait()

    async def spend(self, step: Callable[[], Awaitable[T]], say: Say) -> T:
        """The answer of a step that writes to the disk, once there is room for it.

        A step that fails with StoreFull is repeated. `say` is told what is waited for.
        """
        more_bytes = 0
        while True:
            if lack := self.lack(more_bytes):
                await say([f"Waiting for {lack}"])
                await self.wait(more_bytes)
            try:
                return await step()
            except StoreFull as full:
                more_bytes = full.wanted_bytes
                await self.next_look()
