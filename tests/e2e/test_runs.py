"""What runs do: many at once, mounts, outputs, stop and kill, waits, logs."""

import asyncio
import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spellq_sdk import AsyncClient, WaitError
from spellq_sdk.runs import Run


def own_sockets() -> int:
    """How many connections this very process has."""
    return sum("socket:" in os.readlink(path) for path in Path("/proc/self/fd").iterdir()
               if path.is_symlink())  # fmt: skip


async def output(run: Run) -> list[str]:
    """What the command itself printed."""
    return [
        entry.log
        async for entry in run.logs()
        if entry.status == "running" and not entry.status_event
    ]


async def final(client: AsyncClient, *runs: Run) -> None:
    await asyncio.gather(*(run.wait_status(*client.runs.FINAL) for run in runs))
    await asyncio.gather(*(run.refresh() for run in runs))


async def launch(client: AsyncClient, command: str, **options: object) -> Run:
    return await client.runs.new(command=command, **options)  # type: ignore[arg-type]


async def test_sixty_runs_gathered(client: AsyncClient, tmp_path: Path) -> None:
    runs = await asyncio.gather(*(launch(client, f"echo {n} > n.txt") for n in range(60)))
    await final(client, *runs)
    assert {run.status for run in runs} == {"complete"}
    assert [run.id for run in runs] == sorted({run.id for run in runs})
    for n in (0, 31, 59):
        await runs[n].cp("n.txt", tmp_path)
        assert (tmp_path / "n.txt").read_text() == f"{n}\n"


async def test_five_hundred_waits_on_one_socket(client: AsyncClient) -> None:
    run = await launch(client, "sleep 60")
    await run.wait_status("running")
    before = own_sockets()
    waits = [asyncio.create_task(run.wait_status("killed")) for _ in range(500)]
    await run.wait_status("running")
    assert own_sockets() == before
    await run.kill()
    await asyncio.gather(*waits)


async def test_a_wait_for_what_has_passed_returns_at_once(client: AsyncClient) -> None:
    run = await launch(client, "true")
    await final(client, run)
    for status in ("machine_requested", "building", "running", "saving", "pushing", "complete"):
        await run.wait_status(status)


async def test_a_run_that_ends_elsewhere_raises(client: AsyncClient) -> None:
    run = await launch(client, "true")
    with pytest.raises(WaitError, match="complete"):
        await run.wait_status(client.runs.STOPPED, client.runs.KILLED)


async def test_a_non_zero_exit_code_is_complete(client: AsyncClient) -> None:
    run = await launch(client, "exit 66")
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("complete", 66)


async def test_two_runs_with_the_same_mount_path_see_their_own_files(client: AsyncClient) -> None:
    made = [await launch(client, f"mkdir data; echo {word} > data/word") for word in ("one", "two")]
    await final(client, *made)
    readers = await asyncio.gather(
        *(
            launch(
                client,
                "cat /mnt/data/word; sleep 0.3; cat /mnt/data/word; echo x > /mnt/data/word",
                attached_resources={f"runs/{run.id}/data": "/mnt/data"},
            )
            for run in made
        )
    )
    await final(client, *readers)
    for reader, word in zip(readers, ("one", "two"), strict=True):
        lines = await output(reader)
        assert lines[:2] == [word, word]
        assert "Read-only file system" in lines[2]
        assert reader.user_exit_code == 1


async def test_mounts_are_no_outputs_and_relative_ones_are_below_the_run(
    client: AsyncClient,
) -> None:
    made = await launch(client, "echo hi > a.txt")
    await final(client, made)
    run = await launch(
        client,
        "cat data/in.txt && cat /spell/data/in.txt > out.txt",
        attached_resources={f"runs/{made.id}/a.txt": "data/in.txt"},
    )
    await final(client, run)
    assert await output(run) == ["hi"]
    listed = [line.path for line in await client.ls(f"runs/{run.id}")]
    assert listed == ["out.txt"]


async def test_stop_saves_outputs_and_kill_does_not(client: AsyncClient) -> None:
    command = "echo kept > kept.txt; echo ready; sleep 60"
    stopped, killed = await asyncio.gather(launch(client, command), launch(client, command))
    for run in (stopped, killed):
        async with contextlib.aclosing(run.logs(follow=True)) as lines:
            async for entry in lines:
                if entry.log == "ready":
                    break
    await stopped.stop()
    await killed.kill()
    await final(client, stopped, killed)
    assert (stopped.status, stopped.user_exit_code) == ("stopped", 143)
    assert (killed.status, killed.user_exit_code) == ("killed", None)
    assert [line.path for line in await client.ls(f"runs/{stopped.id}")] == ["kept.txt"]
    assert await client.ls(f"runs/{killed.id}") == []
    assert await stopped.stop() is False


async def test_a_command_that_ignores_the_stop_is_killed_after_its_grace(
    client: AsyncClient,
) -> None:
    run = await launch(client, "trap '' TERM; echo ready; sleep 60 & wait; sleep 60",
                       grace_seconds=0.2)  # fmt: skip
    async with contextlib.aclosing(run.logs(follow=True)) as lines:
        async for entry in lines:
            if entry.log == "ready":
                break
    await run.stop()
    await final(client, run)
    assert (run.status, run.user_exit_code) == ("stopped", 137)


async def test_a_stop_before_running_is_a_kill(client: AsyncClient) -> None:
    blockers = [await launch(client, "sleep 60", machine_type="t4") for _ in range(2)]
    waiting = await launch(client, "true", machine_type="T4")
    await asyncio.gather(*(run.wait_status("running") for run in blockers))
    assert waiting.reason == "Waiting for a free t4 slot."
    await waiting.stop()
    await final(client, waiting)
    assert waiting.status == "killed"
    for run in blockers:
        await run.kill()
    await final(client, *blockers)


async def test_a_timeout_is_a_stop_that_says_so(client: AsyncClient) -> None:
    run = await launch(client, "echo x > x; sleep 60", timeout=0.005)
    await final(client, run)
    assert (run.status, run.cause) == ("stopped", "timeout")
    last = [entry.log async for entry in run.logs()][-1]
    assert last == f"Run {run.id} stopped: The timeout of 0.005 minutes has passed."
    assert [line.path for line in await client.ls(f"runs/{run.id}")] == ["x"]


async def test_logs_can_be_followed_from_anywhere(client: AsyncClient) -> None:
    run = await launch(client, "for n in 1 2 3 4 5; do echo line $n; done; echo err >&2")
    followed = [entry.log async for entry in run.logs(follow=True)]
    assert followed[-1] == f"Run {run.id} complete"
    lines = [line for line in followed if line.startswith(("line", "err"))]
    assert lines == ["line 1", "line 2", "line 3", "line 4", "line 5", "err"]
    assert [entry.log async for entry in run.logs(offset=-2)] == followed[-2:]
    assert [entry.log async for entry in run.logs(offset=4)] == followed[4:]


async def test_environment_variables_arrive_and_only_their_names_are_shown(
    client: AsyncClient,
) -> None:
    run = await launch(
        client, 'echo "$GREETING"; echo $SPELL_RUN; pwd', envvars={"GREETING": "hé y"}
    )
    await final(client, run)
    assert await output(run) == ["hé y", str(run.id), "/spell"]
    assert list(run.environment_vars) == ["GREETING"]
    assert "hé y" not in repr(run)


async def test_a_worker_gets_no_secret_of_ours(client: AsyncClient) -> None:
    run = await launch(client, "env")
    await final(client, run)
    assert not [line for line in await output(run) if "TOKEN" in line or "sq_" in line]


async def test_labels(client: AsyncClient) -> None:
    run = await launch(client, "true", labels=["first"])
    await final(client, run)
    await run.add_label("second")
    await run.remove_label("first")
    found = await client.runs.list(labels=["second"])
    assert [(one.id, one.labels) for one in found] == [(run.id, ["second"])]


async def test_times_are_aware_and_in_order(client: AsyncClient) -> None:
    before = datetime.now(UTC)
    run = await launch(client, "true")
    await final(client, run)
    assert run.created_at
    assert run.started_at
    assert run.ended_at
    assert before <= run.created_at <= run.started_at <= run.ended_at <= datetime.now(UTC)


async def test_events_of_a_run_in_order_and_again_from_a_cursor(client: AsyncClient) -> None:
    begin = None
    seen = []
    run = await launch(client, "true")
    await final(client, run)
    async with contextlib.aclosing(client.events(runs=[run.id], after="0")) as events:
        async for event in events:
            seen.append((event.version, str(event.status)))
            begin = begin or event.cursor
            if event.status == "complete":
                break
    assert seen == [
        (1, "machine_requested"), (2, "building"), (3, "running"),
        (4, "saving"), (5, "pushing"), (6, "complete"),
    ]  # fmt: skip
    async with contextlib.aclosing(client.events(runs=[run.id], after=begin)) as events:
        assert (await anext(events)).version == 2


async def test_a_workflow_holds_its_workers_and_is_killed_as_one(client: AsyncClient) -> None:
    workflow = await client.workflows.new(command="sleep 60")
    workers = [await launch(client, "sleep 60", workflow_id=workflow.id) for _ in range(3)]
    await asyncio.gather(*(run.wait_status("running") for run in workers))
    await workflow.refresh()
    assert [run.id for run in workflow.runs] == [run.id for run in workers]
    assert workflow.managing_run.id not in [run.id for run in workflow.runs]
    await workflow.kill()
    await final(client, *workers, workflow.managing_run)
    assert {run.status for run in (*workers, workflow.managing_run)} == {"killed"}
