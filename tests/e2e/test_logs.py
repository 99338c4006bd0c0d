"""Logs: whatever a command says arrives whole, once and in order, and no reader holds it up."""

import asyncio
import contextlib
import itertools
import signal
import subprocess
from collections.abc import AsyncGenerator

import pytest

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, find_daemon
from spellq_sdk.models import LogEntry
from spellq_sdk.runs import Run
from tests.e2e.conftest import SPELLQ, Installation
from tests.e2e.test_outputs import most_memory_bytes
from tests.e2e.test_restart import Meeting, end
from tests.e2e.test_runs import final, launch, output

MIB = 1 << 20


async def spoken(run: Run, offset: int = 0) -> AsyncGenerator[LogEntry, None]:
    """What the command says, followed from an entry of the log on."""
    async with contextlib.aclosing(run.logs(follow=True, offset=offset)) as entries:
        async for entry in entries:
            if entry.status in ("running", "stopping") and not entry.status_event:
                yield entry


async def counted(run: Run, first: int = 1, offset: int = 0) -> int:
    """Follow a command that counts: every number once and in order. Gives the last."""
    expected = itertools.count(first)
    last = first - 1
    async for entry in spoken(run, offset):
        last = next(expected)
        assert entry.log == str(last)
    return last


async def test_a_line_that_never_ends(client: AsyncClient, daemon: LocalDaemon) -> None:
    length = 50_000_000
    before = most_memory_bytes(daemon)
    run = await launch(client, f"seq 1 9999999 | tr -d '\\n' | head -c {length}")
    parts = [entry async for entry in spoken(run)]
    assert most_memory_bytes(daemon) - before < 100 * MIB
    assert [part.continued for part in parts] == [True] * (len(parts) - 1) + [False]
    assert {len(part.log) for part in parts[:-1]} == {MIB}
    assert [part.offset for part in parts] == list(
        range(parts[0].offset, parts[0].offset + len(parts))
    )
    digits = "".join(map(str, range(1, 8_000_000)))[:length]
    assert "".join(part.log for part in parts) == digits


async def test_a_million_lines_to_followers_who_keep_up(
    client: AsyncClient, daemon: LocalDaemon
) -> None:
    before = most_memory_bytes(daemon)
    run = await launch(client, "seq 1 1000000")
    assert set(await asyncio.gather(counted(run), counted(run))) == {1_000_000}
    assert most_memory_bytes(daemon) - before < 100 * MIB


async def test_bytes_that_are_no_text(client: AsyncClient) -> None:
    run = await launch(
        client,
        r"""
        printf 'caf\xe9\n'; printf 'a\0b\n'; printf '\xf0\x9f\n'; printf '\xff\xfe\n'
        printf 'split \xe2'; sleep 0.1; printf '\x82'; sleep 0.1; printf '\xac whole\n'
        printf 'windows\r\n'; printf 'bar\rbar\r\n'; printf 'no end'
        """,
    )
    assert [entry.log async for entry in spoken(run)] == [
        "caf\ufffd",
        "a\ufffdb",
        "\ufffd",
        "\ufffd\ufffd",
        "split € whole",
        "windows",
        "bar\rbar",
        "no end",
    ]


async def test_opening_the_output_anew_takes_nothing_away(client: AsyncClient) -> None:
    run = await launch(
        client,
        """
        echo one; echo two > /dev/stderr; echo three; echo four > /dev/stdout
        seq 5 7 | tee /dev/stderr > /dev/null; python -c 'open("/dev/stdout", "w").write("8")'
        echo; echo nine >> /proc/self/fd/2
        """,
    )
    assert [entry.log async for entry in spoken(run)] == [
        *("one", "two", "three", "four", "5", "6", "7", "8", "nine")
    ]


async def test_wide_characters_across_every_seam(client: AsyncClient) -> None:
    run = await launch(client, "python -c \"print('é€😀' * 500_000); print('ß')\"")
    *parts, last = [entry async for entry in spoken(run)]
    assert last.log == "ß"
    assert len(parts) > 4
    assert "".join(part.log for part in parts) == "é€😀" * 500_000


async def test_a_command_that_closes_its_output_runs_on(client: AsyncClient) -> None:
    run = await launch(client, "echo last; exec >&- 2>&-; sleep 0.2; echo x > made; exit 3")
    assert [entry.log async for entry in spoken(run)] == ["last"]
    await final(client, run)
    assert (run.status, run.user_exit_code, run.outputs_files) == ("complete", 3, 1)


async def test_who_keeps_the_output_open_ends_with_the_shell(client: AsyncClient) -> None:
    with Meeting() as shell, Meeting() as grandchild:
        stayer = f"trap '' TERM HUP; {grandchild.words}"
        run = await launch(client, f'setsid bash -c "{stayer}" & {shell.words}; exit 4')
        holder = await asyncio.to_thread(grandchild.arrival)
        (await asyncio.to_thread(shell.arrival)).send(b"go on\n")
        assert [entry.log async for entry in spoken(run)] == []
        assert await asyncio.to_thread(holder.recv, 1) == b""
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("complete", 4)


async def test_all_is_there_that_was_said_until_the_last_process_died(client: AsyncClient) -> None:
    run = await launch(
        client,
        """
        (trap '' TERM HUP; n=1; while echo $n; do n=$((n+1)); done) &
        (trap '' TERM HUP; while echo $BASHPID > pid; do :; done) &
        sleep 0.3; exit 5
        """,
    )
    assert await counted(run) > 100
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("complete", 5)
    assert [entry.log async for entry in run.logs(offset=-1)] == [f"Run {run.id} complete"]


async def test_a_reader_who_does_not_read_holds_up_nobody(
    client: AsyncClient, daemon: LocalDaemon
) -> None:
    before = most_memory_bytes(daemon)
    run = await launch(client, "seq 1 500000")
    slow = [spoken(run) for _ in range(20)]
    for each in slow:
        assert (await anext(each)).log == "1"
    assert await counted(run) == 500_000
    await final(client, run)
    other = await launch(client, "echo other")
    assert [entry.log async for entry in spoken(other)] == ["other"]
    assert most_memory_bytes(daemon) - before < 150 * MIB
    late = [entry.log async for entry in slow[0]]
    assert late == [str(n) for n in range(2, 500_001)]
    for each in slow:
        await each.aclose()


def follow_by_hand(installation: Installation, run: Run) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [SPELLQ, "logs", "-f", str(run.id)],
        env=installation.environment(),
        stdout=subprocess.PIPE,
    )


async def test_readers_come_in_the_middle_and_go_at_any_time(
    client: AsyncClient, shared: Installation
) -> None:
    with Meeting() as meeting:
        run = await launch(client, f"seq 1 100000; {meeting.words}; seq 100001 200000")
        guest = await asyncio.to_thread(meeting.arrival)
        first = await anext(spoken(run))
        killed = await asyncio.to_thread(follow_by_hand, shared, run)
        assert killed.stdout is not None
        await asyncio.to_thread(killed.stdout.readline)
        gone = spoken(run)
        await anext(gone)
        staying = asyncio.create_task(counted(run))
        middle = asyncio.create_task(counted(run, 70_001, first.offset + 70_000))
        ahead = asyncio.create_task(counted(run, 150_001, first.offset + 150_000))
        guest.send(b"go on\n")
        await gone.aclose()
        killed.send_signal(signal.SIGKILL)
        await asyncio.to_thread(killed.communicate)
        assert set(await asyncio.gather(staying, middle, ahead)) == {200_000}


@pytest.mark.timeout(120)
async def test_a_million_lines_and_a_daemon_that_is_killed_again_and_again(
    own: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPELLQ_HOME", str(own.home))
    for name in ("SPELLQ_URL", "SPELLQ_TOKEN", "SPELL_RUN"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncClient.from_environment() as client:
        run = await client.runs.new(command="seq 1 1000000")
        expected = itertools.count(1)
        async for entry in spoken(run):
            number = next(expected)
            assert entry.log == str(number)
            if number in (1, 100_000, 300_000, 600_000, 999_999):
                daemon = await asyncio.to_thread(find_daemon, own.home)
                assert daemon is not None
                await asyncio.to_thread(end, daemon, signal.SIGKILL)
        assert next(expected) == 1_000_001
        await run.refresh()
        assert (run.status, run.user_exit_code) == ("complete", 0)
        assert await output(run) == [str(n) for n in range(1, 1_000_001)]
