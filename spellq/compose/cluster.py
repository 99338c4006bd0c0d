"""A cluster: gateways and agents, each a process, over RabbitMQ, Redis and a shared store."""

import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from spellq.clock import SystemClock
from spellq.compose.refusals import CannotStart
from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.control.supervisor import Supervisor
from spellq.daemon import DaemonFiles
from spellq.gateway import Services, create_app
from spellq.gateway.auth import ADMIN, Authenticator
from spellq.gateway.crowd import most_connections, raise_descriptor_limit
from spellq.gateway.server import HOST, Server, leave_on_signal, listen
from spellq.outbox import Outbox
from spellq.ports import ArtifactStore, Store, Token
from spellq.seal import Sealer, make_key
from spellq.settings import ClusterSettings, InvalidSetting, Settings
from spellq.tokens import token_hash
from spellq_brokers.cluster import RabbitBus, RedisStore
from spellq_brokers.cluster.engine import Engine
from spellq_brokers.cluster.keys import Keys
from spellq_brokers.embedded import DiskArtifacts
from spellq_workers.agent import Agent, AgentSettings
from spellq_workers.machine import LocalMachine
from spellq_workers.process import ProcessExecutor
from spellq_workers.rawlog import OutputWatcher
from spellq_workers.room import Room

Say = Callable[[str], None]

_SLOTS_OF_OTHERS = 64
"""How many masters a gateway keeps connections for; it does not know the agents' slots."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engines:
    """What a cluster's processes share."""

    store: Store
    bus: RabbitBus
    outbox: Outbox
    artifacts: ArtifactStore
    sealer: Sealer
    clock: SystemClock


def run_gateway(
    cluster: ClusterSettings, port: str | None, admin_token: str | None, say: Say
) -> None:
    """Serve until SIGTERM or SIGINT. `admin_token` is let in with everything allowed.

    Raises:
        CannotListen, ValueError, StoreUnavailable: as the message says.
    """
    listener = listen(port, None)
    _run(lambda: _serve_gateway(cluster, listener, admin_token, say))


def run_agent(
    cluster: ClusterSettings, home: Path, offer: Settings, gateway_url: str, say: Say
) -> None:
    """Execute runs until SIGTERM or SIGINT; commands under way run on.

    Raises:
        AlreadyRunning, UnusableHome, ValueError, StoreUnavailable: as the message says.
    """
    files = DaemonFiles(home)
    files.lock(for_agent=True)
    _run(lambda: _serve_agent(cluster, home, offer, gateway_url, say))


def _run(serve: Callable[[], Awaitable[None]]) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("aiormq", "aio_pika"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what matters is told by our own
    anyio.run(serve, backend_options={"use_uvloop": True})


@asynccontextmanager
async def _engines(cluster: ClusterSettings) -> AsyncIterator[tuple[Engines, TaskGroup]]:
    """The engines, working, and the task group they work in."""
    clock = SystemClock()
    engine = _engine(cluster)
    try:
        dangers = await engine.dangers()
        if dangers and not cluster.unsafe_redis:
            raise CannotStart(
                f"This Redis may lose runs: {'; '.join(dangers)}. "
                "Or accept that, with SPELLQ_UNSAFE_REDIS=1."
            )
        key = await engine.begin(secrets.token_hex(4), make_key())
        bus = RabbitBus(cluster.amqp_url, cluster.namespace, engine.epoch)
        store = RedisStore(engine, clock)
        artifacts = await DiskArtifacts.make(cluster.artifacts)
        async with anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            yield Engines(store, bus, Outbox(store, bus), artifacts, Sealer(key), clock), tasks
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await engine.close()


def _engine(cluster: ClusterSettings) -> Engine:
    try:
        keys = Keys(cluster.namespace)
    except ValueError as error:
        raise InvalidSetting(f"{error} It is in SPELLQ_NAMESPACE.") from error
    try:
        return Engine.at(cluster.redis_url, keys)
    except ValueError:  # its message may quote a part of the password
        raise InvalidSetting(
            "SPELLQ_REDIS_URL is no URL of a Redis. "
            "In a password, write / @ : # as %2F %40 %3A %23."
        ) from None


async def _serve_gateway(
    cluster: ClusterSettings, listener: socket.socket, admin_token: str | None, say: Say
) -> None:
    descriptors = raise_descriptor_limit()
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    async with _engines(cluster) as (engines, tasks):
        store, clock = engines.store, engines.clock
        feed = Feed(store, engines.bus.log, engines.bus, clock)
        supervisor = Supervisor(store, engines.bus, engines.outbox, feed, clock)
        runs = Runs(store, engines.outbox)
        outputs = SavedOutputs(store, engines.artifacts)
        services = Services(
            store=store,
            artifacts=engines.artifacts,
            feed=feed,
            launcher=Launcher(
                store, engines.outbox, engines.artifacts, engines.sealer, clock, runs, outputs
            ),
            runs=runs,
            outputs=outputs,
            authenticator=Authenticator(store),
        )
        if admin_token:
            token = Token(ADMIN, "environment", ADMIN, clock.now())
            await store.put_token(token_hash(admin_token), token)
        await tasks.start(feed.run)
        tasks.start_soon(supervisor.run)
        most = most_connections(descriptors, _SLOTS_OF_OTHERS)
        server = Server(create_app(services), services.closing, most)
        tasks.start_soon(leave_on_signal, server)
        say(f"spellq serves at {url}")
        await server.serve(sockets=[listener])


async def _serve_agent(
    cluster: ClusterSettings, home: Path, offer: Settings, gateway_url: str, say: Say
) -> None:
    async with _engines(cluster) as (engines, tasks), OutputWatcher() as watcher:
        executor = ProcessExecutor(home)
        agent = Agent(
            AgentSettings(
                name=socket.gethostname(),
                slots=offer.slots,
                master_slots=offer.master_slots,
                gateway_url=gateway_url,
            ),
            engines.store,
            engines.bus,
            engines.outbox,
            engines.artifacts,
            executor,
            LocalMachine(
                home / "agent", engines.artifacts, watcher, Room(home, offer.min_free_bytes)
            ),
            engines.sealer,
            engines.clock,
        )
        try:
            await tasks.start(agent.run)
            slots = ", ".join(f"{count} {queue}" for queue, count in agent.info.slots.items())
            say(f"Agent {agent.info.name} serves {slots}")
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            _log.info("left; commands under way run on")
        finally:
            with anyio.CancelScope(shield=True):
                await executor.close()
