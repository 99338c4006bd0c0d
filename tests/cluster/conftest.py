"""Servers that tests may kill: each test has its own."""

from collections.abc import AsyncIterator, Iterator

import pytest

from spellq.clock import SystemClock
from spellq_brokers.cluster import RedisStore
from spellq_brokers.cluster.engine import Engine
from spellq_brokers.cluster.keys import Keys
from tests.services import RedisServer, redis_server


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


async def open_store(redis: RedisServer) -> RedisStore:
    engine = Engine.at(redis.url, Keys("spellq"))
    await engine.begin("first", bytes(32))
    return RedisStore(engine, SystemClock())


@pytest.fixture
async def store(redis: RedisServer) -> AsyncIterator[RedisStore]:
    store = await open_store(redis)
    yield store
    await store.close()


@pytest.fixture
async def other(redis: RedisServer, store: RedisStore) -> AsyncIterator[RedisStore]:
    """Another process's store of the same installation."""
    other = await open_store(redis)
    yield other
    await other.close()
