"""The command on a real terminal: the words Spell's users know, and ^C."""

import fcntl
import os
import pty
import re
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spellq.daemon import DaemonFiles
from tests.e2e.conftest import SPELLQ, Installation

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program on a terminal of its own, and what is on it so far."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self.said = ""

    def read_until(self, words: str) -> None:
        while words not in self.said:
            self.said += self._read()

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def rest(self) -> str:
        """All that it says to its end."""
        while True:
            try:
                self.said += self._read()
            except OSError:  # nobody holds the other end any more
                return self.said

    @property
    def lines(self) -> list[str]:
        """The lines that stay: of one that was written over and over, what it came to."""
        kept = [line.rstrip("\r").rpartition("\r")[2] for line in self.said.split("\n")]
        return [_ESCAPES.sub("", line).rstrip() for line in kept]

    def _read(self) -> str:
        return os.read(self._master, 65536).decode(errors="replace")


@contextmanager
def terminal(shared: Installation, cwd: Path, *arguments: str, **more: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()

    def take_over() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [SPELLQ, *arguments],
        cwd=cwd,
        env=shared.environment(**{"TERM": "xterm", "COLUMNS": "100", "LANG": "C.UTF-8", **more}),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=take_over,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_run_on_a_terminal(shared: Installation, project: Path) -> None:
    with terminal(shared, project, "run", "echo Hello World!; exit 4") as screen:
        screen.rest()
        assert screen.process.wait() == 4
    told = [line for line in screen.lines if line]
    begin = next(n for n, line in enumerate(told) if line.startswith("💫 Casting spell #"))
    assert told[begin + 1 : begin + 8] == [
        "✨ Stop viewing logs with ^C",
        "✨ Machine_Requested… done",
        "✨ Building… done",
        "✨ Run is running",
        "Hello World!",
        "✨ Saving… done",
        "✨ Pushing… done",
    ]
    assert told[begin + 8].startswith("🎉 Total run time: ")
    assert re.fullmatch(r"🎉 Run \d+ complete", told[begin + 9])


def test_interrupting_a_followed_log_only_detaches(shared: Installation, project: Path) -> None:
    with terminal(shared, project, "run", "echo ready; sleep 60") as screen:
        screen.read_until("ready")
        screen.type(b"\x03")
        told = screen.rest()
        assert screen.process.wait() == 130
    number = re.search(r"Casting spell #(\d+)", told)
    assert number is not None
    assert "✨ Your run is still running remotely." in screen.lines
    assert f"✨ Use 'spellq stop {number[1]}' to save outputs and stop your run." in screen.lines
    assert "Traceback" not in told
    assert "*Running" in shared.spellq("ps", "-n", "1").stdout
    assert shared.spellq("kill", number[1]).returncode == 0


def test_an_interrupt_at_the_question_whether_to_overwrite(
    shared: Installation, project: Path
) -> None:
    told = shared.spellq("run", "echo new > a.txt", cwd=project).stdout
    number = re.search(r"Casting spell #(\d+)", told)
    assert number is not None
    (project / "a.txt").symlink_to("nowhere")
    with terminal(shared, project, "cp", f"runs/{number[1]}") as screen:
        screen.read_until("Overwrite a.txt?")
        # Before anybody reads, an interrupt is noticed by Python with the end of the line only.
        screen.type(b"\x03\n")
        screen.rest()
        assert screen.process.wait() == 130
    assert (project / "a.txt").is_symlink()
    with terminal(shared, project, "cp", f"runs/{number[1]}") as screen:
        screen.read_until("Overwrite a.txt?")
        screen.type(b"y\n")
        screen.rest()
        assert screen.process.wait() == 0
    assert (project / "a.txt").read_text() == "new\n"


def test_an_interrupt_while_a_daemon_is_awaited(own: Installation, project: Path) -> None:
    files = DaemonFiles(own.home)
    files.lock()  # as a daemon that does not get on
    with terminal(own, project, "ps") as screen:
        screen.read_until("Starting spellq")
        screen.type(b"\x03")
        screen.rest()
        assert screen.process.wait(10) == 130
        assert "Traceback" not in screen.said
    files.unlock()


def test_a_terminal_that_can_do_little_gets_every_line(shared: Installation, project: Path) -> None:
    with terminal(shared, project, "run", "true", TERM="dumb") as screen:
        told = screen.rest()
        assert screen.process.wait() == 0
    assert "\x1b" not in told
    assert "✨ Run is saving" in screen.lines


def test_events_of_a_run_that_is_none(shared: Installation, project: Path) -> None:
    for option, what in (("--run", "run"), ("--workflow", "workflow")):
        told = shared.spellq("events", option, "99999", cwd=project)
        assert (told.returncode, told.stderr) == (1, f"ERROR: There is no {what} 99999.\n")
