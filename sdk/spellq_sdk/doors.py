"""Where a transport finds its gateway, and what it may do when nobody is there."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct

from spellq_sdk.daemon import ensure_daemon
from spellq_sdk.exceptions import ClientException, UnauthorizedClient
from spellq_sdk.settings import Settings

T = TypeVar("T")


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
    """A gateway at a fixed URL. Whoever cannot reach it can only try again.

    Raises:
        ClientException: what is no URL of http or https with a host.
        UnauthorizedClient: the token is empty.
    """

    def __init__(self, url: str, token: str) -> None:
        if not token:
            raise UnauthorizedClient(f"A client of {url} needs a token.")
        self._address = Address(_checked(url).rstrip("/"), token)

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
        daemon = await _in_thread(
            lambda: ensure_daemon(self._home, announce=self._announce, any_version=self._been_there)
        )
        self._been_there = True
        return Address(daemon.url.rstrip("/"), daemon.token)


async def _in_thread(work: Callable[[], T]) -> T:
    """What `work` gives. Unlike `asyncio.to_thread`, nobody waits for the thread after a ^C."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not outcome.done():
            set_outcome()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            setting = functools.partial(outcome.set_exception, error)
        else:
            setting = functools.partial(outcome.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, setting)

    threading.Thread(target=run, name="spellq-start", daemon=True).start()
    return await outcome


def door_of(settings: Settings, announce: Callable[[], None] | None = None) -> Door:
    """The door that the settings lead to."""
    if settings.url is None:
        return LocalDoor(settings.home, announce)
    return RemoteDoor(settings.url, settings.token or "")


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        good = False
    if not good:
        raise ClientException(
            f"{url!r} is not the URL of a gateway. "
            "Write it with http or https, for example http://127.0.0.1:7735."
        )
    return url
