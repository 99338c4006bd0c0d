"""Real servers, started by the tests on free ports of their own, and gone with them.

    python -m tests.services

installs what is missing of them, as root on Debian; elsewhere it says what is missing.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from anyio.abc import TaskStatus

if TYPE_CHECKING:
    from spellq_brokers.cluster import RabbitBus

PACKAGES: Final = {"redis-server": "redis-server", "rabbitmq-server": "rabbitmq-server"}
"""The programs of the servers, and the Debian packages they are in."""
_RABBITMQ: Final = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""As Debian has it. What it puts on the path becomes another user."""
_PLACES: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"


def install() -> None:
    """Have the programs installed, or end with what is missing."""
    missing = [
        package for program, package in PACKAGES.items() if not shutil.which(program, path=_PLACES)
    ]
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"The tests start servers of their own. Install them: sudo {' '.join(command)}")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    print(f"Installing {', '.join(missing)}", flush=True)
    if subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run(["apt-get", "update"], env=quiet, stdout=subprocess.DEVNULL, check=True)
        subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=True)


class RedisServer:
    """A Redis of our own, as durable as the product asks for. It may be killed and started anew."""

    def __init__(self, folder: str, *options: str) -> None:
        self.port = free_port()
        self._command = [
            *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", folder),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
            *("--maxmemory-policy", "noeviction", *options),
        ]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it serves, with what it kept."""
        self._process = _start(self._command, "Ready to accept connections")

    def kill(self) -> None:
        """As by `kill -9`; return when it is gone."""
        with self._process:
            self._process.kill()


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """A Redis that serves until the end; `options` as on its command line."""
    with tempfile.TemporaryDirectory(prefix="spellq-redis-") as folder:
        server = RedisServer(folder, *options)
        try:
            yield server
        finally:
            server.kill()


class RabbitServer:
    """A RabbitMQ node of our own, with an epmd of its own. It may be killed and started anew."""

    def __init__(self, folder: str, config: str = "") -> None:
        self.port = free_port()
        place = Path(folder)
        (place / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "log.console = true\nlog.file = false\nlog.console.level = warning\n" + config
        )
        (place / "plugins").write_text("[].\n")
        own = {
            "HOME": folder,
            "RABBITMQ_NODENAME": f"spellq{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(place / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(place / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(place / "mnesia"),
            "RABBITMQ_LOG_BASE": str(place / "log"),
            "RABBITMQ_PID_FILE": str(place / "pid"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # No spinning while there is nothing to do: the tests share two cores with it.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }
        self._environment = os.environ | own
        self.start()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Return when it serves, with what it kept."""
        self._process = _start([_RABBITMQ], "completed with", self._environment)

    def kill(self) -> None:
        """As by `kill -9`; return when it is gone."""
        with self._process:
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave nothing running."""
        self.kill()
        subprocess.run(["epmd", "-kill"], env=self._environment, capture_output=True, check=False)


@contextmanager
def rabbit_server(config: str = "") -> Iterator[RabbitServer]:
    """A RabbitMQ that serves until the end; `config` as in rabbitmq.conf."""
    with tempfile.TemporaryDirectory(prefix="spellq-rabbit-") as folder:
        server = RabbitServer(folder, config)
        try:
            yield server
        finally:
            server.close()


@asynccontextmanager
async def working(bus: "RabbitBus") -> "AsyncIterator[RabbitBus]":
    """The bus at work, in a task of its own: fixtures begin and end in different ones."""
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(bus.run(task_status=_Started(started)))
    await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        yield bus
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class _Started(TaskStatus[None]):
    def __init__(self, told: "asyncio.Future[None]") -> None:
        self._told = told

    def started(self, value: None = None) -> None:
        if not self._told.done():
            self._told.set_result(None)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Return when the server has said that it is ready."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if ready in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process
    raise RuntimeError(f"{command[0]} did not start: {said}")


if __name__ == "__main__":
    install()
