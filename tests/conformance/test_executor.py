"""What every executor promises (spellq.ports.Executor): the real one, and the simulation's."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from spellq.ports import Adopted, ExecutionLost, Exit
from tests.conformance.executors import (
    Site,
    Tell,
    at_a_process_site,
    at_a_simulated_site,
    prepare,
)
from tests.simulation.machine import Script

QUICK = Script(code=3, lines=(0.0,))
AGES = Script(seconds=1000, lines=(0.0,))
DEAF = Script(seconds=1000, lines=(0.0,), heeds=None)


@pytest.fixture(params=[at_a_process_site, at_a_simulated_site])
def tell(request: pytest.FixtureRequest) -> Tell:
    tell: Tell = request.param
    return tell


def test_a_command_is_executed_once_however_often_it_is_started(tell: Tell) -> None:
    async def story(site: Site) -> tuple[int, int]:
        execution = await prepare(site, QUICK)
        await asyncio.gather(*(execution.start() for _ in range(3)))
        code = (await execution.ended()).code
        await execution.start()
        return code, site.times_executed(execution)

    assert tell(story) == (3, 1)


@pytest.mark.parametrize(("verb", "code"), [("stop", 143), ("kill", 137)])
def test_what_was_to_end_before_it_started_is_not_executed(
    tell: Tell, verb: str, code: int
) -> None:
    async def story(site: Site) -> tuple[int, int]:
        execution = await prepare(site, QUICK)
        await (execution.stop(30) if verb == "stop" else execution.kill())
        await execution.start()
        return (await execution.ended()).code, site.times_executed(execution)

    assert tell(story) == (code, 0)


def test_that_holds_for_what_an_earlier_agent_ended(tell: Tell) -> None:
    async def story(site: Site) -> tuple[int, int]:
        await (await prepare(site, QUICK)).kill()
        (adopted,) = await site.restart().adopt()
        await adopted.execution.start()
        return (await adopted.execution.ended()).code, site.times_executed(adopted.execution)

    assert tell(story) == (137, 0)


@pytest.mark.parametrize(
    ("script", "verb", "code"), [(AGES, "stop", 143), (DEAF, "stop", 137), (DEAF, "kill", 137)]
)
def test_a_command_that_is_ended(tell: Tell, script: Script, verb: str, code: int) -> None:
    async def story(site: Site) -> Exit:
        execution = await prepare(site, script)
        await execution.start()
        await site.under_way(execution)
        await (execution.stop(0.2) if verb == "stop" else execution.kill())
        return await execution.ended()

    end = tell(story)
    assert (end.code, end.signal) == (code, code - 128)


def test_an_ended_command_stays_as_it_ended(tell: Tell) -> None:
    async def story(site: Site) -> int:
        execution = await prepare(site, QUICK)
        await execution.start()
        await execution.ended()
        await execution.kill()
        await execution.stop(1)
        return (await execution.ended()).code

    assert tell(story) == 3


async def prepared(site: Site) -> None:
    await prepare(site, QUICK)


async def running(site: Site) -> None:
    execution = await prepare(site, AGES)
    await execution.start()
    await site.under_way(execution)


async def ended(site: Site) -> None:
    execution = await prepare(site, QUICK)
    await execution.start()
    await execution.ended()


@pytest.mark.parametrize(
    ("stage", "helper_dies", "started", "held", "code"),
    [
        (prepared, False, False, True, None),
        (prepared, True, False, False, None),
        (running, False, True, True, None),
        (running, True, True, False, None),
        (ended, False, True, True, 3),
        (ended, True, True, True, 3),
    ],
)
def test_what_the_next_agent_finds(
    tell: Tell,
    stage: Callable[[Site], Awaitable[None]],
    helper_dies: bool,
    started: bool,
    held: bool,
    code: int | None,
) -> None:
    async def story(site: Site) -> Adopted:
        await stage(site)
        if helper_dies:
            await site.kill_helper()
        (adopted,) = await site.restart().adopt()
        return adopted

    adopted = tell(story)
    assert (adopted.started, adopted.held) == (started, held)
    assert (adopted.exit.code if adopted.exit else None) == code


def test_nobody_knows_how_it_ended_when_the_helper_died(tell: Tell) -> None:
    async def story(site: Site) -> None:
        execution = await prepare(site, AGES)
        await execution.start()
        await site.under_way(execution)
        await site.kill_helper()
        with pytest.raises(ExecutionLost):
            await execution.ended()
        (adopted,) = await site.restart().adopt()
        with pytest.raises(ExecutionLost):
            await adopted.execution.ended()

    tell(story)


def test_what_was_prepared_is_never_executed_when_the_helper_died(tell: Tell) -> None:
    async def story(site: Site) -> int:
        execution = await prepare(site, QUICK)
        await site.kill_helper()
        with pytest.raises(ExecutionLost):
            await execution.start()
        return site.times_executed(execution)

    assert tell(story) == 0


@pytest.mark.parametrize("stage", [prepared, running, ended])
def test_what_was_discarded_is_gone_and_leaves_the_slot_free(
    tell: Tell, stage: Callable[[Site], Awaitable[None]]
) -> None:
    async def story(site: Site) -> tuple[list[Adopted], int]:
        await stage(site)
        (adopted,) = await site.restart().adopt()
        await adopted.execution.discard()
        left = await site.restart().adopt()
        following = await prepare(site, QUICK, run=2)
        await following.start()
        return left, (await following.ended()).code

    assert tell(story) == ([], 3)
