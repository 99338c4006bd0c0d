"""An executor of real worlds, as the tests of worlds use it."""

import os
import pwd
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from spellq.ports import Execution, Exit, Job, WorldMount
from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers.outputs import save, scan
from spellq_workers.process import ProcessExecution, ProcessExecutor
from spellq_workers.rawlog import OutputWatcher, RawLog

ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": pwd.getpwuid(os.getuid()).pw_dir,
    "USER": pwd.getpwuid(os.getuid()).pw_name,
}


class Machine:
    """An executor and the jobs given to it; `restart` is the death of the agent."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._executors = [ProcessExecutor(home)]
        self._runs = 0

    @property
    def executor(self) -> ProcessExecutor:
        return self._executors[-1]

    def restart(self) -> ProcessExecutor:
        self._executors.append(ProcessExecutor(self.home))
        return self.executor

    async def prepare(
        self,
        command: str,
        *,
        slot: str = "cpu-0",
        cwd: str = "",
        code: Path | None = None,
        mounts: dict[str, Path] | None = None,
        environment: dict[str, str] | None = None,
    ) -> ProcessExecution:
        self._runs += 1
        job = Job(
            run=self._runs,
            attempt=1,
            slot=slot,
            command=command,
            cwd=cwd,
            environment=ENVIRONMENT | (environment or {}),
            code=str(code) if code else None,
            mounts=tuple(
                WorldMount(str(source), target) for target, source in (mounts or {}).items()
            ),
        )
        return await self.executor.prepare(job)

    async def start(
        self,
        command: str,
        *,
        slot: str = "cpu-0",
        code: Path | None = None,
        mounts: dict[str, Path] | None = None,
    ) -> ProcessExecution:
        execution = await self.prepare(command, slot=slot, code=code, mounts=mounts)
        await execution.start()
        return execution

    async def run(
        self,
        command: str,
        *,
        cwd: str = "",
        code: Path | None = None,
        mounts: dict[str, Path] | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[Exit, str]:
        """Execute and discard; returns the end and the output."""
        execution = await self.prepare(
            command, cwd=cwd, code=code, mounts=mounts, environment=environment
        )
        await execution.start()
        end = await execution.ended()
        output = execution.output.read_text()
        await execution.discard()
        return end, output

    async def close(self) -> None:
        """Ends whatever a failed test may have left running."""
        executor = ProcessExecutor(self.home)
        for adopted in await executor.adopt():
            await adopted.execution.kill()
            await adopted.execution.discard()
        for each in (*self._executors, executor):
            await each.close()


async def hear(execution: Execution, text: str) -> None:
    """Wait until the command has written `text`."""
    async with OutputWatcher() as watcher:
        async for batch in RawLog(Path(execution.output), 0, watcher).batches():
            if any(piece.text == text for piece in batch):
                return


async def saved_contents(
    execution: ProcessExecution, artifacts: DiskArtifacts
) -> dict[str, tuple[bytes, int]]:
    """The saved contents, and how many names each one's file has."""

    async def say(_: Sequence[str]) -> None:
        pass

    tree = await save(await scan(execution.files, None, ()), artifacts, say)
    found = {}
    for entry in tree.entries:
        [path] = await artifacts.local_paths([entry.sha256 or ""])
        found[entry.path] = path.read_bytes(), path.stat().st_nlink
    return found
