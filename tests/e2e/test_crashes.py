"""What dies in the middle of a run, and what the run makes of it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from asyncinotify import Inotify, Mask

from spellq_sdk.daemon import LocalDaemon
from tests.e2e.conftest import SPELLQ, Installation
from tests.e2e.test_restart import Meeting, end, is_gone

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def helpers(home: Path) -> Iterator[int]:
    for file in home.glob("agent/slots/*/helper.pid"):
        yield int(file.read_text())


def command_of(helper: int) -> int:
    """The shell that a slot helper is the parent of."""
    (child,) = Path(f"/proc/{helper}/task/{helper}/children").read_text().split()
    return int(child)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert is_gone(pid)


@contextmanager
def at_work(
    own: Installation, project: Path, command: str = "exit 7"
) -> Iterator[tuple[LocalDaemon, int]]:
    """A daemon with one run whose command is under way; and its helper."""
    with Meeting() as meeting:
        daemon = own.start()
        own.spellq("run", "-b", f"{meeting.words}; {command}", cwd=project)
        meeting.arrival()
        (helper,) = helpers(own.home)
        yield daemon, helper


def test_a_command_that_is_killed_ends_with_137(own: Installation, project: Path) -> None:
    with at_work(own, project) as (_, helper):
        kill(command_of(helper))
        own.spellq("logs", "-f", "1")
        assert "complete (137)" in own.spellq("info", "1").stdout


def test_a_helper_that_is_killed_takes_its_command_along(own: Installation, project: Path) -> None:
    with at_work(own, project) as (_, helper):
        command = command_of(helper)
        kill(helper)
        assert is_gone(command)
        own.spellq("logs", "-f", "1")
        told = own.spellq("info", "1").stdout
        assert "interrupted" in told
        assert "helper" in told
        again = own.spellq("run", "echo the slot serves on", cwd=project)
        assert "the slot serves on" in again.stdout.splitlines()


def test_daemon_and_helper_die_together(own: Installation, project: Path) -> None:
    with at_work(own, project) as (daemon, helper):
        end(daemon, signal.SIGKILL)
        kill(helper)
        own.spellq("logs", "-f", "1")
        told = own.spellq("info", "1").stdout
        assert "interrupted" in told


def test_a_killed_cli_ends_nothing(own: Installation, project: Path) -> None:
    own.start()
    with Meeting() as meeting:
        cli = subprocess.Popen(
            [SPELLQ, "run", f"{meeting.words}; exit 4"],
            cwd=project,
            env=own.environment(),
            stdout=subprocess.DEVNULL,
        )
        guest = meeting.arrival()
        cli.kill()
        cli.wait()
        guest.send(b"go on\n")
    own.spellq("logs", "-f", "1")
    assert "complete (4)" in own.spellq("info", "1").stdout


def test_a_killed_master_script_ends_its_master_run(own: Installation, project: Path) -> None:
    own.start()
    with Meeting() as meeting:
        (project / "flow.sh").write_text(f"{meeting.words}\n")
        own.spellq("workflow", "create", "-b", "exec bash flow.sh", cwd=project)
        meeting.arrival()
        (helper,) = helpers(own.home)
        kill(command_of(helper))
        own.spellq("logs", "-f", "1")
    assert "complete (137)" in own.spellq("info", "1").stdout


class Machine:
    """A machine that can be restarted: what its daemons see as boot id is ours to say."""

    def __init__(self, own: Installation) -> None:
        self._own = own
        self._boot_id = own.home.with_name("boot_id")
        self._boots = 0

    def boot(self) -> subprocess.Popen[str]:
        """Start a daemon after a restart, and return when it serves."""
        self._boots += 1
        self._boot_id.write_text(f"{self._boots:08x}-0000-4000-8000-000000000000\n")
        bind = f"mount --bind {self._boot_id} {BOOT_ID}"
        daemon = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f'{bind} && exec "$0" up --foreground', SPELLQ],
            env=self._own.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert daemon.stdout is not None
        assert "running at" in daemon.stdout.readline()
        return daemon

    def crash(self, daemon: subprocess.Popen[str]) -> None:
        """Everything dies at once."""
        for pid in (daemon.pid, *helpers(self._own.home)):
            kill(pid) if pid != daemon.pid else daemon.kill()
        daemon.communicate()


@pytest.mark.root
def test_a_machine_that_restarts_interrupts_what_ran_and_nothing_else(
    own: Installation, project: Path
) -> None:
    (own.home / "config.toml").write_text('machine_types = "cpu=1"\n')
    machine = Machine(own)
    daemon = machine.boot()
    with Meeting() as meeting:
        own.spellq("run", "-b", f"{meeting.words}; exit 1", cwd=project)
        own.spellq("run", "-b", "echo waited; exit 2", cwd=project)
        meeting.arrival()
        machine.crash(daemon)
    daemon = machine.boot()
    try:
        own.spellq("logs", "-f", "2")
        told = own.spellq("info", "1").stdout
        assert "interrupted" in told
        assert "The machine was restarted." in told
        assert "complete (2)" in own.spellq("info", "2").stdout
    finally:
        own.spellq("down", "--kill")
        daemon.communicate()


@pytest.mark.root
def test_an_exit_code_outlives_the_machine(own: Installation, project: Path) -> None:
    """The command had ended, its agent was dead by then, and the machine went after it."""
    machine = Machine(own)
    daemon = machine.boot()
    with Meeting() as meeting:
        own.spellq("run", "-b", f"{meeting.words}; echo x > x; exit 9", cwd=project)
        guest = meeting.arrival()
        daemon.kill()
        daemon.wait()
        with Inotify() as journals:
            journals.add_watch(next(own.home.glob("agent/slots/*/1-1")), Mask.MOVED_TO)
            guest.send(b"go on\n")
            event = journals.sync_get()
            assert event is not None
            assert str(event.name) == "exit.json"
        machine.crash(daemon)
    daemon = machine.boot()
    try:
        own.spellq("logs", "-f", "1")
        assert "complete (9)" in own.spellq("info", "1").stdout
        assert "x" in own.spellq("ls", "runs/1").stdout
    finally:
        own.spellq("down", "--kill")
        daemon.communicate()
