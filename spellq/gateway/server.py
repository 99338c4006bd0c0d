"""The HTTP server of one process: where it listens, and how it leaves."""

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import uvicorn
from litestar.types import ASGIApp

from spellq.gateway import crowd
from spellq.gateway.closing import Closing
from spellq.gateway.services import Services
from spellq.ports import RunQuery, Store, StoreUnavailable
from spellq.runs import parse_number
from spellq.settings import DEFAULT_PORT

HOST: Final = "127.0.0.1"
IDLE_SECONDS: Final = 600.0
GRACEFUL_SECONDS: Final = 1
"""How long requests under way may go on when the daemon leaves."""

LARGEST_MESSAGE_BYTES: Final = 1024 * 1024

_log = logging.getLogger(__name__)


class CannotListen(Exception):
    """No socket can be opened; the message says why and what would help."""


def listen(asked: str | None, last: int | None) -> socket.socket:
    """A listening socket on loopback: the port asked for, or the usual one, or a free one.

    Raises:
        CannotListen: the port asked for is taken or is none.
    """
    if asked is not None:
        port = parse_number(asked)
        if port is None or port > 65535:
            raise CannotListen(f"Invalid port {asked[:40]!r}: use a number from 1 to 65535.")
        try:
            return _bind(port)
        except OSError as error:
            raise CannotListen(
                f"Port {asked} cannot be used: {error.strerror}. "
                "Choose another with --port, or leave it out to get a free one."
            ) from error
    for choice in (last, DEFAULT_PORT, 0):
        if choice is not None:
            try:
                return _bind(choice)
            except OSError:
                continue
    raise CannotListen(f"No port can be opened on {HOST}.")


def _bind(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(False)
    return listener


class Server(uvicorn.Server):
    """Leaves signals to us: what is under way has to be let go of in order.

    At most `most_connections` are served at once.
    """

    def __init__(self, app: ASGIApp, closing: Closing, most_connections: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                log_config=None,
                access_log=False,
                ws="wsproto",
                http=crowd.protocol(most_connections),
                lifespan="off",
                timeout_graceful_shutdown=2 * GRACEFUL_SECONDS,
                ws_max_size=LARGEST_MESSAGE_BYTES,
            )
        )
        self._closing = closing

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what never ends by itself, then wait a moment for the requests under way."""
        self._closing.begin()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._abort_the_rest)
            await super().shutdown(sockets)
            tasks.cancel_scope.cancel()

    async def _abort_the_rest(self) -> None:
        """Whose reader does not read would never end."""
        await anyio.sleep(GRACEFUL_SECONDS)
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


async def leave_on_signal(server: Server) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            server.should_exit = True


async def leave_when_idle(
    server: Server, services: Services, idle_seconds: float = IDLE_SECONDS
) -> None:
    """Leave once nobody asked anything and no run was under way for ten minutes."""
    activity = services.activity
    while True:
        quiet = activity.quiet_seconds()
        if quiet < idle_seconds:
            await anyio.sleep(idle_seconds - quiet)
        elif await _has_live_runs(services.store):
            activity.stir()
        else:
            server.should_exit = True
            return


async def _has_live_runs(store: Store) -> bool:
    """Whether there is a run to stay for; a store that cannot tell may have one."""
    try:
        return bool(await store.find(RunQuery(limit=1, live=True)))
    except StoreUnavailable as error:
        _log.warning("cannot tell whether runs are under way: %s", error)
        return True
