"""The real thing: the real command, a real daemon of a home of its own, real worlds."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, ensure_daemon, stop_daemon
from spellq_workers import link
from tests.e2e.machine import Machine

WORKERS = str(Path(link.__file__).parents[1])
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


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    machine = Machine(tmp_path / "home")
    yield machine
    await machine.close()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "train.py").write_text("original")
    (folder / "unused.txt").write_text("unused")
    return folder


@pytest.fixture
def folder_outside_tmp() -> Iterator[Path]:
    """Where a world shows the host, unlike below /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def bubblewrap() -> str:
    if shutil.which("bwrap") is None and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "-y", "bubblewrap"], check=True, capture_output=True)
    program = shutil.which("bwrap")
    assert program is not None, "these tests need bubblewrap: apt-get install bubblewrap"
    return program


@pytest.fixture
def through_bubblewrap(bubblewrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other way into a world is tried, though there may be one."""
    monkeypatch.setattr(link, "ways_in", lambda: [link.through_bubblewrap(bubblewrap)])


@pytest.fixture
def without_overlays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers whose kernel refuses overlays."""
    program = tmp_path / "helper_without_overlays.py"
    program.write_text(
        f"""if True:
        import sys
        sys.path.append({WORKERS!r})
        from spellq_workers import helper, world
        really = world.mount
        def mount(source, target, kind, *others):
            if kind == "overlay":
                raise OSError(22, "mount of overlay: Invalid argument")
            really(source, target, kind, *others)
        world.mount = mount
        helper.main()
        """
    )
    monkeypatch.setattr(link, "HELPER", program)


KINDS = {"at hand": None, "bubblewrap": "through_bubblewrap", "copies": "without_overlays"}


@pytest.fixture(params=KINDS)
def any_machine(request: pytest.FixtureRequest) -> Machine:
    """Worlds made in the way that is at hand, and in each that another machine may need."""
    fixture = KINDS[request.param]
    if fixture is not None:
        request.getfixturevalue(fixture)
    machine: Machine = request.getfixturevalue("machine")
    return machine


@pytest.fixture
async def artifacts(machine: Machine) -> DiskArtifacts:
    return await DiskArtifacts.make(machine.home / "artifacts")
