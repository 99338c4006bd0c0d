"""The adapters under test; a cluster's join here, and nothing else changes."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spellq.ports import ArtifactStore, Bus, EventLog, Store
from spellq_brokers.embedded import DiskArtifacts, InProcessBus, SqliteStore
from tests.clocks import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=["sqlite-file", "sqlite-memory"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock
) -> AsyncIterator[Store]:
    if request.param == "sqlite-file":
        store = await SqliteStore.open(tmp_path, clock)
    else:
        store = await SqliteStore.in_memory(clock)
    yield store
    await store.close()


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
