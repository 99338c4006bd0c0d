"""`make bench`: what the embedded runtime costs, on this machine, now.

Every figure is measured from outside: a client of its own process talks to a daemon of its own
home, commands are real shells in worlds of their own. Compare ratios within one run only.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import ensure_daemon, stop_daemon
from spellq_sdk.runs import Run

AT_ONCE = 200
SLOTS = 8
ONE_BY_ONE = 100
ROUNDS = 3
IDLE_SECONDS = 10.0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(what: str, seconds: Sequence[float], aim: str) -> None:
    middle, late = (percentile(seconds, share) * 1000 for share in (0.5, 0.99))
    print(f"  {what:<34} p50 {middle:7.2f} ms   p99 {late:7.2f} ms   (aim {aim})")


def command_ends(home: Path) -> dict[int, float]:
    """When each command's last process was dead, from the slot helpers' journals."""
    ends = {}
    for journal in (home / "agent" / "journals").glob("*.jsonl"):
        for line in journal.read_bytes().splitlines():
            entry = msgspec.json.decode(line)
            ends[entry["run"]] = datetime.fromisoformat(entry["exit"]["ended_at"]).timestamp()
    return ends


async def claims(client: AsyncClient, runs: Sequence[Run]) -> list[float]:
    """Seconds from each run's claim to its command's start, from their events."""
    at: dict[tuple[int, str], float] = {}
    wanted = {run.id for run in runs}
    async for event in client.events(after="0", runs=wanted, types=["run.status"]):
        at[event.run, str(event.status)] = event.at.timestamp()
        if sum(status == "complete" for _, status in at) == len(wanted):
            break
    return [at[number, "running"] - at[number, "building"] for number in wanted]


async def burst(client: AsyncClient, home: Path) -> float:
    awake: dict[int, float] = {}

    async def one(run: Run) -> None:
        await run.wait_status(*client.runs.FINAL)
        awake[run.id] = time.time()

    begin = time.perf_counter()
    runs = await asyncio.gather(*(client.runs.new(command="true") for _ in range(AT_ONCE)))
    await asyncio.gather(*(one(run) for run in runs))
    took = time.perf_counter() - begin
    what = f"{AT_ONCE} runs of `true` at once, {SLOTS} slots"
    print(f"  {what:<34} {AT_ONCE / took:7.0f} runs/s   (aim 400)")
    show("claim -> running", await claims(client, runs), "p99 20")
    ends = command_ends(home)
    show("exit -> awake", [awake[run.id] - ends[run.id] for run in runs], "p99 20")
    return AT_ONCE / took


async def one_by_one(client: AsyncClient, home: Path) -> None:
    started: list[float] = []
    awake: dict[int, float] = {}
    for _ in range(ONE_BY_ONE):
        submitted = time.time()
        run = await client.runs.new(command="true")
        await run.wait_status(*client.runs.FINAL)
        awake[run.id] = time.time()
        await run.refresh()
        assert run.started_at is not None
        started.append(run.started_at.timestamp() - submitted)
    show("one at a time: submit -> running", started, "5 / 20")
    ends = command_ends(home)
    woken = [at - ends[number] for number, at in awake.items() if number in ends]
    show("one at a time: exit -> awake", woken, "1 / 5")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_floor() -> float:
    """Spawning `sh -c true` with nothing around it, one after the other: the machine's own pace."""
    begin = time.perf_counter()
    for _ in range(AT_ONCE):
        subprocess.run(["sh", "-c", "true"], check=True)
    return AT_ONCE / (time.perf_counter() - begin)


async def measure(url: str, token: str, home: Path) -> None:
    async with AsyncClient(url, token) as client:
        warm = await asyncio.gather(*(client.runs.new(command="true") for _ in range(2 * SLOTS)))
        await asyncio.gather(*(run.wait_status(*client.runs.FINAL) for run in warm))
        rates = [await burst(client, home) for _ in range(ROUNDS)]
        print(
            f"  median of {ROUNDS} bursts                  {statistics.median(rates):7.0f} runs/s"
        )
        await one_by_one(client, home)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        daemon = ensure_daemon(home, arguments=["--machine-types", f"cpu={SLOTS}"])
        try:
            print(f"spellq embedded, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
            print(f"  bare `sh -c true`, one by one      {bare_floor():7.0f} /s")
            asyncio.run(measure(daemon.url, daemon.token, home))
            before = cpu_seconds(daemon.pid)
            time.sleep(IDLE_SECONDS)  # the measurement itself: how much CPU an idle daemon takes
            share = (cpu_seconds(daemon.pid) - before) / IDLE_SECONDS
            print(f"  idle daemon                        {share * 100:7.2f} % of a core   (aim <1)")
        finally:
            stop_daemon(home)


if __name__ == "__main__":
    main()
