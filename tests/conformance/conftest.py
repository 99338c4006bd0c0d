"""The adapters under test; a cluster's join here, and nothing else changes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from spellq.ports import ArtifactStore, Bus, Clock, EventLog, Store
from spellq_brokers.cluster import RabbitBus, RedisStore
from spellq_brokers.cluster.engine import Engine
from spellq_brokers.cluster.keys import Keys
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from tests.clocks import HandClock
from tests.services import RabbitServer, RedisServer, rabbit_server, redis_server, working


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "redis"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock
) -> AsyncIterator[Store]:
    store: Store
    if request.param == "redis":
        url = request.getfixturevalue("redis").url
        store = await redis_store(url, clock)
    elif request.param == "sqlite-file":
        store = await SqliteStore.open(tmp_path, clock)
    else:
        store = await SqliteStore.in_memory(clock)
    yield store
    await store.close()


Passing = Callable[[float], Awaitable[None]]


@pytest.fixture
def passing(store: Store, clock: HandClock) -> Passing:
    """Lets seconds pass: where the engine has a clock of its own, real ones."""

    async def wait(seconds: float) -> None:
        clock.pass_seconds(seconds)
        if isinstance(store, RedisStore):
            await asyncio.sleep(seconds)

    return wait


async def redis_store(url: str, clock: Clock) -> RedisStore:
    """A store in a namespace of its own."""
    engine = Engine.at(url, Keys(f"test-{uuid4().hex}"))
    await engine.begin("epoch", bytes(32))
    return RedisStore(engine, clock)


@dataclass(frozen=True)
class Engines:
    """What an installation runs on, each part belonging to the others."""

    store: Store
    log: EventLog
    bus: Bus


@pytest.fixture(scope="session")
def rabbit() -> Iterator[RabbitServer]:
    with rabbit_server() as server:
        yield server


@pytest.fixture(params=["embedded", "cluster"])
async def engines(request: pytest.FixtureRequest, clock: HandClock) -> AsyncIterator[Engines]:
    if request.param == "embedded":
        store = await SqliteStore.in_memory(clock)
        yield Engines(store, store, InProcessBus())
        await store.close()
        return
    kept = await redis_store(request.getfixturevalue("redis").url, clock)
    async with working(rabbit_bus(request.getfixturevalue("rabbit").url)) as bus:
        yield Engines(kept, bus.log, bus)
    await kept.close()


@pytest.fixture(params=["in-process", "rabbitmq"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    if request.param == "in-process":
        yield InProcessBus()
        return
    async with working(rabbit_bus(request.getfixturevalue("rabbit").url)) as bus:
        yield bus


def rabbit_bus(url: str) -> RabbitBus:
    """A bus in a namespace of its own."""
    return RabbitBus(url, f"test-{uuid4().hex}", "epoch")


@pytest.fixture(params=["disk"])
async def artifacts(tmp_path: Path) -> ArtifactStore:
    return await DiskArtifacts.make(tmp_path / "artifacts")
