"""Where a transport finds its gateway, and what it may do when nobody is there."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from spellq_sdk.daemon import ensure_daemon
from spellq_sdk.exceptions import UnauthorizedClient
from spellq_sdk.settings import Settings


class Address(Struct, frozen=True):
    """A gateway's URL (no slash at the end) and the token to show it."""

    url: str
    token: str


class Door(Protocol):
    """A way to a gateway."""

    async def locate(self) -> Address:
        """Where the gateway is now. Called again whenever it could not be reached."""
        ...


class RemoteDoor:
    """A gateway at a fixed URL. Whoever cannot reach it can only try again."""

    def __init__(self, url: str, token: str) -> None:
        if not token:
            raise UnauthorizedClient(f"A client of {url} needs a token.")
        self._address = Address(url.rstrip("/"), token)

    async def locate(self) -> Address:
        return self._address


class LocalDoor:
    """The local daemon of a home folder: started when first needed, and again when it is gone.

    `announce` is called, from another thread, right before one is started.
    """

    def __init__(self, home: Path, announce: Callable[[], None] | None = None) -> None:
        self._home = home
        self._announce = announce
        self._been_there = False

    async def locate(self) -> Address:
        # Only the first look may replace a daemon of another version: two clients of different
        # versions, each waiting, would otherwise replace each other's daemon for ever.
        daemon = await asyncio.to_thread(
            ensure_daemon, self._home, announce=self._announce, any_version=self._been_there
        )
        self._been_there = True
        return Address(daemon.url.rstrip("/"), daemon.token)


def door_of(settings: Settings, announce: Callable[[], None] | None = None) -> Door:
    """The door that the settings lead to."""
    if settings.url is None:
        return LocalDoor(settings.home, announce)
    return RemoteDoor(settings.url, settings.token or "")
