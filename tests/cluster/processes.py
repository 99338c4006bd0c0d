"""A cluster as a user starts it: servers, `spellq server`, `spellq agent`, each a process."""

import os
import signal
import subprocess
from pathlib import Path

from anyio import to_thread

from spellq_sdk import AsyncClient
from tests.e2e.conftest import SPELLQ, Installation
from tests.services import RabbitServer, RedisServer, free_port

TOKEN = "of the tests"


class Cluster:
    """Processes by name, below `folder`; the name is that of their home, too."""

    def __init__(self, folder: Path, redis: RedisServer, rabbit: RabbitServer) -> None:
        self.redis = redis
        self.rabbit = rabbit
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._settings = {
            "SPELLQ_URL": self.url,
            "SPELLQ_REDIS_URL": redis.url,
            "SPELLQ_AMQP_URL": rabbit.url,
            "SPELLQ_ARTIFACTS_URL": f"file://{folder}/artifacts",
            "SPELLQ_NAMESPACE": f"port-{self._port}",
        }
        self._processes: dict[str, subprocess.Popen[str]] = {}

    async def start_gateway(self, **more: str) -> None:
        port = str(self._port)
        await self._start("gateway", "server", "--port", port, SPELLQ_ADMIN_TOKEN=TOKEN, **more)

    async def start_agent(self, name: str, machine_type: str = "cpu=2") -> None:
        await self._start(name, "agent", "--machine-type", machine_type)

    async def _start(self, name: str, *arguments: str, **more: str) -> None:
        """Return when it has said that it serves."""
        await to_thread.run_sync(lambda: self._start_here(name, arguments, more))

    def _start_here(self, name: str, arguments: tuple[str, ...], more: dict[str, str]) -> None:
        own = Installation(self._folder / name)
        with (self._folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [SPELLQ, *arguments],
                env=own.environment(**self._settings, **more),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._processes[name] = process
        assert process.stdout is not None
        assert "serves" in process.stdout.readline(), (self._folder / f"{name}.log").read_text()

    async def end(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        process = self._processes.pop(name)
        process.send_signal(how)
        await to_thread.run_sync(process.communicate)

    async def close(self) -> None:
        for name in tuple(self._processes):
            await self.end(name, signal.SIGTERM)
        await to_thread.run_sync(self._end_helpers)

    def _end_helpers(self) -> None:
        for pid in self._folder.glob("*/agent/slots/*/helper.pid"):
            helper = int(pid.read_text())
            if Path(f"/proc/{helper}/cmdline").exists():
                os.kill(helper, signal.SIGKILL)

    def refused(self, *arguments: str, **more: str) -> str:
        """What a process says that does not start."""
        own = Installation(self._folder / "refused")
        told = own.spellq(*arguments, cwd=self._folder, **(self._settings | more))
        assert told.returncode == 1, told
        return told.stderr

    def client(self) -> AsyncClient:
        return AsyncClient(self.url, TOKEN)

    def spellq(self, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
        user = Installation(self._folder / "user")
        return user.spellq(*arguments, cwd=cwd, SPELLQ_URL=self.url, SPELLQ_TOKEN=TOKEN)
