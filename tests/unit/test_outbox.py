"""The outbox: what is committed is published, whatever happens to its committer."""

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from spellq.lifecycle import Claim
from spellq.outbox import Outbox
from spellq.ports import NewRun, Store
from spellq.runs import RunSpec
from spellq_brokers.embedded import InProcessBus, SqliteStore
from tests.clocks import HandClock


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await SqliteStore.open(tmp_path, HandClock())
    yield store
    await store.close()


async def test_a_committer_that_is_cancelled_publishes_first(store: Store) -> None:
    """A relay would be late, and a reader's cursor might be ahead of the event by then."""
    bus = InProcessBus()
    outbox = Outbox(store, bus)
    async with bus.listen() as heard:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await outbox.create([NewRun(1, "ada", RunSpec("true"))])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await outbox.apply(1, Claim(1, "box.1", "cpu-0", "claim"))
        assert [logged.event.version for logged in await anext(heard)] == [1, 2]
    assert await store.unpublished(0) == []
