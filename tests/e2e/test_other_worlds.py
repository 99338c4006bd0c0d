"""The same world where machines differ: through bubblewrap, or with copies for overlays."""

import os
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import anyio
import pytest

from spellq.trees import TreeEntry, make_tree
from spellq_workers import link
from spellq_workers.outputs import scan
from spellq_workers.process import ProcessExecution
from spellq_workers.worldcheck import check_world
from tests.e2e.conftest import SPELLQ, Installation
from tests.e2e.machine import Machine, hear

LOOKING: Final = """
id -u; id -g; whoami; pwd; ls -l; ls -A /tmp ~; ls / /dev /run
grep -E '^(Cap[^B]|NoNew|NSpid)' /proc/self/status
stat -c '%a %U' /spell /tmp ~ train.py; touch /usr/x; umount /tmp; cat /proc/sys/kernel/hostname
"""


async def test_a_command_sees_the_same_in_every_kind_of_world(
    any_machine: Machine, code: Path, tmp_path: Path
) -> None:
    _, seen = await any_machine.run(LOOKING, code=code, cwd="src")
    plain = Machine(tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "HELPER", Path(link.__file__).with_name("helper.py"))
        patch.setattr(link, "ways_in", lambda: [[]])
        try:
            _, expected = await plain.run(LOOKING, code=code, cwd="src")
        finally:
            await plain.close()
    assert seen == expected
    assert seen.startswith(f"{os.getuid()}\n{os.getgid()}\n")


async def test_a_running_command_is_found_again_in_every_kind_of_world(
    any_machine: Machine, code: Path
) -> None:
    execution = await any_machine.start(
        "mkfifo /tmp/gate; echo up; read < /tmp/gate; exit 7", code=code
    )
    await hear(execution, "up")
    [adopted] = await any_machine.restart().adopt()
    assert adopted.started
    await anyio.to_thread.run_sync((execution.folder / "tmp" / "gate").write_text, "\n")
    assert (await adopted.execution.ended()).code == 7
    await adopted.execution.discard()
    execution = await any_machine.start("trap '' TERM; echo up; sleep 99", code=code)
    await hear(execution, "up")
    await execution.kill()
    assert (await execution.ended()).code == 137


@pytest.mark.usefixtures("through_bubblewrap")
def test_what_helpers_are_started_through_is_told() -> None:
    assert check_world().through == "bwrap"


# Copies


SNAPSHOT: Final = make_tree(
    [
        TreeEntry(path="src/train.py", size=8, sha256=sha256(b"original").hexdigest()),
        TreeEntry(path="unused.txt", size=6, sha256=sha256(b"unused").hexdigest()),
        TreeEntry(path="link", link="src/train.py"),
    ]
)


async def _ended(machine: Machine, command: str, code: Path) -> ProcessExecution:
    execution = await machine.start(command, code=code)
    assert (await execution.ended()).code == 0
    return execution


async def _changed(machine: Machine, command: str, code: Path) -> list[str]:
    execution = await _ended(machine, command, code)
    found = await scan(execution.files, SNAPSHOT, ())
    await execution.discard()
    return [file.path for file in found.files] + [each.path for each in found.links]


@pytest.fixture
def linked(code: Path) -> Path:
    (code / "link").symlink_to("src/train.py")
    return code


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        ("true", []),
        ("cat src/train.py link", []),
        ("echo new > model; mkdir -p a/b; echo deep > a/b/c", ["a/b/c", "model"]),
        ("echo more >> src/train.py", ["src/train.py"]),
        ("touch src/train.py", []),
        ("printf original > other; mv other src/train.py", []),
        ("chmod +x src/train.py", ["src/train.py"]),
        ("rm src/train.py unused.txt", []),
        ("mv src moved", ["moved/train.py"]),
        ("rm src/train.py; echo again > src/train.py", ["src/train.py"]),
        ("ln -sf unused.txt link", ["link"]),
    ],
)
async def test_outputs_are_the_same_with_copies_and_the_code_stays_as_it_is(
    any_machine: Machine, linked: Path, command: str, changed: list[str]
) -> None:
    for _ in range(2):
        assert await _changed(any_machine, command, linked) == changed
    assert (linked / "src/train.py").read_text() == "original"
    assert (linked / "src/train.py").stat().st_nlink == 1


@pytest.mark.usefixtures("without_overlays")
async def test_the_next_run_gets_a_copy_as_new(machine: Machine, linked: Path) -> None:
    look = "cat link; find . -printf '%P %m %s %l\\n' | sort"
    _, before = await machine.run(look, code=linked)
    await machine.run("echo x > src/train.py; rm unused.txt; chmod 700 src; touch a", code=linked)
    _, after = await machine.run(look, code=linked)
    assert before == after
    assert before.startswith("original")


@pytest.mark.usefixtures("without_overlays")
async def test_copies_are_compared_after_the_agents_death_too(
    machine: Machine, linked: Path
) -> None:
    await _ended(machine, "echo more >> src/train.py; echo new > model", linked)
    [adopted] = await machine.restart().adopt()
    found = await scan(Path(adopted.execution.files), SNAPSHOT, ())
    assert [file.path for file in found.files] == ["model", "src/train.py"]


OVERLAY: Final = (
    "mkdir lower upper work && mount -t overlay overlay place "
    "-o lowerdir=lower,upperdir=upper,workdir=work"
)
HARDENED: Final = "mount -t tmpfs -o noexec,nosuid,nodev,mode=700 tmpfs place"
ELSEWHERE: Final = """
mkdir place && {mount} && mkdir -m 700 place/home && export SPELLQ_HOME=$PWD/place/home &&
cd project && exec setpriv --ambient-caps=-all sh -c "$0"
"""


def _elsewhere(own: Installation, mount: str, commands: Sequence[str]) -> str:
    """What the commands say, with a home on a file system of its own: for root's, root's own."""
    enter = ["unshare", "--mount"]
    if os.geteuid() != 0:
        enter = [*enter, "--user", "--map-current-user", "--keep-caps"]
    script = " && ".join(f"{SPELLQ} {command}" for command in commands)
    script = f"({script}); code=$?; {SPELLQ} down --kill > /dev/null; exit $code"
    told = subprocess.run(
        [*enter, "sh", "-c", ELSEWHERE.format(mount=mount), script],
        cwd=own.home.parent,
        env=own.environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def test_a_home_on_an_overlay(own: Installation, project: Path) -> None:
    """As in a container whose own root it is: there the kernel really refuses another one."""
    (project / "train.py").write_text("print('trained')")
    run = "run 'python train.py; echo weights > model; touch train.py'"
    marks = "" if os.geteuid() == 0 else ",userxattr"
    said = _elsewhere(own, OVERLAY + marks, ["doctor", "up", run])
    assert "✔ Overlay: refused (" in said
    assert "every run gets a copy of its code. For overlays, set SPELLQ_HOME" in said
    assert "trained" in said
    saved = [line for line in said.splitlines() if "Saving" in line]
    assert [line.split()[-1] for line in saved] == ["'/spell/model'"]


def test_a_home_on_a_hardened_file_system(own: Installation, project: Path) -> None:
    """An ordinary user's namespace cannot take back what such a mount forbids."""
    (project / "train.py").write_text("print('trained')")
    runs = [
        "run 'python train.py; echo weights > model'",
        "run -m runs/1:/mnt/1 'cat /mnt/1/model'",
    ]
    said = _elsewhere(own, HARDENED, ["doctor", "up", *runs])
    assert "✔ Overlay: works" in said
    assert said.splitlines().count("trained") == said.splitlines().count("weights") == 1


PACKAGES: Final = (
    "mkdir -p packages/data && mount -t tmpfs tmpfs packages/data && "
    "echo seen > packages/data/file && export PYTHONPATH=$PWD/packages"
)


def test_a_file_system_mounted_among_the_packages(own: Installation, project: Path) -> None:
    data = own.home.parent / "packages/data"
    run = f"run 'cat {data}/file; touch {data}/x 2>&1 | cat'"
    said = _elsewhere(own, PACKAGES, ["up", run])
    assert "\nseen\n" in said
    assert "Read-only file system" in said


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    """A folder of a group, to which belongs whatever is made in it."""
    folder = tmp_path / "group"
    folder.mkdir()
    groups = (
        [100] if os.geteuid() == 0 else [each for each in os.getgroups() if each != os.getegid()]
    )
    assert groups, "this test needs a user with a second group"
    os.chown(folder, -1, groups[0])
    folder.chmod(0o2770)
    return folder


async def test_a_home_in_a_groups_folder(shared_folder: Path) -> None:
    """An ordinary user's world knows no other group, so no overlay could copy up what is its."""
    machine = Machine(shared_folder / "home")
    code = shared_folder / "code"
    code.mkdir()
    (code / "train.py").write_text("original")
    try:
        end, output = await machine.run("echo more >> train.py && cat train.py", code=code)
    finally:
        await machine.close()
    assert (end.code, output) == (0, "originalmore\n")
    assert (code / "train.py").read_text() == "original"


UNLISTED: Final = "run 'whoami; echo $USER $HOME; touch ~/x && ls -A ~'"


def test_a_user_whom_the_machine_does_not_list(own: Installation, project: Path) -> None:
    """As a container's often is: HOME says where theirs is."""
    told = subprocess.run(
        ["unshare", "--user", "--map-user=54321", "--map-group=54321", "sh", "-c",
         f"{SPELLQ} {UNLISTED}; code=$?; {SPELLQ} down --kill; exit $code"],
        cwd=project,
        env=own.environment(HOME=str(own.home.parent)),
        capture_output=True,
        text=True,
        timeout=50,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    assert f"uid54321 {own.home.parent}\nx\n" in told.stdout
