"""The executors that the one suite is run against, each at a site of its own."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from spellq.ports import Execution, Executor, Job
from tests.e2e.machine import ENVIRONMENT, Machine, hear
from tests.e2e.test_restart import is_gone
from tests.simulation.calm import in_a_calm_world
from tests.simulation.machine import Script, SimExecution, SimExecutor, SimMachine
from tests.simulation.world import World

T = TypeVar("T")
SLOT = "cpu-0"


class Site(Protocol):
    """An executor, and what is around it."""

    executor: Executor

    def command(self, script: Script) -> str:
        """A command that does what the script says."""

    def restart(self) -> Executor:
        """The agent has died: the executor of the next one."""

    async def kill_helper(self) -> None:
        """The slot's helper dies, as by kill -9, and its command with it."""

    async def under_way(self, execution: Execution) -> None:
        """Return once the command is being executed."""

    def times_executed(self, execution: Execution) -> int:
        """How often the command was, in truth."""


class Tell(Protocol):
    """Has a story happen at a new site, and gives what it comes to."""

    def __call__(self, story: Callable[[Site], Awaitable[T]]) -> T: ...


async def prepare(site: Site, script: Script, run: int = 1) -> Execution:
    """A job of the slot, ready to be started."""
    return await site.executor.prepare(
        Job(
            run=run,
            attempt=1,
            slot=SLOT,
            command=site.command(script),
            cwd="",
            environment=ENVIRONMENT,
        )
    )


class ProcessSite:
    """Real slot helpers, of a home of their own."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._machine = Machine(home)
        self.executor: Executor = self._machine.executor

    def command(self, script: Script) -> str:
        trap = "trap '' TERM; " if script.heeds is None else ""
        return f"{trap}echo begun; sleep {script.seconds}; exit {script.code}"

    def restart(self) -> Executor:
        self.executor = self._machine.restart()
        return self.executor

    async def kill_helper(self) -> None:
        pid = int((self._home / "agent" / "slots" / SLOT / "helper.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(is_gone, pid)

    async def under_way(self, execution: Execution) -> None:
        await hear(execution, "begun")

    def times_executed(self, execution: Execution) -> int:
        output = Path(execution.output)
        return output.read_text().count("begun") if output.exists() else 0

    async def close(self) -> None:
        await self._machine.close()


def at_a_process_site(story: Callable[[Site], Awaitable[T]]) -> T:
    async def tell() -> T:
        with tempfile.TemporaryDirectory() as home:
            site = ProcessSite(Path(home))
            try:
                async with asyncio.timeout(30):
                    return await story(site)
            finally:
                await site.close()

    return asyncio.run(tell())


class SimulatedSite:
    """The helpers of a simulated machine, in a calm world."""

    def __init__(self, world: World) -> None:
        self._machine = SimMachine(world, "machine", {"cpu": 1})
        self.executor: Executor = SimExecutor(self._machine)

    def command(self, script: Script) -> str:
        return script.command()

    def restart(self) -> Executor:
        self.executor = SimExecutor(self._machine)
        return self.executor

    async def kill_helper(self) -> None:
        self._machine.kill_helper(SLOT)

    async def under_way(self, execution: Execution) -> None:
        assert isinstance(execution, SimExecution)
        folder = execution.folder
        await folder.changed.until(lambda: bool(folder.said))

    def times_executed(self, execution: Execution) -> int:
        return sum(folder.run == execution.run for folder in self._machine.starts)


def at_a_simulated_site(story: Callable[[Site], Awaitable[T]]) -> T:
    return in_a_calm_world(lambda world: story(SimulatedSite(world)))
