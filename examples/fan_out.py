"""Sixty runs at once: launched together, awaited together, and a last one that mounts them all.

Run it with: spellq workflow "python fan_out.py"
"""

import asyncio
import time

import spellq

RUNS = 60


async def square(client, number):
    """One worker run: saves a number's square."""
    run = await client.runs.new(command=f"echo $(({number} * {number})) > square.txt")
    await run.wait_status(*client.runs.FINAL)
    await run.refresh()
    if run.user_exit_code != 0:
        raise SystemExit(f"Run {run.id} ended {run.status} ({run.user_exit_code}).")
    return run


async def main():
    async with spellq.AsyncClient.from_environment() as client:
        began = time.monotonic()
        squares = await asyncio.gather(*(square(client, number) for number in range(RUNS)))
        print(f"{RUNS} runs in {time.monotonic() - began:.1f} s")

        total = await client.runs.new(
            command="cat /mnt/*.txt | paste -sd+ | { read sum; echo $((sum)); }",
            attached_resources={
                f"runs/{run.id}/square.txt": f"/mnt/{run.id}.txt" for run in squares
            },
        )
        async for entry in total.logs(follow=True):
            if entry.status == client.runs.RUNNING and not entry.status_event:
                print(f"The sum of the first {RUNS} squares is {entry.log}")


asyncio.run(main())
