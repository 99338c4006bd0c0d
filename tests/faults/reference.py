"""The reference workflow, and a client that goes through it while things die."""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread

from spellq_sdk import AsyncClient
from spellq_sdk.sending import upload
from spellq_sdk.snapshot import take_snapshot
from tests.faults.evidence import Starts, Tally

WAIT_SECONDS = 45.0
"""How long the whole workflow may take; it is a matter of seconds, crashes included."""

WAITERS = 3

SCRIPT = Path(__file__).parent / "scripts" / "flow.py"


_ENDINGS: dict[str, set[tuple[str, int | None]]] = {
    "master": {("complete", 0)},
    "maker": {("complete", 3)},
    "reader": {("complete", 0)},
    "killed": {("killed", None)},
    "stopped": {("stopped", 5), ("stopped", 143)},
}
"""How each run of the workflow may end; a stop may come before the command is ready for it."""


@dataclass
class Witness:
    """What a client of the workflow was told: runs by name, how each ended, its lines."""

    launched: dict[str, int] = field(default_factory=dict)
    endings: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)


async def play(client: AsyncClient, starts: Starts, tally: Tally) -> Witness:
    """Launch the workflow and wait for everything in it as a patient user would."""
    witness = Witness()
    try:
        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
            snapshot = await _send_script(client)
            workflow = await client.workflows.new(
                command=f"{starts.words} python flow.py",
                snapshot=snapshot,
                envvars={"START": starts.words},
            )

            def watch(name: str, number: int) -> None:
                witness.launched[name] = number
                tasks.create_task(_follow(client, witness, name, number))
                for _ in range(WAITERS):
                    tasks.create_task(_wait(client, number))

            watch("master", workflow.managing_run.id)
            async for line in workflow.managing_run.logs(follow=True):
                if line.log.startswith("launched "):
                    _, name, number = line.log.split()
                    watch(name, int(number))
    except TimeoutError:
        tally.waits_missed += 1
        tally.faults.append(f"somebody still waits after {WAIT_SECONDS:.0f} s")
    return witness


async def _send_script(client: AsyncClient) -> str:
    with tempfile.TemporaryDirectory() as folder:
        await to_thread.run_sync(shutil.copy, SCRIPT, folder)
        snapshot = await to_thread.run_sync(take_snapshot, Path(folder))
        return await upload(snapshot, client.gateway)


async def _wait(client: AsyncClient, number: int) -> None:
    run = await client.runs.get(number)
    await run.wait_status(*client.runs.FINAL)


async def _follow(client: AsyncClient, witness: Witness, name: str, number: int) -> None:
    run = await client.runs.get(number)
    witness.lines[name] = [
        line.log
        async for line in run.logs(follow=True)
        if line.status in ("running", "stopping") and not line.status_event
    ]
    await run.wait_status(*client.runs.FINAL)
    await run.refresh()
    witness.endings[name] = run.status, run.user_exit_code


def check_undisturbed(witness: Witness, tally: Tally) -> None:
    """Where no helper died, nobody can tell from the runs that anything did."""
    launched = [f"launched {name} {at}" for name, at in witness.launched.items()][1:]
    lines = {
        "master": [*launched, "workflow done"],
        "maker": ["one", "two"],
        "reader": ["x"],
    }
    for name, expected in _ENDINGS.items():
        if witness.endings.get(name) not in expected:
            tally.faults.append(f"{name} ended {witness.endings.get(name)}")
    for name, told in witness.lines.items():
        if len(told) != len(set(told)) or told != lines.get(name, told):
            tally.faults.append(f"{name} said {told}")
