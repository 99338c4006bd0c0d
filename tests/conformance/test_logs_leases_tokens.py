"""LogStore, Leases, Tokens: the sequences and memories beside the runs."""

from itertools import accumulate

from spellq.logs import LogEntry
from spellq.ports import AgentInfo, NewRun, Store, Token
from spellq.runs import RunSpec, Status
from tests.clocks import HandClock
from tests.conformance.conftest import Passing

AGENT = AgentInfo("box.1", "box", {"cpu": 4}, "0.1.0")


def lines(clock: HandClock, *texts: str, after: int = 0) -> list[LogEntry]:
    """The entries of a command's lines, of which the first begins `after` so many bytes."""
    ends = accumulate((len(text) + 1 for text in texts), initial=after)
    next(ends)
    return [
        LogEntry(Status.RUNNING, text, clock.now(), raw_end=end)
        for text, end in zip(texts, ends, strict=True)
    ]


async def run_with_log(store: Store) -> int:
    (number,) = await store.allot("run", 1, "log")
    await store.create([NewRun(number, "ada", RunSpec("true"))])
    return number


async def test_offsets_are_dense_whoever_appends(store: Store, clock: HandClock) -> None:
    number = await run_with_log(store)
    assert await store.append(number, lines(clock, "a", "b")) == 3
    assert await store.append(number, lines(clock, "c", after=4)) == 4
    assert [entry.log for entry in await store.read(number, 1)] == ["a", "b", "c"]
    assert [entry.log for entry in await store.read(number, 2, 1)] == ["b"]
    assert await store.read(number, 4) == []
    assert await store.read(number + 1, 0) == []


async def test_how_far_the_raw_output_got_is_kept_with_the_append(
    store: Store, clock: HandClock
) -> None:
    number = await run_with_log(store)
    assert await store.log_state(number) == (1, 0)
    await store.append(number, lines(clock, "four", "é"))
    assert await store.log_state(number) == (3, 7)


async def test_an_append_that_is_repeated_changes_nothing(store: Store, clock: HandClock) -> None:
    number = await run_with_log(store)
    both, told = lines(clock, "a", "b"), [LogEntry(Status.SAVING, "told", clock.now())]
    assert await store.append(number, both) == 3
    assert await store.append(number, both) == 3
    assert await store.append(number, told) == 4
    assert await store.append(number, both) == 4
    assert [entry.log for entry in await store.read(number, 1)] == ["a", "b", "told"]


async def test_a_long_log_is_read_from_anywhere(store: Store, clock: HandClock) -> None:
    number = await run_with_log(store)
    reached = 0
    for start in range(0, 5000, 1000):
        entries = lines(clock, *(f"line {start + n}" for n in range(1000)), after=reached)
        await store.append(number, entries)
        reached = entries[-1].raw_end or 0
    for offset in (1, 511, 512, 513, 4097, 5000):
        (entry,) = await store.read(number, offset, 1)
        assert entry.log == f"line {offset - 1}"


async def test_any_text_comes_back_as_it_was(store: Store, clock: HandClock) -> None:
    number = await run_with_log(store)
    odd = ["", "tab\t", '"status_event":true', "\x1b[31mred", "💫", "\u2028", "x" * 100_000]
    await store.append(number, lines(clock, *odd))
    assert [entry.log for entry in await store.read(number, 1)] == odd


async def test_a_lease_lasts_as_long_as_it_is_renewed(store: Store, passing: Passing) -> None:
    await store.renew(AGENT, 2)
    await passing(1.2)
    await store.renew(AGENT, 2)
    await passing(1.2)
    assert await store.agents() == [AGENT]
    await passing(1.0)
    assert await store.agents() == []


async def test_a_released_lease_is_gone_at_once(store: Store) -> None:
    await store.renew(AGENT, 10)
    await store.release(AGENT.id)
    assert await store.agents() == []


async def test_the_renewals_answer_tells_that_something_is_wanted(store: Store) -> None:
    before = await store.renew(AGENT, 10)
    assert await store.renew(AGENT, 10) == before
    await store.nudge(AGENT.id)
    assert await store.renew(AGENT, 10) != before


async def test_the_renewals_answer_tells_that_the_lease_had_run_out(
    store: Store, passing: Passing
) -> None:
    """Nobody could tell the agent anything meanwhile: it has to look for itself."""
    before = await store.renew(AGENT, 1)
    await passing(1.1)
    assert await store.agents() == []
    assert await store.renew(AGENT, 10) != before


async def test_tokens_are_known_by_their_hash(store: Store, clock: HandClock) -> None:
    token = Token("ada", "laptop", "admin", clock.now())
    await store.put_token("ab" * 32, token)
    assert await store.get_token("ab" * 32) == token
    assert await store.get_token("cd" * 32) is None
