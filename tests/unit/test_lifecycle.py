"""The lifecycle: one table, one pure function, and what holds for every sequence of commands."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spellq.events import Event, EventType, fold
from spellq.lifecycle import (
    Advance,
    Claim,
    Command,
    End,
    Expire,
    Find,
    Kill,
    Label,
    Lose,
    Refused,
    Requeue,
    Step,
    Stop,
    create,
    transition,
    transitions,
)
from spellq.runs import FINAL, LIFECYCLE, Cause, Run, RunSpec, Status, reached

AT = datetime(2026, 1, 1, tzinfo=UTC)
S = Status

NATURAL: list[Command] = [
    Claim(1, "agent", "cpu-0", "claim"),
    Advance(1, S.RUNNING),
    Advance(1, S.SAVING),
    Advance(1, S.PUSHING),
    End(1, user_exit_code=0),
]


def new_run(spec: RunSpec | None = None) -> Run:
    return create(7, "ada", spec or RunSpec("true"), AT).run


def after(*commands: Command, spec: RunSpec | None = None, at: datetime = AT) -> Run:
    return transitions(new_run(spec), commands, at).run


def test_every_status_is_in_the_table_and_final_ones_lead_nowhere() -> None:
    assert set(LIFECYCLE) == set(Status)
    assert len(Status) == 16
    assert {status for status, following in LIFECYCLE.items() if not following} == set(FINAL)


def test_every_status_can_be_reached_from_the_first() -> None:
    seen = {S.USER_REQUESTED}
    while more := {after for status in seen for after in LIFECYCLE[status]} - seen:
        seen |= more
    assert seen == set(Status)


def test_the_natural_way() -> None:
    run = after(*NATURAL)
    assert [then.status for then in run.history] == [
        S.MACHINE_REQUESTED, S.BUILDING, S.RUNNING, S.SAVING, S.PUSHING, S.COMPLETE,
    ]  # fmt: skip
    assert run.user_exit_code == 0
    assert run.version == 6


def test_a_non_zero_exit_code_is_complete() -> None:
    run = after(*NATURAL[:-1], End(1, user_exit_code=66))
    assert (run.status, run.user_exit_code) == (S.COMPLETE, 66)


def test_a_stop_before_running_is_a_kill() -> None:
    assert after(Stop()).status is S.KILLED
    run = after(NATURAL[0], Stop())
    assert run.status is S.KILLING
    assert transition(run, End(1), AT).run.status is S.KILLED


def test_a_stopped_run_keeps_the_code_its_command_ended_with() -> None:
    run = after(*NATURAL[:2], Stop(), *NATURAL[2:4], End(1, user_exit_code=143))
    assert (run.status, run.user_exit_code, run.cause) == (S.STOPPED, 143, Cause.USER)


def test_a_killed_run_has_no_exit_code() -> None:
    run = after(*NATURAL[:2], Kill(), End(1, user_exit_code=137))
    assert (run.status, run.user_exit_code) == (S.KILLED, None)


def test_a_kill_wins_over_saving() -> None:
    run = after(*NATURAL[:3], Kill())
    with pytest.raises(Refused):
        transition(run, Advance(1, S.PUSHING), AT)
    assert transition(run, End(1, user_exit_code=0), AT).run.status is S.KILLED


def test_stop_after_the_command_has_ended_changes_nothing() -> None:
    run = after(*NATURAL[:3])
    assert transition(run, Stop(), AT).events == ()


def test_a_claim_is_given_once_and_its_repeat_is_answered_alike() -> None:
    run = after(NATURAL[0])
    assert transition(run, NATURAL[0], AT) == Step(run)
    with pytest.raises(Refused, match="not waiting"):
        transition(run, Claim(1, "other", "cpu-1", "another"), AT)


def test_an_old_attempt_changes_nothing() -> None:
    run = after(NATURAL[0], Requeue(1, "The machine was lost."))
    assert (run.status, run.attempt, run.agent) == (S.MACHINE_REQUESTED, 2, None)
    for late in NATURAL:
        with pytest.raises(Refused, match="attempt 1 of run 7 is over"):
            transition(run, late, AT)


def test_a_command_that_was_executed_is_never_queued_again() -> None:
    run = after(*NATURAL[:2])
    with pytest.raises(Refused):
        transition(run, Requeue(1, "lost"), AT)


def test_a_lost_run_goes_back_before_running_and_ends_interrupted_after() -> None:
    later = AT + timedelta(seconds=50)
    early = after(NATURAL[0], Lose("agent", 50))
    assert transition(early, Expire(), AT).events == ()
    assert transition(early, Expire(), later).run.attempt == 2
    late = after(*NATURAL[:2], Lose("agent", 50))
    ended = transition(late, Expire(), later).run
    assert (ended.status, ended.cause) == (S.INTERRUPTED, Cause.AGENT_LOST)
    told = transition(ended, End(1, user_exit_code=3), later).run
    assert (told.status, told.late_exit_code) == (S.INTERRUPTED, 3)


def test_a_run_that_is_found_again_is_not_given_up() -> None:
    run = after(*NATURAL[:2], Lose("agent", 50), Find(1, "agent.2"))
    assert (run.agent, run.lost_at, run.due_at) == ("agent.2", None, None)


def test_a_timeout_is_a_stop_with_its_cause() -> None:
    run = after(*NATURAL[:2], spec=RunSpec("sleep 1000", timeout_minutes=2))
    assert run.due_at == AT + timedelta(minutes=2)
    stopped = transition(run, Expire(), AT + timedelta(minutes=2)).run
    assert (stopped.status, stopped.cause) == (S.STOPPING, Cause.TIMEOUT)


def test_labels_can_be_changed_after_the_end() -> None:
    run = transition(after(*NATURAL), Label(add=("good", "best")), AT).run
    assert run.labels == ("good", "best")
    assert transition(run, Label(remove=("good",)), AT).run.labels == ("best",)


def test_several_commands_are_one_step_or_none() -> None:
    run = after(*NATURAL[:2])
    with pytest.raises(Refused):
        transitions(run, [Advance(1, S.SAVING), Advance(1, S.RUNNING), Advance(1, S.BUILDING),
                          Advance(1, S.MOUNTING)], AT)  # fmt: skip
    assert run.status is S.RUNNING


def test_the_log_tells_the_story_in_spells_words() -> None:
    made = create(7, "ada", RunSpec("true", machine_type="t4"), AT)
    lines = [*made.lines, *transitions(made.run, NATURAL, AT + timedelta(seconds=1.5)).lines]
    assert [line.log for line in lines] == [
        "Run created -- waiting for a t4 machine.",
        "Run is building",
        "Run is running",
        "Run is saving",
        "Run is pushing",
        "Total run time: 0s",
        "Run 7 complete",
    ]
    assert all(line.status_event for line in lines)
    assert [line.status for line in lines[-2:]] == [S.COMPLETE, S.COMPLETE]


commands = st.one_of(
    st.builds(Claim, st.integers(1, 3), st.just("agent"), st.just("cpu-0"), st.sampled_from("abc")),
    st.builds(Advance, st.integers(1, 3), st.sampled_from(Status).filter(lambda s: s not in FINAL)),
    st.builds(End, st.integers(1, 3), st.none(), st.integers(0, 255)),
    st.builds(
        End,
        st.integers(1, 3),
        st.sampled_from([S.FAILED, S.INTERRUPTED, S.MOUNT_FAILED, S.BUILD_FAILED]),
    ),
    st.builds(Requeue, st.integers(1, 3), st.just("lost")),
    st.builds(Stop, grace_seconds=st.none() | st.integers(0, 60)),
    st.builds(Kill),
    st.builds(Label, st.tuples(st.sampled_from("xyz")), st.tuples(st.sampled_from("xyz"))),
    st.builds(Lose, st.just("agent"), st.integers(0, 60)),
    st.builds(Find, st.integers(1, 3), st.just("agent")),
    st.builds(Expire),
)
histories = st.lists(st.tuples(commands, st.integers(0, 100)), max_size=30)


def test_a_later_stop_may_shorten_the_grace() -> None:
    run = after(*NATURAL[:2], Stop(), spec=RunSpec("true", grace_seconds=30))
    assert run.grace_seconds == 30
    assert transition(run, Stop(), AT).events == ()
    assert transition(run, Stop(grace_seconds=30), AT).events == ()
    hurried = transition(run, Stop(grace_seconds=0), AT)
    assert [event.type for event in hurried.events] == [EventType.RUN_HURRIED]
    assert (hurried.run.status, hurried.run.grace_seconds) == (S.STOPPING, 0)
    assert transition(hurried.run, Stop(grace_seconds=5), AT).events == ()


def test_a_stop_may_bring_a_grace_of_its_own() -> None:
    run = after(*NATURAL[:2], Stop(grace_seconds=60), spec=RunSpec("true", grace_seconds=30))
    assert run.grace_seconds == 60


@given(histories, st.booleans())
def test_whatever_is_asked_the_invariants_hold(
    history: list[tuple[Command, int]], timed: bool
) -> None:
    at = AT
    made = create(7, "ada", RunSpec("true", timeout_minutes=1 if timed else None), at)
    run, events = made.run, list(made.events)
    finals = 0
    for command, seconds in history:
        at += timedelta(seconds=seconds)
        before = run
        try:
            step = transition(run, command, at)
        except Refused:
            continue
        run = step.run
        events += step.events
        for event in step.events:
            if event.type is EventType.RUN_STATUS:
                assert event.status in LIFECYCLE[before.status] or len(step.events) > 1
                finals += event.status in FINAL
        if before.is_final:
            assert run.status is before.status
        if step.events == ():
            assert run == before
    assert finals <= 1
    assert [event.version for event in events] == list(range(1, len(events) + 1))
    executed = [then.version for then in run.history if then.status is S.RUNNING]
    assert len(executed) <= 1
    sent = msgspec.json.decode(msgspec.json.encode(events), type=list[Event])
    assert fold(sent) == run
    assert reached(run, [run.status]) is run.status
