"""Builds a runtime from settings: the only module that knows every adapter."""

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import uvicorn
from litestar import Litestar

from spellq.clock import SystemClock
from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.daemon import LOCAL_OWNER, AlreadyRunning, DaemonFiles
from spellq.gateway import Services, create_app
from spellq.gateway.activity import Activity
from spellq.gateway.auth import ADMIN, Authenticator
from spellq.outbox import Outbox
from spellq.ports import RunQuery, Store, Token
from spellq.seal import Sealer, load_or_create_key
from spellq.settings import (
    DEFAULT_MASTER_SLOTS,
    DEFAULT_PORT,
    InvalidSetting,
    parse_machine_types,
    read_config,
    setting,
)
from spellq.tokens import make_token, token_hash
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from spellq_brokers.embedded.schema import WrongSchema
from spellq_workers.agent import Agent, AgentSettings
from spellq_workers.process import ProcessExecutor
from spellq_workers.rawlog import OutputWatcher

IDLE_SECONDS: Final = 600.0
HOST: Final = "127.0.0.1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DaemonSettings:
    """What `spellq daemon` was told; None where the environment or config.toml may say it."""

    home: Path
    port: int | None = None
    machine_types: str | None = None
    ready_fd: int | None = None


class CannotStart(Exception):
    """The daemon cannot start; the message says why and what would help."""


@dataclass(frozen=True)
class Runtime:
    """An embedded installation in one process."""

    store: SqliteStore
    supervisor: Supervisor
    feed: Feed
    agent: Agent
    app: Litestar


def serve(settings: DaemonSettings) -> None:
    """Run the local daemon in the foreground until SIGTERM, SIGINT, or ten idle minutes.

    The first line on `ready_fd` is JSON: `{"url": …}` once it serves, or `{"error": sentence}`.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    files = DaemonFiles(settings.home)
    try:
        config = read_config(settings.home)
        asked = setting("SPELLQ_PORT", _text(settings.port), config)
        types = setting("SPELLQ_MACHINE_TYPES", settings.machine_types, config)
        slots = parse_machine_types(types or "cpu")
        files.lock()
        listener = _listen(asked, files.last_port())
        anyio.run(
            _serve,
            files,
            listener,
            slots,
            settings.ready_fd,
            backend_options={"use_uvloop": True},
        )
    except (InvalidSetting, AlreadyRunning, CannotStart, WrongSchema, OSError) as error:
        _say(settings.ready_fd, {"error": str(error)})
        sys.exit(f"ERROR: {error}")


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)


def _listen(asked: str | None, last: int | None) -> socket.socket:
    """A listening socket on loopback: the port asked for, or the usual one, or a free one.

    Raises:
        CannotStart: the port asked for is taken or is none.
    """
    if asked is not None:
        if not (asked.isascii() and asked.isdigit() and int(asked) < 65536):
            raise CannotStart(f"Invalid port {asked!r}: use a number from 1 to 65535.")
        try:
            return _bind(int(asked))
        except OSError as error:
            raise CannotStart(
                f"Port {asked} cannot be used: {error.strerror}. "
                "Choose another with --port, or leave it out to get a free one."
            ) from error
    for port in (last, DEFAULT_PORT, 0):
        if port is not None:
            try:
                return _bind(port)
            except OSError:
                continue
    raise CannotStart(f"No port can be opened on {HOST}.")


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


def _say(ready_fd: int | None, message: dict[str, Any]) -> None:
    if ready_fd is not None:
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
        os.close(ready_fd)


async def _serve(
    files: DaemonFiles,
    listener: socket.socket,
    slots: dict[str, int],
    ready_fd: int | None,
) -> None:
    port = listener.getsockname()[1]
    url = f"http://{HOST}:{port}"
    async with embedded_runtime(files.home, slots, url) as runtime:
        token = files.read_token()
        if token is None:
            token = make_token(LOCAL_OWNER(), "local")
            files.write_token(token)
        await runtime.store.put_token(
            token_hash(token), Token(LOCAL_OWNER(), "local", ADMIN, SystemClock().now())
        )
        activity = Activity(runtime.app)
        server = _Server(
            uvicorn.Config(
                activity,
                log_level="warning",
                log_config=None,
                access_log=False,
                ws="wsproto",
                http="httptools",
                lifespan="off",
                timeout_graceful_shutdown=1,
                ws_max_size=1024 * 1024,
            )
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_leave_on_signal, server)
            tasks.start_soon(_leave_when_idle, server, activity, runtime)
            files.announce(url, port)
            _say(ready_fd, {"url": url})
            _log.info("serving at %s, slots %s", url, slots)
            await server.serve(sockets=[listener])
            files.withdraw()
            tasks.cancel_scope.cancel()
    _log.info("left; commands under way run on")


class _Server(uvicorn.Server):
    """Leaves signals to us: what is under way has to be let go of in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _leave_on_signal(server: uvicorn.Server) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            server.should_exit = True


async def _leave_when_idle(server: uvicorn.Server, activity: Activity, runtime: Runtime) -> None:
    """Leave once nobody asked anything and no run was under way for ten minutes."""
    while True:
        quiet = activity.quiet_seconds()
        if quiet < IDLE_SECONDS:
            await anyio.sleep(IDLE_SECONDS - quiet)
        elif await runtime.store.find(RunQuery(limit=1, live=True)):
            activity.stir()
        else:
            server.should_exit = True
            return


@asynccontextmanager
async def embedded_runtime(home: Path, slots: dict[str, int], url: str) -> AsyncIterator[Runtime]:
    """The whole of an embedded installation, working: store first, then agent, then supervisor."""
    clock = SystemClock()
    store = await SqliteStore.open(home, clock)
    bus = InProcessBus()
    outbox = Outbox(store, bus)
    artifacts = await DiskArtifacts.make(home / "artifacts")
    sealer = Sealer(load_or_create_key(home / "key"))
    executor = ProcessExecutor(home)
    feed = Feed(store, bus)
    supervisor = Supervisor(store, bus, outbox, feed, clock)
    async with OutputWatcher() as watcher:
        agent = Agent(
            AgentSettings(
                folder=home / "agent",
                name="local",
                slots=slots,
                master_slots=DEFAULT_MASTER_SLOTS if "cpu" in slots else 0,
                gateway_url=url,
            ),
            store,
            bus,
            outbox,
            artifacts,
            executor,
            watcher,
            sealer,
            clock,
        )
        app = create_app(
            Services(
                store=store,
                artifacts=artifacts,
                feed=feed,
                launcher=Launcher(store, outbox, artifacts, sealer, clock),
                runs=Runs(store, outbox, bus),
                outputs=SavedOutputs(store, artifacts),
                authenticator=Authenticator(store),
            )
        )
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(feed.run)
                await tasks.start(agent.run)
                await supervisor.refill()
                tasks.start_soon(supervisor.run)
                yield Runtime(store, supervisor, feed, agent, app)
                tasks.cancel_scope.cancel()
        finally:
            await _let_go(executor, store)


async def _let_go(executor: ProcessExecutor, store: Store) -> None:
    with anyio.CancelScope(shield=True):
        await executor.close()
        await store.close()
