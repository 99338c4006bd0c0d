"""The adapters under test; a cluster's join here, and nothing else changes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from spellq.ports import ArtifactStore, Bus, Clock, EventLog, Store
from spellq_brokers.cluster import RedisStore
from spellq_brokers.cluster.engine import Engine
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from tests.clocks import HandClock
from tests.services import RedisServer, redis_server


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
    engine = Engine.at(url, f"test-{uuid4().hex}")
    await engine.begin("epoch")
    return RedisStore(engine, clock)


@dataclass(frozen=True)
class Engines:
    """What an installation runs on, each part belonging to the others."""

    store: Store
    log: EventLog
    bus: Bus


@pytest.fixture(params=["embedded"])
async def engines(clock: HandClock) -> AsyncIterator[Engines]:
    store = await SqliteStore.in_memory(clock)
    yield Engines(store, store, InProcessBus())
    await store.close()


@pytest.fixture(params=["in-process"])
async def bus() -> Bus:
    return InProcessBus()


@pytest.fixture(params=["disk"])
async def artifacts(tmp_path: Path) -> ArtifactStore:
    return await DiskArtifacts.make(tmp_path / "artifacts")
