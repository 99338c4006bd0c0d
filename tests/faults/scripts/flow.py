"""A workflow with every kind of run: one that saves, one that mounts, one stopped, one killed."""

import asyncio
import os

import spellq
from spellq_sdk.runs import Run

START = os.environ["START"]
STOPPED = "trap 'echo bye; exit 5' TERM; echo ready; sleep 30 & wait"


async def launch(
    client: spellq.AsyncClient, name: str, command: str, mounts: dict[str, str] | None = None
) -> Run:
    run = await client.runs.new(command=START + command, labels=[name], attached_resources=mounts)
    print("launched", name, run.id)
    return run


async def ended(client: spellq.AsyncClient, run: Run) -> None:
    await run.wait_status(*client.runs.FINAL)


async def main() -> None:
    async with spellq.AsyncClient.from_environment() as client:
        to_stop = await launch(client, "stopped", STOPPED)
        to_kill = await launch(client, "killed", "echo ready; sleep 30")
        maker = await launch(client, "maker", "echo one; echo two; echo x > x.txt; exit 3")
        await to_stop.wait_status(client.runs.RUNNING)
        await to_kill.wait_status(client.runs.RUNNING)
        await asyncio.gather(to_stop.stop(), to_kill.kill(), ended(client, maker))
        mounts = {f"runs/{maker.id}/x.txt": "/mnt/x.txt"}
        reader = await launch(client, "reader", "cat /mnt/x.txt", mounts)
        await maker.add_label("read")
        await asyncio.gather(*(ended(client, run) for run in (to_stop, to_kill, reader)))
        print("workflow done")


asyncio.run(main())
