"""What the command line makes of its arguments, and how it says no."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from spellq.cli import workflow as workflow_module
from spellq.cli.app import COMMANDS, root, run
from spellq.cli.options import (
    later_workflow_options,
    launch_options,
    run_options,
    shell_command,
)


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SPELLQ_URL", "SPELLQ_TOKEN", "SPELL_BASE_URL", "SPELL_TOKEN", "SPELL_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPELLQ_HOME", str(tmp_path / "home"))


def parsed(*arguments: str) -> dict[str, Any]:
    """What `spellq run` would be called with."""
    found: dict[str, Any] = {}

    @click.command()
    @launch_options
    @run_options
    def command(**options: Any) -> None:
        found.update(options)

    command.main(list(arguments), standalone_mode=False)
    return found


def test_a_whole_run() -> None:
    options = parsed(
        "-t", "T4", "-m", "runs/1/data/:/mnt/data", "-m", "runs/2", "-e", "A=b=c", "-e", "EMPTY",
        "--label", "x", "--label", "y", "--timeout", "1.5", "--grace", "0", "-d", "words", "-b",
        "-o", "json", "--no-untracked", "python", "train.py",
    )  # fmt: skip
    assert shell_command(options["command"]) == "python train.py"
    assert options["machine_type"] == "T4"
    assert options["mounts"] == {"runs/1/data/": "/mnt/data", "runs/2": ""}
    assert options["environment"] == {"A": "b=c", "EMPTY": ""}
    assert options["labels"] == ("x", "y")
    assert (options["timeout"], options["grace"]) == (1.5, 0)
    assert options["description"] == "words"
    assert options["background"]
    assert options["as_json"]
    assert options["no_untracked"]


def test_the_rest_after_two_dashes_is_the_command() -> None:
    options = parsed("-b", "--", "python", "x.py", "-v", "--epochs", "3")
    assert shell_command(options["command"]) == "python x.py -v --epochs 3"
    assert not options["verbose"]


def test_the_defaults() -> None:
    options = parsed("true")
    assert options["machine_type"] == "CPU"
    assert options["description"] is None
    assert (options["timeout"], options["grace"], options["mounts"]) == (None, None, {})


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that `workflow create` is called with."""
    commands: list[tuple[str, ...]] = []

    @click.command()
    @launch_options
    @later_workflow_options
    def create(command: tuple[str, ...], **_: Any) -> None:
        commands.append(command)

    monkeypatch.setitem(workflow_module.workflow.commands, "create", create)
    return commands


@pytest.mark.parametrize(
    "arguments",
    [
        ["python simple.py"],
        ["create", "python simple.py"],
        ["-b", "-e", "A=b", "python simple.py"],
        ["create", "-v", "python simple.py"],
    ],
)
def test_workflow_takes_a_command_or_a_subcommand(
    created: list[tuple[str, ...]], arguments: list[str]
) -> None:
    assert run(["workflow", *arguments], "spell") == 0
    assert created == [("python simple.py",)]


def test_workflow_words_are_the_command(created: list[tuple[str, ...]]) -> None:
    assert run(["workflow", "python", "stop", "14"], "spell") == 0
    assert created == [("python", "stop", "14")]


def test_a_known_subcommand_wins(
    created: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["workflow", "stop", "fourteen"], "spell") == 2
    assert created == []
    assert "WORKFLOW is 'fourteen'; it has to be a workflow's number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "-m", "runs/1:a:b", "true"], 3, "Invalid mount 'runs/1:a:b'"),
        (["run", "--grace", "x", "true"], 2, "'--grace': 'x' is not a valid number."),
        (["stop", "--grace", "-1", "12"], 2, "'--grace': -1.0 is not in the range x>=0."),
        (["run", "-m", "upload/x", "true"], 3, "not a valid resource"),
        (["run", "-m", "runs/1:/proc/x", "true"], 3, "belongs to the run itself"),
        (["run"], 2, "Missing argument 'COMMAND...'. See 'spellq run --help'."),
        (["run", " "], 2, "The command is empty. See 'spellq run --help'."),
        (["run", "--pip", "numpy", "true"], 2, "--pip is not there yet"),
        (["run", "--from", "image", "true"], 2, "is not there yet"),
        (["run", "--auto-resume", "true"], 2, "--auto-resume is not there yet"),
        (["workflow", "create", "--repo", "a=b", "true"], 2, "--repo is not there yet"),
        (["workflow", "--local", "true"], 2, "--local is not there yet"),
        (["run", "-c", "HEAD~1", "true"], 2, "only HEAD"),
        (["run", "-e", "=x", "true"], 2, "write KEY=VALUE"),
        (["run", "--timeout", "0", "true"], 2, "--timeout"),
        (["run", "--timeout", "nan", "true"], 2, "not a finite number"),
        (["run", "-o", "json", "true"], 2, "-o json needs -b"),
        (["run", "--bogus", "true"], 2, "No such option"),
        (["up", "--machine-types", "cpu=many"], 2, "Invalid number of slots 'many'"),
        (["cp", "/runs/1"], 3, "Name a resource"),
        (["cp", "-f", "-i", "runs/1"], 3, "exclude each other"),
        (["info", "abc"], 2, "RUN is 'abc'; it has to be a run's number, for example 12."),
        (["stop", "1", "0"], 2, "RUN is '0'"),
        (["events", "--run", "-1"], 2, "--run is '-1'"),
        (["events", "--workflow", "x"], 2, "--workflow is 'x'; it has to be a workflow's number"),
        (["down", "--kill", "--stop"], 2, "--stop and --kill exclude each other"),
        (["token"], 1, "There is no token in"),
        (["xyzzy"], 2, "There is no command 'xyzzy'. See 'spellq --help'."),
        (["worflow"], 2, "There is no command 'worflow' (did you mean 'workflow'?)."),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(arguments, "/usr/bin/spellq") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ERROR: ")
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


def test_head_may_be_named() -> None:
    assert parsed("-c", "HEAD", "true")["command"] == ("true",)


def test_half_a_configuration_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPELLQ_URL", "http://127.0.0.1:1")
    assert run(["ps"], "spellq") == 1
    assert capsys.readouterr().err.startswith("ERROR: SPELLQ_URL is set and SPELLQ_TOKEN is not.")


def test_down_without_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["down"], "spellq") == 0
    assert capsys.readouterr().out == "✨ spellq is not running.\n"


def test_a_folder_that_was_deleted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["run", "true"], "spellq") == 1
    assert "The current folder has been deleted" in capsys.readouterr().err


def test_the_short_help_of_workflow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["workflow", "-h"], "spellq") == 0
    assert "Run a workflow script" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "daemon"])
def test_every_command_has_help_with_an_example(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run([name, "--help"], "spellq") == 0
    assert f"Example: {'curl' if name == 'token' else f'spellq {name}'}" in capsys.readouterr().out


def test_the_daemon_is_not_listed() -> None:
    assert "  daemon" not in root.get_help(click.Context(root, info_name="spellq"))


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (click.Abort(), 1, "Aborted!\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (RuntimeError("oh"), 1, "ERROR: Fatal exception: RuntimeError: oh. "),
        (PermissionError(13, "Permission denied", "/x"), 1, "ERROR: /x: Permission denied\n"),
        (ExceptionGroup("", [RuntimeError("in")]), 1, "ERROR: Fatal exception: RuntimeError: in"),
    ],
)
def test_how_exceptions_end(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    from spellq.cli import doctor

    monkeypatch.setattr(doctor, "doctor", click.Command("doctor", callback=raising(error)))
    assert run(["doctor"], "spellq") == code
    assert capsys.readouterr().err.startswith(said)
