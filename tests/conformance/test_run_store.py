"""RunStore: the one source of truth."""

import asyncio
from datetime import timedelta

import pytest

from spellq.events import fold
from spellq.lifecycle import Advance, Claim, Command, End, Kill, Label, Refused, Stop
from spellq.ports import Committed, NewRun, RunQuery, Store, UnknownRun
from spellq.runs import Run, RunSpec, Status, Workflow
from tests.clocks import HandClock
from tests.conformance.conftest import Passing

CLAIM = Claim(1, "agent", "cpu-0", "claim")
RUNNING = Advance(1, Status.RUNNING)
ENDING = (Advance(1, Status.SAVING), Advance(1, Status.PUSHING), End(1, user_exit_code=0))


async def new_run(store: Store, command_id: str = "first", **values: object) -> Run:
    (number,) = await store.allot("run", 1, command_id)
    spec = RunSpec("true", **values)  # type: ignore[arg-type]
    (committed,) = await store.create([NewRun(number, "ada", spec)])
    return committed.run


async def walk(store: Store, number: int, *steps: Command) -> Committed:
    return await store.apply(number, steps)


async def test_numbers_ascend_and_a_repeated_command_gets_the_same(store: Store) -> None:
    first = await store.allot("run", 3, "a")
    second = await store.allot("run", 2, "b")
    assert list(first + second) == sorted(set(first + second))
    assert await store.allot("run", 3, "a") == first
    assert await store.allot("workflow", 1, "a") == (1,)


async def test_fifty_allotments_at_once_share_no_number(store: Store) -> None:
    answers = await asyncio.gather(*(store.allot("run", 3, f"c{n}") for n in range(50)))
    numbers = [number for answer in answers for number in answer]
    assert len(set(numbers)) == 150


async def test_a_run_is_created_once(store: Store) -> None:
    run = await new_run(store)
    (again,) = await store.create([NewRun(run.id, "ada", RunSpec("other"))])
    assert again == Committed(run)
    assert await store.get(run.id) == run


async def test_what_is_not_there_is_none_or_said_so(store: Store) -> None:
    assert await store.get(99) is None
    assert await store.get_workflow(99) is None
    with pytest.raises(UnknownRun, match="99"):
        await store.apply(99, [CLAIM])


async def test_a_step_is_state_events_and_log_lines_together(store: Store) -> None:
    run = await new_run(store)
    committed = await walk(store, run.id, CLAIM)
    assert await store.get(run.id) == committed.run
    assert [logged.event.version for logged in committed.logged] == [2]
    assert committed.log_length == 2
    lines = await store.read(run.id, 0)
    assert [line.log for line in lines] == [
        "Run created -- waiting for a CPU machine.",
        "Run is building",
    ]


async def test_several_commands_are_one_step_or_none(store: Store) -> None:
    run = await new_run(store)
    await walk(store, run.id, CLAIM)
    with pytest.raises(Refused):
        await walk(store, run.id, RUNNING, Advance(1, Status.PUSHING))
    after = await store.get(run.id)
    assert after is not None
    assert after.status is Status.BUILDING
    assert await store.history(run.id, after.version) == []
    assert (await store.log_state(run.id))[0] == 2


async def test_of_many_claims_at_once_one_wins(store: Store) -> None:
    run = await new_run(store)
    claims = [Claim(1, f"agent-{n}", "cpu-0", f"claim-{n}") for n in range(20)]
    answers = await asyncio.gather(
        *(store.apply(run.id, [claim]) for claim in claims), return_exceptions=True
    )
    winners = [answer for answer in answers if isinstance(answer, Committed)]
    assert len(winners) == 1
    assert sum(isinstance(answer, Refused) for answer in answers) == 19


async def test_a_repeat_gets_the_first_answer_and_no_event(store: Store) -> None:
    run = await new_run(store)
    first = await walk(store, run.id, CLAIM)
    again = await walk(store, run.id, CLAIM)
    assert again == Committed(first.run)


async def test_a_final_status_is_written_once(store: Store) -> None:
    run = await new_run(store)
    await walk(store, run.id, CLAIM, RUNNING)
    ended = await walk(store, run.id, *ENDING)
    for late in (Stop(), Kill()):
        assert (await walk(store, run.id, late)).run == ended.run
    with pytest.raises(Refused):
        await walk(store, run.id, Claim(1, "agent", "cpu-0", "another"))


async def test_folding_the_history_gives_the_state(store: Store) -> None:
    run = await new_run(store, timeout_minutes=5.0, environment_vars={"A": "sealed"})
    await walk(store, run.id, CLAIM)
    await walk(store, run.id, RUNNING)
    await walk(store, run.id, Label(add=("x",)))
    await walk(store, run.id, *ENDING)
    history = await store.history(run.id)
    assert [event.version for event in history] == list(range(1, len(history) + 1))
    assert fold(history) == await store.get(run.id)
    assert await store.history(run.id, len(history) - 1) == history[-1:]


async def test_find_is_newest_first_by_page_and_filter(store: Store) -> None:
    await store.create_workflow(Workflow(4, "ada", 1, HandClock().now()))
    numbers = await store.allot("run", 6, "six")
    await store.create(
        [
            NewRun(
                number,
                "ada" if number % 2 else "bob",
                RunSpec("true"),
                workflow=4 if number > 3 else None,
                labels=("even",) if number % 2 == 0 else ("odd", "x"),
            )
            for number in numbers
        ]
    )
    await walk(store, 5, CLAIM, RUNNING, *ENDING)

    async def find(**wanted: object) -> list[int]:
        return [run.id for run in await store.find(RunQuery(**wanted))]  # type: ignore[arg-type]

    assert await find() == [6, 5, 4, 3, 2, 1]
    assert await find(limit=2) == [6, 5]
    assert await find(limit=2, before=5) == [4, 3]
    assert await find(owner="bob") == [6, 4, 2]
    assert await find(labels=("x", "even"), limit=3) == [6, 5, 4]
    assert await find(workflow=4) == [6, 5, 4]
    assert await find(live=True, owner="ada") == [3, 1]
    assert await find(status=Status.COMPLETE) == [5]
    assert (await store.get_workflow(4)) == Workflow(4, "ada", 1, HandClock().now())


async def test_labels_are_found_as_they_are_now(store: Store) -> None:
    run = await new_run(store)
    await walk(store, run.id, Label(add=("old",)))
    await walk(store, run.id, Label(add=("new",), remove=("old",)))
    assert await store.find(RunQuery(labels=("old",))) == []
    assert [found.id for found in await store.find(RunQuery(labels=("new",)))] == [run.id]


async def test_owners_are_the_agents_of_live_runs(store: Store) -> None:
    one, two = await new_run(store, "a"), await new_run(store, "b")
    await walk(store, one.id, Claim(1, "agent-1", "cpu-0", "x"))
    await walk(store, two.id, Claim(1, "agent-2", "cpu-0", "y"), RUNNING, *ENDING)
    assert await store.owners() == ["agent-1"]
    assert [run.id for run in await store.find(RunQuery(agent="agent-1"))] == [one.id]
    assert await store.find(RunQuery(agent="agent-2")) == []


async def test_deadlines_come_due_and_go_when_met(store: Store, clock: HandClock) -> None:
    run = await new_run(store, timeout_minutes=1.0)
    assert await store.due(clock.now()) == ([], None)
    await walk(store, run.id, CLAIM, RUNNING)
    at = clock.now() + timedelta(minutes=1)
    assert await store.due(clock.now()) == ([], at)
    assert await store.due(at) == ([run.id], None)
    await walk(store, run.id, Stop())
    assert await store.due(at) == ([], None)


async def test_what_was_committed_waits_in_the_outbox_until_struck(
    store: Store, passing: Passing
) -> None:
    run = await new_run(store)
    committed = await walk(store, run.id, CLAIM)
    assert await store.unpublished(1.0) == []
    await passing(1.5)
    waiting = await store.unpublished(1.0)
    assert [entry.run.version for entry in waiting] == [1, 2]
    assert waiting[1].logged == committed.logged
    await store.strike([committed])
    assert [entry.run.version for entry in await store.unpublished(1.0)] == [1]


async def test_a_hundred_runs_at_once_keep_their_own_story(store: Store) -> None:
    numbers = await store.allot("run", 100, "hundred")

    async def live(number: int) -> None:
        await store.create([NewRun(number, "ada", RunSpec("true"))])
        for step in (CLAIM, RUNNING):
            await store.apply(number, [step])
        await store.apply(number, ENDING)

    await asyncio.gather(*(live(number) for number in numbers))
    for run in await store.find(RunQuery(limit=100)):
        assert run.status is Status.COMPLETE
        assert fold(await store.history(run.id)) == run
        assert [line.log for line in await store.read(run.id, 0)][-1] == f"Run {run.id} complete"
