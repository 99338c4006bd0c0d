"""Real servers, started by the tests on free ports of their own, and gone with them.

    python -m tests.services

installs what is missing of them, as root on Debian; elsewhere it says what is missing.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

PACKAGES: Final = {"redis-server": "redis-server"}
"""The programs of the servers, and the Debian packages they are in."""
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


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(command: Sequence[str], ready: str) -> "subprocess.Popen[str]":
    """Return when the server has said that it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if ready in line:
            return process
    raise RuntimeError(f"{command[0]} did not start: {said}")


if __name__ == "__main__":
    install()
