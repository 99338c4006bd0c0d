"""A daemon that dies costs nothing: commands run on, and whoever waits goes on waiting."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon, find_daemon
from tests.e2e.conftest import SPELLQ, Installation


def end(daemon: LocalDaemon, how: signal.Signals) -> None:
    """Send the signal and wait for the process to be gone."""
    pidfd = os.pidfd_open(daemon.pid)
    try:
        os.kill(daemon.pid, how)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)


def is_gone(pid: int) -> bool:
    """Whether the process has ended, or does so within five seconds."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 5)[0])
    finally:
        os.close(pidfd)


class Meeting:
    """Where a command and its test meet: the command comes, and waits for a line."""

    def __enter__(self) -> "Meeting":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._guests: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._guests):
            each.close()

    @property
    def words(self) -> str:
        """What the command has to execute (in bash)."""
        return f"exec 3<>/dev/tcp/127.0.0.1/{self._listener.getsockname()[1]}; read line <&3"

    def arrival(self) -> socket.socket:
        """Wait for the command; what is sent here lets it go on."""
        guest, _ = self._listener.accept()
        self._guests.append(guest)
        return guest


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_outlives_the_daemon_and_keeps_its_exit_code(
    own: Installation, project: Path, how: signal.Signals
) -> None:
    own.arguments = ["--port", "0"]  # its own again afterwards, which others do not use
    with Meeting() as meeting:
        first = own.start()
        command = f"echo before; {meeting.words}; echo after; echo x > x; exit 7"
        assert own.spellq("run", "-b", command, cwd=project).returncode == 0
        guest = meeting.arrival()
        end(first, how)
        guest.send(b"go on\n")
    told = own.spellq("logs", "-f", "1")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines.count("before") == 1
    assert lines.count("after") == 1
    assert lines[-1] == "🎉 Run 1 complete"
    info = own.spellq("info", "1").stdout
    assert "complete (7)" in info
    assert "x" in own.spellq("ls", "runs/1").stdout
    second = find_daemon(own.home)
    assert second is not None
    assert second.url == first.url


def test_a_command_that_ended_while_nobody_was_there(own: Installation, project: Path) -> None:
    with Meeting() as meeting:
        first = own.start()
        own.spellq("run", "-b", f"{meeting.words}; echo last words; exit 9", cwd=project)
        guest = meeting.arrival()
        end(first, signal.SIGKILL)
        guest.send(b"go on\n")
        assert guest.recv(100) == b""
    told = own.spellq("logs", "-f", "1")
    assert "last words" in told.stdout.splitlines()
    assert "complete (9)" in own.spellq("info", "1").stdout


async def test_a_client_that_waits_starts_the_daemon_again_and_goes_on(
    own: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPELLQ_HOME", str(own.home))
    for name in ("SPELLQ_URL", "SPELLQ_TOKEN", "SPELL_RUN"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncClient.from_environment() as client:
        run = await client.runs.new(command="sleep 1; exit 3")
        await run.wait_status("running")
        waits = [asyncio.create_task(run.wait_status(*client.runs.FINAL)) for _ in range(50)]
        first = await asyncio.to_thread(find_daemon, own.home)
        assert first is not None
        await asyncio.to_thread(end, first, signal.SIGKILL)
        await asyncio.gather(*waits)
        await run.refresh()
        assert (run.status, run.user_exit_code) == ("complete", 3)
        second = await asyncio.to_thread(find_daemon, own.home)
        assert second is not None
        assert second.pid != first.pid


def test_a_workflow_goes_on_over_a_restart(own: Installation, project: Path) -> None:
    (project / "flow.py").write_text(
        "import spell.client\n"
        "client = spell.client.from_environment()\n"
        "for n in range(3):\n"
        "    run = client.runs.new(command=f'sleep 0.5; echo {n}')\n"
        "    run.wait_status(*client.runs.FINAL)\n"
        "    print('done', n, flush=True)\n"
    )
    first = own.start()
    workflow = subprocess.Popen(
        [SPELLQ, "workflow", "python flow.py"],
        cwd=project,
        env=own.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert workflow.stdout is not None
    told = []
    for line in workflow.stdout:
        told.append(line.strip())
        if line == "done 0\n":
            end(first, signal.SIGKILL)
    assert workflow.wait() == 0
    workflow.stdout.close()
    assert [line for line in told if line.startswith("done")] == ["done 0", "done 1", "done 2"]
    assert told.count("🎉 Run 1 complete") == 1


def test_what_up_was_told_to_serve_holds_until_down(own: Installation, project: Path) -> None:
    own.spellq("up", "--machine-types", "cpu=2,t4=1", "--port", "0")
    first = find_daemon(own.home)
    assert first is not None
    own.spellq("run", "-b", "-t", "t4", "sleep 60", cwd=project)
    own.spellq("run", "-b", "-t", "t4", "echo waited; exit 3", cwd=project)
    end(first, signal.SIGKILL)
    own.spellq("kill", "1")
    own.spellq("logs", "-f", "2")
    assert "complete (3)" in own.spellq("info", "2").stdout
    assert own.spellq("run", "-t", "t4", "true", cwd=project).returncode == 0
    second = find_daemon(own.home)
    assert second is not None
    end(second, signal.SIGKILL)
    assert own.spellq("down").stdout == "✨ spellq is not running.\n"
    assert "Unknown machine type" in own.spellq("run", "-t", "t4", "true", cwd=project).stderr


def test_two_that_start_it_at_once_get_the_same_daemon(own: Installation) -> None:
    starting = [
        subprocess.Popen([SPELLQ, "up"], env=own.environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = {process.communicate()[0].rpartition(" ")[2] for process in starting}
    assert len(told) == 1
    assert all(process.returncode == 0 for process in starting)


def test_a_daemon_that_is_still_starting_is_waited_for(own: Installation) -> None:
    """As after a ^C: whoever started it has gone."""
    starting = subprocess.Popen(
        [sys.executable, "-m", "spellq.cli", "daemon"],
        env=own.environment(),
        stderr=subprocess.DEVNULL,
    )
    told = own.spellq("ps")
    own.spellq("down")
    starting.wait(20)
    assert (told.returncode, told.stdout) == (0, "ID  REPOSITORY  COMMAND  STATUS  CREATOR\n")


def test_down_names_what_is_under_way(own: Installation, project: Path) -> None:
    assert own.spellq("down").stdout == "✨ spellq is not running.\n"
    own.spellq("run", "-b", "sleep 60", cwd=project)
    refused = own.spellq("down")
    assert refused.returncode == 1
    assert "1" in refused.stderr
    assert "--stop" in refused.stderr
    assert own.spellq("down", "--kill").returncode == 0
    assert find_daemon(own.home) is None
    for helper in (own.home / "agent" / "slots").glob("*/helper.pid"):
        assert is_gone(int(helper.read_text()))
    assert "killed" in own.spellq("info", "1").stdout


def test_what_is_kept_is_nobody_elses(own: Installation) -> None:
    own.start()
    assert own.home.stat().st_mode & 0o777 == 0o700
    for name in ("token", "key", "log", "daemon.json"):
        assert (own.home / name).stat().st_mode & 0o077 == 0, name


def test_down_does_not_wait_for_a_daemon_that_was_killed(own: Installation, project: Path) -> None:
    with Meeting() as meeting:
        command = f"trap '' TERM; {meeting.words}; sleep 60"
        own.spellq("run", "-b", "--grace", "60", command, cwd=project)
        meeting.arrival()
        with subprocess.Popen(
            [str(SPELLQ), "down", "--stop"],
            env=own.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as down:
            assert down.stdout is not None
            assert down.stdout.readline() == "✨ Stopping 1 run…\n"
            end(own.start(), signal.SIGKILL)
            _, told = down.communicate(timeout=30)
    assert down.returncode == 1
    assert "commands under way run on" in told
    own.start()
    assert own.spellq("down", "--kill").returncode == 0
