"""A daemon that stands still (SIGSTOP), for longer than any lease, in the middle of its work."""

import asyncio
import os
import signal

from anyio import to_thread

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import ensure_daemon, stop_daemon
from tests.faults.evidence import Starts, Tally, examine
from tests.faults.home import home_of_its_own

WAIT_SECONDS = 60.0


async def stand_still(seconds: float) -> Tally:
    """A run ends while the daemon stands still; one is launched, and one waited for, meanwhile."""
    tally = Tally()
    with home_of_its_own("spellq-still-") as home:
        daemon = await to_thread.run_sync(ensure_daemon, home)
        async with Starts.listening() as starts, AsyncClient(daemon.url, daemon.token) as client:
            running = await client.runs.new(command=f"{starts.words} sleep 1; echo x; exit 7")
            await running.wait_status(client.runs.RUNNING)
            os.kill(daemon.pid, signal.SIGSTOP)
            waiting = asyncio.create_task(running.wait_status(*client.runs.FINAL))
            launching = asyncio.create_task(client.runs.new(command=f"{starts.words} exit 3"))
            await asyncio.sleep(seconds)
            os.kill(daemon.pid, signal.SIGCONT)
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    launched = await launching
                    await asyncio.gather(waiting, launched.wait_status(*client.runs.FINAL))
            except TimeoutError:
                tally.waits_missed += 1
                tally.faults.append(f"somebody waits after a standstill of {seconds:.0f} s")
            for run, code in ((running, 7), (launched, 3)):
                await run.refresh()
                if (run.status, run.user_exit_code, run.attempt) != ("complete", code, 1):
                    tally.faults.append(f"after a standstill: {run}")
            await to_thread.run_sync(stop_daemon, home)
            await examine(home, [running.id, launched.id], starts, tally)
    return tally
