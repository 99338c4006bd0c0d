"""An embedded installation: all of it in one process."""

import json
import logging
import os
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
from litestar import Litestar

from spellq.clock import SystemClock
from spellq.compose.refusals import REFUSALS, CannotStart, only_error
from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.daemon import DaemonFiles, local_owner
from spellq.files import is_full, no_space
from spellq.gateway import Services, create_app
from spellq.gateway.auth import ADMIN, Authenticator
from spellq.gateway.crowd import most_connections, raise_descriptor_limit
from spellq.gateway.server import (
    HOST,
    Server,
    leave_on_signal,
    leave_when_idle,
    listen,
)
from spellq.outbox import Outbox
from spellq.ports import Store, StoreUnavailable, Token
from spellq.seal import Sealer, load_or_create_key
from spellq.settings import Settings, read_settings, setting
from spellq.tokens import make_token, token_hash
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from spellq_brokers.embedded.schema import WrongSchema
from spellq_workers.agent import Agent, AgentSettings
from spellq_workers.machine import LocalMachine
from spellq_workers.process import ProcessExecutor
from spellq_workers.rawlog import OutputWatcher
from spellq_workers.room import Room

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DaemonSettings:
    """What `spellq daemon` was told; None where the environment or config.toml may say it."""

    home: Path
    port: int | None = None
    machine_types: str | None = None
    ready_fd: int | None = None


@dataclass(frozen=True)
class Runtime:
    """An embedded installation in one process."""

    services: Services
    supervisor: Supervisor
    agent: Agent
    app: Litestar


_REFUSALS: Final = (*REFUSALS, WrongSchema)


def serve(settings: DaemonSettings) -> None:
    """Run the local daemon in the foreground until SIGTERM, SIGINT, or ten idle minutes.

    The first line on `ready_fd` is JSON: `{"url": …}` once it serves, or `{"error": sentence}`.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    starter = _Starter(settings.ready_fd)
    files = DaemonFiles(settings.home)
    try:
        files.lock()
        told = setting("SPELLQ_MACHINE_TYPES", settings.machine_types, {})
        told = told or files.last_machine_types()
        offer = read_settings(settings.home, _text(settings.port), told)
        listener = listen(offer.port, files.last_port())
        anyio.run(
            _serve,
            files,
            listener,
            offer,
            told,
            starter,
            backend_options={"use_uvloop": True},
        )
    except (*_REFUSALS, BaseExceptionGroup) as error:
        refusal = only_error(error)
        if not isinstance(refusal, _REFUSALS):
            raise
        words = _in_words(refusal, settings.home)
        starter.say({"error": words})
        sys.exit(f"ERROR: {words}")


def _in_words(refusal: BaseException, home: Path) -> str:
    """What the user is told; whatever a full disk broke, it is nothing to be repaired."""
    error: BaseException | None = refusal
    while error is not None:
        out_of_space = isinstance(error, OSError) and is_full(error)
        if out_of_space or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return no_space(home)
        error = error.__cause__
    return str(refusal)


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)


class _Starter:
    """Whoever started the daemon and waits for its first words; it may have given up."""

    def __init__(self, ready_fd: int | None) -> None:
        self._ready_fd = ready_fd

    def say(self, message: dict[str, Any]) -> None:
        """Say it, unless something was said before: then the descriptor is not ours any more."""
        descriptor, self._ready_fd = self._ready_fd, None
        if descriptor is not None:
            with suppress(OSError):
                os.write(descriptor, json.dumps(message).encode() + b"\n")
            os.close(descriptor)


async def _serve(
    files: DaemonFiles,
    listener: socket.socket,
    offer: Settings,
    told: str | None,
    starter: _Starter,
) -> None:
    descriptors = raise_descriptor_limit()
    port = listener.getsockname()[1]
    url = f"http://{HOST}:{port}"
    async with embedded_runtime(files.home, offer, url) as runtime:
        token = files.read_token()
        if token is None:
            token = make_token(local_owner(), "local")
            files.write_token(token)
        services = runtime.services
        await services.store.put_token(
            token_hash(token), Token(local_owner(), "local", ADMIN, SystemClock().now())
        )
        most = most_connections(descriptors, offer.master_slots + sum(offer.slots.values()))
        server = Server(services.activity.watch(runtime.app), services.closing, most)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave_on_signal, server)
            tasks.start_soon(leave_when_idle, server, services)
            files.announce(url, port, told)
            starter.say({"url": url})
            _log.info("serving at %s, slots %s, masters %s", url, offer.slots, offer.master_slots)
            await server.serve(sockets=[listener])
            files.withdraw()
            tasks.cancel_scope.cancel()
    _log.info("left; commands under way run on")


@asynccontextmanager
async def embedded_runtime(home: Path, offer: Settings, url: str) -> AsyncIterator[Runtime]:
    """The whole of an embedded installation, working: store first, then agent, then supervisor.

    Raises:
        CannotStart, UnusableKey, WrongSchema: what is kept in `home` cannot be used.
    """
    clock = SystemClock()
    sealer = Sealer(load_or_create_key(home / "key"))
    store = await _open_store(home, clock)
    bus = InProcessBus()
    outbox = Outbox(store, bus)
    artifacts = await DiskArtifacts.make(home / "artifacts", offer.min_free_bytes)
    executor = ProcessExecutor(home)
    feed = Feed(store, store, bus, clock)
    supervisor = Supervisor(store, bus, outbox, feed, clock)
    async with OutputWatcher() as watcher:
        agent = Agent(
            AgentSettings(
                name="local",
                slots=offer.slots,
                master_slots=offer.master_slots,
                gateway_url=url,
            ),
            store,
            bus,
            outbox,
            artifacts,
            executor,
            LocalMachine(home / "agent", artifacts, watcher, Room(home, offer.min_free_bytes)),
            sealer,
            clock,
        )
        runs = Runs(store, outbox)
        outputs = SavedOutputs(store, artifacts)
        services = Services(
            store=store,
            artifacts=artifacts,
            feed=feed,
            launcher=Launcher(store, outbox, artifacts, sealer, clock, runs, outputs),
            runs=runs,
            outputs=outputs,
            authenticator=Authenticator(store),
        )
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(feed.run)
                await tasks.start(agent.run)
                await supervisor.refill()
                tasks.start_soon(supervisor.run)
                yield Runtime(services, supervisor, agent, create_app(services))
                tasks.cancel_scope.cancel()
        finally:
            await _let_go(executor, store)


async def _open_store(home: Path, clock: SystemClock) -> SqliteStore:
    try:
        return await SqliteStore.open(home, clock)
    except (sqlite3.DatabaseError, msgspec.MsgspecError, StoreUnavailable) as error:
        raise CannotStart(
            f"{home / 'state.db'} cannot be used: {error}. Restore it from a backup, or move it "
            "away (with state.db-wal and state.db-shm) to begin anew, without the runs in it."
        ) from error


async def _let_go(executor: ProcessExecutor, store: Store) -> None:
    with anyio.CancelScope(shield=True):
        await executor.close()
        await store.close()
