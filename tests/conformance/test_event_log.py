"""EventLog: every event, in one order, each at a cursor."""

import pytest

from spellq.events import BEGINNING, EventType, Logged
from spellq.lifecycle import Advance, Claim
from spellq.outbox import Outbox
from spellq.ports import NewRun
from spellq.runs import RunSpec, Status
from tests.conformance.conftest import Engines

STEPS = (Claim(1, "agent", "cpu-0", "claim"), Advance(1, Status.RUNNING))


async def walk(engines: Engines, count: int) -> list[int]:
    """So many new runs that are running, each of their steps published and in the log."""
    outbox = Outbox(engines.store, engines.bus)
    numbers = await engines.store.allot("run", count, f"{count} more")
    await outbox.create([NewRun(number, "ada", RunSpec("true")) for number in numbers])
    for number in numbers:
        await outbox.apply(number, *STEPS)
    await engines.log.head()
    return list(numbers)


def places(logged: list[Logged]) -> list[tuple[int, int]]:
    return [(entry.event.run, entry.event.version) for entry in logged]


async def test_it_has_every_event_once_in_order(engines: Engines) -> None:
    log = engines.log
    before = await log.head()
    numbers = await walk(engines, 3)
    logged = await log.events_after(before)
    assert places(logged) == [
        *((number, 1) for number in numbers),
        *((number, version) for number in numbers for version in (2, 3)),
    ]
    assert logged[0].event.type is EventType.RUN_CREATED
    assert await log.events_after(logged[4].cursor) == logged[5:]
    assert await log.events_after(await log.head()) == []
    assert await log.events_after(before, 2) == logged[:2]
    assert places(await log.events_after(BEGINNING)) == places(logged)


async def test_listeners_get_the_places_the_log_has(engines: Engines) -> None:
    async with engines.bus.listen() as heard:
        before = await engines.log.head()
        await walk(engines, 2)
        logged: list[Logged] = []
        while len(logged) < 6:
            logged += await anext(heard)
    kept = await engines.log.events_after(before)
    assert places(logged) == places(kept)
    assert [entry.cursor for entry in logged] == [entry.cursor for entry in kept]


@pytest.mark.parametrize("cursor", ["nonsense", "", "-1", "0.", "1.5", "9" * 30])
async def test_a_cursor_of_nobody_is_refused(engines: Engines, cursor: str) -> None:
    with pytest.raises(ValueError, match="no cursor"):
        await engines.log.events_after(cursor)
