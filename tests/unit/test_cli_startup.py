"""How the command starts: at once, under the name it was called by, and quietly in a pipe."""

import os
import subprocess
import sys

import pytest

from spellq import __version__
from spellq.cli.app import COMMANDS

HEAVY = ("aiohttp", "anyio", "asyncio", "litestar", "pathspec", "rich", "ssl", "uvicorn")

LOADED = """
import sys
from spellq.cli.app import run
code = run(sys.argv[1:], "spellq")
print(code, [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = python("-c", LOADED.format(heavy=HEAVY), *arguments)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_as_a_module() -> None:
    done = python("-m", "spellq.cli", "--version")
    assert (done.returncode, done.stdout) == (0, f"spellq {__version__}\n")


def test_under_its_other_name() -> None:
    code = "import sys; sys.argv = ['/bin/spell', '--version']\n"
    done = python("-c", code + "from spellq.cli.__main__ import main; main()")
    assert done.stdout == f"spell {__version__}\n"


def test_without_arguments_the_help() -> None:
    done = python("-m", "spellq.cli")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: spellq [OPTIONS] COMMAND")


def test_a_reader_that_left_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "spellq.cli", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=50)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
