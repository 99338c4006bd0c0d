"""Stop, kill and timeouts: grace, process trees, races, twice, while saving, whole workflows."""

import asyncio
import contextlib
import random
import signal
from pathlib import Path

import pytest

from spellq_sdk import AsyncClient, ClientException
from spellq_sdk.runs import Run
from tests.e2e.conftest import Installation
from tests.e2e.test_restart import Meeting, end
from tests.e2e.test_runs import final, launch

MANY_FILES = "for n in {1..100}; do echo $n > $n.txt; done"
REPEATS = 40


async def said(run: Run, *words: str) -> None:
    """Wait until the command has printed each of these lines."""
    left = set(words)
    async with contextlib.aclosing(run.logs(follow=True)) as lines:
        async for entry in lines:
            left.discard(entry.log)
            if not left:
                return
    raise AssertionError(f"run {run.id} ended without saying {left}")


async def log(run: Run) -> list[str]:
    return [entry.log async for entry in run.logs()]


async def saved(client: AsyncClient, run: Run) -> list[str]:
    return [line.path for line in await client.ls(f"runs/{run.id}")]


def processes_with(word: str) -> list[int]:
    """The processes of this machine that were started with `word` in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def is_lawful(run: Run, code: int) -> bool:
    """Whether a run whose command ends with `code` by itself ended as one that was ended may."""
    ending = run.status, run.user_exit_code
    if run.cause == "user":
        return ending in (("stopped", code), ("stopped", 143), ("killed", None))
    return ending == ("complete", code)


# Grace and process trees


async def test_the_grace_is_the_whole_groups(client: AsyncClient) -> None:
    """The shell dies at once; what it had started saves its work and is waited for."""
    child = 'trap "sleep 0.3; echo kept > kept; exit 0" TERM; sleep 60 & echo ready; wait'
    run = await launch(client, f"sh -c '{child}'; echo never")
    await said(run, "ready")
    await run.stop()
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 143)
    assert await saved(client, run) == ["kept"]
    assert "never" not in await log(run)


async def test_a_child_that_ignores_the_stop_is_killed_after_the_grace(client: AsyncClient) -> None:
    word = f"{random.uniform(1000, 9999):.9f}"
    child = f"trap '' TERM; echo ready; sleep {word}"
    run = await launch(client, f'sh -c "{child}"; echo never', grace_seconds=0.3)
    await said(run, "ready")
    await run.stop()
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 143)
    assert processes_with(word) == []


async def test_a_stop_leaves_nothing_behind_in_other_sessions(client: AsyncClient) -> None:
    """They are told nothing, do not prolong the end, and are gone with it."""
    word = f"{random.uniform(1000, 9999):.9f}"
    detached = f"setsid sh -c 'echo away; sleep {word}; true'"
    run = await launch(client, f"{detached} & trap 'exit 4' TERM; echo ready; sleep 60 & wait $!")
    await said(run, "ready", "away")
    assert processes_with(word)
    await run.stop()
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 4)
    assert processes_with(word) == []


async def test_a_shorter_grace_hurries_a_stop_and_a_longer_one_does_not_delay_it(
    client: AsyncClient,
) -> None:
    stubborn = "trap 'echo told' TERM; echo ready; while :; do sleep 99 & wait; done"
    run = await launch(client, stubborn, grace_seconds=3600)
    await said(run, "ready")
    assert await run.stop()
    await said(run, "told")
    assert not await run.stop()
    assert await run.stop(grace_seconds=0.1)
    assert not await run.stop(grace_seconds=3600)
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 137)
    assert (await log(run)).count("told") == 1


async def test_a_grace_for_one_stop(client: AsyncClient) -> None:
    run = await launch(client, "trap '' TERM; echo ready; while :; do sleep 99; done")
    await said(run, "ready")
    await run.stop(grace_seconds=0.1)
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 137)


async def test_a_grace_that_cannot_be_is_refused(client: AsyncClient) -> None:
    run = await launch(client, "true")
    for seconds in (-1.0, 1e9):
        with pytest.raises(ClientException, match="grace"):
            await run.stop(grace_seconds=seconds)


def test_the_grace_on_the_command_line(shared: Installation, project: Path) -> None:
    stubborn = "trap '' TERM; touch ready; while :; do sleep 99; done"
    launched = shared.spellq("run", "-b", "--grace", "3600", stubborn, cwd=project)
    number = launched.stdout.split("#")[1].split("…")[0]
    assert shared.spellq("stop", number).stdout.startswith(f"Stopping run {number}.")
    assert shared.spellq("stop", "--grace", "0", number).returncode == 0
    shared.spellq("logs", "-f", number)
    assert "stopped (1" in shared.spellq("info", number).stdout


# Races


@pytest.mark.parametrize("verb", ["stop", "kill"])
@pytest.mark.parametrize("seconds", ["0", "0.05"])
async def test_an_end_that_races_with_start_and_natural_end(
    client: AsyncClient, verb: str, seconds: str
) -> None:
    chance = random.Random(f"{verb} {seconds}")

    async def race() -> Run:
        run = await launch(client, f"sleep {seconds}; exit 7")
        await asyncio.sleep(chance.uniform(0, 0.15))
        await (run.stop() if verb == "stop" else run.kill())
        return run

    runs = await asyncio.gather(*(race() for _ in range(REPEATS)))
    await final(client, *runs)
    assert [run for run in runs if not is_lawful(run, 7)] == []


async def test_everything_at_once_ends_each_run_once(client: AsyncClient) -> None:
    async def confusion(n: int) -> Run:
        run = await launch(client, f"sleep 0.0{n % 10}; exit 7")
        await asyncio.gather(run.stop(), run.kill(), run.stop(grace_seconds=0), run.kill())
        return run

    runs = await asyncio.gather(*(confusion(n) for n in range(REPEATS)))
    await final(client, *runs)
    assert [run for run in runs if not is_lawful(run, 7)] == []
    for run in runs:
        assert sum(line.startswith(f"Run {run.id} ") for line in await log(run)) == 1


async def test_a_stop_while_the_rest_of_an_ended_command_dies(client: AsyncClient) -> None:
    """What takes long to die is in another session: of the command's own group nobody is left."""
    sleeper = "print('ready', flush=True); import time; time.sleep(99)"
    large = f"python3 -c \"x = b'x' * (1 << 30); {sleeper}\""
    with Meeting() as meeting:
        run = await launch(client, f"setsid {large} & {meeting.words}; exit 7")
        guest = await asyncio.to_thread(meeting.arrival)
        await said(run, "ready")
        guest.send(b"go on\n")
        assert await asyncio.to_thread(guest.recv, 1) == b""
        for _ in range(5):
            await run.stop(grace_seconds=0)
    await final(client, run)
    assert (run.status, run.user_exit_code) in (("stopped", 7), ("complete", 7))


# Twice, and the other after the one


async def test_twice_is_as_good_as_once(client: AsyncClient) -> None:
    command = "trap 'echo told; exit 5' TERM; echo ready; sleep 60 & wait"
    run = await launch(client, command)
    await said(run, "ready")
    first, second = await asyncio.gather(run.stop(), run.stop())
    assert {first, second} == {True, False}
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 5)
    assert (await log(run)).count("told") == 1
    assert not await run.stop()
    assert not await run.kill()


async def test_a_kill_ends_the_grace_of_a_stop(client: AsyncClient) -> None:
    command = "trap 'echo told' TERM; echo x > x; echo ready; while :; do sleep 99 & wait; done"
    run = await launch(client, command)
    await said(run, "ready")
    await run.stop()
    await said(run, "told")
    assert await run.kill()
    assert not await run.stop()
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("killed", None)
    assert await saved(client, run) == []


# While it saves


@pytest.mark.parametrize("verb", ["stop", "kill"])
async def test_an_end_that_races_with_saving(client: AsyncClient, verb: str) -> None:
    """A kill loses the outputs, unless they were all saved before; a stop changes nothing."""

    async def race() -> None:
        run = await launch(client, f"{MANY_FILES}; exit 3")
        await run.wait_status("saving")
        changed = await (run.stop() if verb == "stop" else run.kill())
        await final(client, run)
        if changed:
            assert (verb, run.status, run.user_exit_code) == ("kill", "killed", None)
            assert await saved(client, run) == []
        else:
            assert (run.status, run.user_exit_code) == ("complete", 3)
            assert len(await saved(client, run)) == 100

    await asyncio.gather(*(race() for _ in range(8)))


# Over a restart of the daemon


def test_a_stop_goes_on_over_a_restart(own: Installation, project: Path) -> None:
    """The command is told once, and its grace does not begin anew."""
    with Meeting() as meeting:
        first = own.start()
        command = (
            f"trap 'echo told; {meeting.words}' TERM; echo ready; sleep 99 & wait; wait; exit 6"
        )
        own.spellq("run", "-b", "--grace", "3600", command, cwd=project)
        own.spellq("stop", "1")
        guest = meeting.arrival()
        end(first, signal.SIGKILL)
        own.start()
        assert own.spellq("ps").stdout.count("*Stopping") == 1
        guest.send(b"go on\n")
    assert own.spellq("logs", "-f", "1").stdout.splitlines().count("told") == 1
    assert "stopped (6)" in own.spellq("info", "1").stdout


@pytest.mark.parametrize("passed", [True, False])
async def test_a_timeout_survives_a_restart(own: Installation, passed: bool) -> None:
    """Whether it passes while nobody is there or after."""
    first = await asyncio.to_thread(own.start)
    async with AsyncClient(first.url, first.token) as client:
        run = await launch(client, "sleep 60", timeout=0.02)
        await run.wait_status("running")
    await asyncio.to_thread(end, first, signal.SIGKILL)
    if passed:
        await asyncio.sleep(1.3)
    second = await asyncio.to_thread(own.start)
    async with AsyncClient(second.url, second.token) as client:
        run = await client.runs.get(run.id)
        await final(client, run)
        assert (run.status, run.cause, run.user_exit_code) == ("stopped", "timeout", 143)
        assert run.reason == "The timeout of 0.02 minutes has passed."


async def test_a_timeout_counts_from_running(client: AsyncClient) -> None:
    """What waits for a slot for longer than its timeout is not stopped."""
    blockers = [await launch(client, "sleep 60", machine_type="t4") for _ in range(2)]
    waiting = await launch(client, "exit 3", machine_type="t4", timeout=0.01)
    await asyncio.gather(*(run.wait_status("running") for run in blockers))
    timed = await launch(client, "sleep 60", timeout=0.015)
    await final(client, timed)
    for run in blockers:
        await run.kill()
    await final(client, waiting, *blockers)
    assert (waiting.status, waiting.user_exit_code) == ("complete", 3)


# Whole workflows

STUBBORN_MASTER = """
import asyncio, signal, spellq

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: print("told", flush=True))
    async with spellq.AsyncClient.from_environment() as client:
        launched = 0
        while True:
            try:
                await client.runs.new(command="sleep 60")
                launched += 1
                if launched == 3:
                    print("ready", flush=True)
            except spellq.ClientException as error:
                print("refused", error, flush=True)
                break
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_a_workflow_whose_master_ignores_its_end_and_goes_on_launching(
    own: Installation, project: Path, verb: str
) -> None:
    (project / "flow.py").write_text(STUBBORN_MASTER)
    own.arguments = ["--machine-types", "cpu=2", "--port", "0"]
    own.start()
    own.spellq("workflow", "--grace", "3600", "-b", "python flow.py", cwd=project)
    follower = (
        "import spellq\n"
        "with spellq.Client.from_environment() as client:\n"
        "    for entry in client.runs.get(1).logs(follow=True):\n"
        "        if entry.log == 'ready': break\n"
    )
    (project / "follow.py").write_text(follower)
    assert own.python("follow.py", project).returncode == 0
    told = own.spellq("workflow", verb, "1")
    assert told.returncode == 0, told.stderr
    if verb == "stop":
        assert own.spellq("workflow", "stop", "--grace", "0.5", "1").returncode == 0
    own.spellq("logs", "-f", "1")
    ending = (
        "import spellq\n"
        "with spellq.Client.from_environment() as client:\n"
        "    workflow = client.workflows.get(1)\n"
        "    for run in workflow.runs: run.wait_status(*client.runs.FINAL)\n"
        "    workflow.refresh()\n"
        "    print(*sorted({run.status for run in workflow.runs}), workflow.managing_run.status)\n"
        "    print(*{run.cause for run in workflow.runs})\n"
    )
    (project / "ending.py").write_text(ending)
    found = own.python("ending.py", project)
    statuses, causes = found.stdout.splitlines()
    assert statuses in ("killed stopped stopped", "killed killed"), found.stderr
    assert causes == "workflow"
