"""`make bench`: how many lines a second reach whoever follows a log, on this machine, now.

From the command's own writes over file, entries, store and HTTP to a client of its own process.
Compare ratios within one run only.
"""

import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, ensure_daemon, stop_daemon
from tests.benchmarks.embedded import cpu_seconds

LINES = 1_000_000
ROUNDS = 3
TEXT = "epoch 12, step 3456: loss 0.12345678, accuracy 0.98765432, 1234.5 samples/s"


async def follow(daemon: LocalDaemon, launched: Connection) -> None:
    """Say that one is ready, be told a run, and tell the second at which its last line came."""
    async with AsyncClient(daemon.url, daemon.token) as client:
        await client.runs.list(1)
        launched.send("ready")
        run = await client.runs.get(await asyncio.to_thread(launched.recv))
        lines = 0
        async for entry in run.logs(follow=True):
            if entry.status == "running" and not entry.status_event:
                lines += 1
        assert lines == LINES, f"{lines} lines of {LINES} arrived"
        launched.send(time.time())


def in_a_process(daemon: LocalDaemon, launched: Connection) -> None:
    asyncio.run(follow(daemon, launched))


async def launch(daemon: LocalDaemon, command: str, followers: Sequence[Connection]) -> float:
    """Seconds from the start of the command until everybody has its last line."""
    async with AsyncClient(daemon.url, daemon.token) as client:
        for follower in followers:
            follower.recv()
        run = await client.runs.new(command=command)
        for follower in followers:
            follower.send(run.id)
        ends: list[float] = [await asyncio.to_thread(follower.recv) for follower in followers]
        await run.refresh()
        assert run.started_at is not None
        return max(ends) - run.started_at.timestamp()


def measure(daemon: LocalDaemon, what: str, command: str, count: int) -> None:
    spawning = multiprocessing.get_context("spawn")
    for _ in range(ROUNDS):
        before = cpu_seconds(daemon.pid)
        pipes = [spawning.Pipe() for _ in range(count)]
        processes = [
            spawning.Process(target=in_a_process, args=(daemon, theirs)) for _, theirs in pipes
        ]
        for process in processes:
            process.start()
        took = asyncio.run(launch(daemon, command, [ours for ours, _ in pipes]))
        for process in processes:
            process.join()
        cost = (cpu_seconds(daemon.pid) - before) / LINES
        print(
            f"  {what:<34} {LINES / took:9.0f} lines/s to each   (aim 200000)"
            f"   daemon {cost * 1e6:5.2f} µs a line"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        daemon = ensure_daemon(home, arguments=["--port", "0"])
        try:
            print(f"spellq logs, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
            short, long = f"seq 1 {LINES}", f"yes '{TEXT}' | head -n {LINES}"
            measure(daemon, "a million numbers, 1 follower", short, 1)
            measure(daemon, f"a million lines of {len(TEXT)} bytes", long, 1)
            measure(daemon, "a million numbers, 3 followers", short, 3)
        finally:
            stop_daemon(home)


if __name__ == "__main__":
    main()
