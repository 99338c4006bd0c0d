"""The real thing: the real command, a real daemon of a home of its own, real worlds."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, ensure_daemon, stop_daemon

SPELLQ = Path(sys.executable).parent / "spellq"
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass
class Installation:
    """A home of its own, and what is needed to use it as a user would."""

    home: Path
    arguments: list[str] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SPELL", "PYTEST"))
        }
        return kept | {"SPELLQ_HOME": str(self.home)} | more

    def start(self) -> LocalDaemon:
        return ensure_daemon(self.home, arguments=self.arguments)

    def spellq(
        self, *arguments: str, cwd: Path | None = None, name: str = "spellq", **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [SPELLQ.with_name(name), *arguments],
            cwd=cwd or self.home.parent,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
        )

    def python(self, script: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a script by hand, as a user would."""
        return subprocess.run(
            [sys.executable, script],
            cwd=cwd,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=50,
        )


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One daemon for all tests that leave it as it is."""
    shared = Installation(
        tmp_path_factory.mktemp("home"), ["--machine-types", "cpu=8,t4=2", "--port", "0"]
    )
    shared.start()
    yield shared
    stop_daemon(shared.home)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Installation]:
    """An installation a test may do anything to; nothing is started yet."""
    own = Installation(tmp_path / "home")
    own.home.mkdir(mode=0o700)
    yield own
    stop_daemon(own.home)


@pytest.fixture
def daemon(shared: Installation) -> LocalDaemon:
    return shared.start()


@pytest.fixture
async def client(daemon: LocalDaemon) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(daemon.url, daemon.token) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A plain folder to work in."""
    project = tmp_path / "project"
    project.mkdir()
    return project
