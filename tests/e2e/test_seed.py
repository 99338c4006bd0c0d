"""What Spell's users have: the seed's script, unmodified, and the words they know."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import SCRIPTS, Installation


@pytest.fixture
def with_script(project: Path) -> Path:
    shutil.copy(SCRIPTS / "simple.py", project)
    return project


@pytest.mark.parametrize("words", [["workflow"], ["workflow", "create"]])
@pytest.mark.parametrize("name", ["spellq", "spell"])
def test_the_seeds_workflow(
    own: Installation, with_script: Path, words: list[str], name: str
) -> None:
    told = own.spellq(*words, "python simple.py", cwd=with_script, name=name)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert "💫 Casting workflow #1…" in lines
    assert "✨ Following workflow at run 1." in lines
    assert "✨ Stop viewing logs with ^C" in lines
    assert "✨ Run is running" in lines
    assert any(line.startswith("Workflow(id=1, managing_run=Run(id=1, ") for line in lines)
    assert "Finished workflow!" in lines
    assert any(re.fullmatch(r"🎉 Total run time: \d+(\.\d+)?s", line) for line in lines)
    assert "🎉 Run 1 complete" in lines
    log = own.spellq("logs", "3", name=name)
    assert log.returncode == 0
    assert log.stdout.splitlines()[:6] == [
        "✨ Run created -- waiting for a CPU machine.",
        "✨ Run is building",
        "✨ Run is mounting",
        "✨ Run is running",
        "Hello World!",
        "✨ Run is saving",
    ]
    assert log.stdout.splitlines()[-1] == "🎉 Run 3 complete"


def test_the_script_by_hand_starts_the_daemon(own: Installation, with_script: Path) -> None:
    told = own.python("simple.py", with_script)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == ["None", "Finished workflow!"]
    again = own.python("simple.py", with_script)
    assert again.returncode == 0, again.stderr
    listed = own.spellq("ps").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["ID", "1", "2", "3", "4"]


def test_a_workflow_starts_in_the_subfolder_it_was_launched_from(
    shared: Installation, with_script: Path
) -> None:
    subprocess.run(["git", "init", "-q"], cwd=with_script, check=True)
    deep = with_script / "flows" / "first"
    deep.mkdir(parents=True)
    (deep / "main.py").write_text("import os; print(os.getcwd(), sorted(os.listdir('/spell')))")
    told = shared.spellq("workflow", "python main.py", cwd=deep)
    assert told.returncode == 0, told.stderr
    assert "/spell/flows/first ['flows', 'simple.py']" in told.stdout.splitlines()


def test_worker_runs_get_code_only_from_the_command_line(
    shared: Installation, with_script: Path
) -> None:
    (with_script / "bare.py").write_text(
        "import spell.client\n"
        "client = spell.client.from_environment()\n"
        "run = client.runs.new(command='ls -A /spell | wc -l')\n"
        "run.wait_status(*client.runs.FINAL)\n"
        "print(*(e.log for e in run.logs() if e.status == 'running' and not e.status_event))\n"
    )
    told = shared.spellq("workflow", "python bare.py", cwd=with_script)
    assert "0" in told.stdout.splitlines()
    told = shared.spellq("run", "ls -A /spell | wc -l", cwd=with_script)
    assert "2" in told.stdout.splitlines()


def test_exit_codes_of_the_command_line(shared: Installation, project: Path) -> None:
    assert shared.spellq("run", "exit 66", cwd=project).returncode == 66
    assert shared.spellq("run", "-b", "exit 66", cwd=project).returncode == 0
    assert shared.spellq("run", "-m", "runs/1:/a:/b", "true", cwd=project).returncode == 3
    assert shared.spellq("run", "--no-such-option", "true", cwd=project).returncode == 2
    assert shared.spellq("logs", "999999").returncode == 1
