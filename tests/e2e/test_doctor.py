"""What `spellq doctor` and `spellq up` say of a machine, on one that really is like that."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import anyio
import pytest

from spellq_workers.remedies import world_problem
from tests.e2e.conftest import SPELLQ, Installation
from tests.e2e.machine import Machine, hear

LINES: Final = [
    "spellq",
    "Python",
    "Kernel",
    "git",
    "Packages",
    "Namespaces",
    "Overlay",
    "Home",
    "Disk space",
    "Daemon",
    "Port",
    "Slot helpers",
]


def _examined(own: Installation, port: int = 0) -> dict[str, dict[str, object]]:
    told = own.spellq("doctor", "-o", "json", SPELLQ_PORT=str(port))
    return {check["name"]: check for check in json.loads(told.stdout)}


def test_each_thing_is_a_line(own: Installation) -> None:
    told = own.spellq("doctor")
    assert told.returncode == 0, told.stdout
    assert [line.removeprefix("✔ ").partition(":")[0] for line in told.stdout.splitlines()] == LINES
    namespaces = "root makes them" if os.geteuid() == 0 else "user namespaces work"
    assert f"✔ Namespaces: {namespaces}\n" in told.stdout
    assert "✔ Overlay: works\n" in told.stdout


def test_who_is_on_a_port_is_named(own: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        check = _examined(own, port)["Port"]
    assert not check["good"]
    name = Path("/proc/self/comm").read_text().strip()
    assert check["found"] == f"{port} is taken by {name} (process {os.getpid()})."
    assert check["remedy"] == "Set SPELLQ_PORT to a free one."


def test_a_setting_that_keeps_the_daemon_from_starting(own: Installation) -> None:
    (own.home / "config.toml").write_text('min_free_bytes = "much"\n')
    told = own.spellq("doctor")
    assert told.returncode == 1
    assert "✖ Settings: Invalid free space 'much': use bytes, or KiB," in told.stdout


def test_a_port_may_stand_in_the_settings(own: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        (own.home / "config.toml").write_text(f"port = {port}\n")
        told = own.spellq("doctor")
    assert f"✖ Port: {port} is taken by " in told.stdout


def test_a_disk_on_which_no_run_starts(own: Installation) -> None:
    told = own.spellq("doctor", SPELLQ_MIN_FREE_BYTES="900000GiB")
    assert told.returncode == 1
    assert "free, and no run starts below 900000 GiB. Free some where" in told.stdout


def test_an_empty_port_is_none_asked_for(own: Installation) -> None:
    assert "✔ Port: " in own.spellq("doctor", SPELLQ_PORT="").stdout


def test_where_no_home_can_be_the_reason_is_told_without_codes(own: Installation) -> None:
    (own.home / "file").touch()
    told = own.spellq("doctor", SPELLQ_HOME=str(own.home / "file/home")).stdout
    assert "✖ Worlds of runs: cannot be tried: Not a directory. Mend what else is" in told
    assert "cannot be written to: Not a directory. Make it writable, or set SPELLQ_HOME to" in told


def test_a_home_where_not_even_root_can_write(own: Installation) -> None:
    told = own.spellq("doctor", SPELLQ_HOME="/proc/home").stdout
    assert "✖ Home: /proc/home cannot be written to: No such file or directory. Make it" in told


ROOT_OF_ITS_OWN: Final = ["unshare", "--user", "--map-root-user"]
WITHOUT_NAMESPACES: Final = """
echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --inh-caps=-all --ambient-caps=-all \
    --bounding-set=-all --securebits=+noroot "$@"
"""


@pytest.mark.parametrize("command", ["doctor", "up"])
def test_a_machine_that_allows_no_user_namespaces(own: Installation, command: str) -> None:
    """Its limit is set in a user namespace of its own, whose root has no rights left either."""
    told = subprocess.run(
        [*ROOT_OF_ITS_OWN, "sh", "-c", WITHOUT_NAMESPACES, "sh", str(SPELLQ), command],
        env=own.environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert told.returncode == 1
    said = told.stdout + told.stderr
    assert "No space left on device" in said  # the kernel's word for that limit
    assert "This machine allows no user namespaces. Allow them: sudo sysctl -w user." in said
    assert not (own.home / "daemon.json").exists()


def test_apparmors_profile_is_printed_whole(tmp_path: Path) -> None:
    """For kernel settings as Ubuntu has them, which cannot be had here."""
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "apparmor_restrict_unprivileged_userns").write_text("1\n")
    problem = world_problem("making new namespaces: uid_map: Operation not permitted\n", tmp_path)
    assert problem.startswith("making new namespaces: uid_map: Operation not permitted. AppArmor")
    _, begin, rest = problem.partition("sudo tee /etc/apparmor.d/spellq >/dev/null <<'EOF'\n")
    profile, end, _ = rest.partition("\nEOF\nsudo apparmor_parser -r /etc/apparmor.d/spellq")
    assert begin
    assert end
    interpreter = os.path.realpath(sys.executable)
    assert f'profile spellq "{interpreter}" flags=(unconfined) {{\n  userns,\n' in profile


def test_a_bubblewrap_that_was_tried_in_vain_is_not_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first word is the helper's own, the second that of bubblewrap 0.8 on Debian."""
    said = (
        "making new namespaces: Operation not permitted\n"
        "bwrap: No permissions to create a new namespace. See <file:///README.Debian.gz>.\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    without = world_problem(said, tmp_path)
    assert without.endswith("sudo apt-get install bubblewrap")
    (tmp_path / "bwrap").touch(mode=0o755)
    tried = world_problem(said, tmp_path)
    assert "README.Debian.gz>. In a container, " in tried
    assert "install" not in tried


def test_debians_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "unprivileged_userns_clone").write_text("0\n")
    problem = world_problem("making new namespaces: Operation not permitted", tmp_path)
    assert problem.endswith("sudo sysctl -w kernel.unprivileged_userns_clone=1")


async def test_a_run_whose_helper_died_is_named_with_who_ends_it(own: Installation) -> None:
    machine = Machine(own.home)
    execution = await machine.start("echo up; sleep 99")
    await hear(execution, "up")
    alive = await anyio.to_thread.run_sync(_examined, own)
    assert alive["Slot helpers"]["found"] == "1 alive, none stale"
    assert "Runs left behind" not in alive
    await _kill(int((own.home / "agent/slots/cpu-0/helper.pid").read_text()))
    left = await anyio.to_thread.run_sync(_examined, own)
    assert left["Runs left behind"]["found"] == "1: their helpers are dead."
    assert "'spellq up' ends them" in str(left["Runs left behind"]["remedy"])
    await machine.close()


async def test_a_helper_that_lost_its_slot_is_stale(own: Installation) -> None:
    machine = Machine(own.home)
    execution = await machine.start("echo up; sleep 99")
    await hear(execution, "up")
    helper = int((own.home / "agent/slots/cpu-0/helper.pid").read_text())
    shutil.rmtree(own.home / "agent")
    found = (await anyio.to_thread.run_sync(_examined, own))["Slot helpers"]
    assert found["found"] == "1 of 1 lost their slots."
    assert found["remedy"] == f"End them: kill -9 {helper}"
    await _kill(helper)
    assert (await anyio.to_thread.run_sync(_examined, own))["Slot helpers"]["good"]
    await machine.close()


async def _kill(pid: int) -> None:
    """Kill it, and wait until it is gone."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        await anyio.wait_readable(process)
    finally:
        os.close(process)
