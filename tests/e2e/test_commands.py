"""The commands a user has beside launching: each through the real command line."""

import json
import re
import subprocess
from pathlib import Path

from tests.e2e.conftest import SPELLQ, Installation


def launched(shared: Installation, project: Path, command: str) -> str:
    told = shared.spellq("run", "-b", "-o", "json", command, cwd=project)
    assert told.returncode == 0, told.stderr
    return str(json.loads(told.stdout)["id"])


def test_token_and_doctor(shared: Installation) -> None:
    token = shared.spellq("token").stdout.strip()
    assert re.fullmatch(r"sq_.+_local_[0-9a-f]{64}", token)
    assert json.loads(shared.spellq("token", "-o", "json").stdout)["token"] == token
    told = shared.spellq("doctor")
    assert told.returncode == 0, told.stdout
    assert all(line.startswith("✔ ") for line in told.stdout.splitlines())
    assert any(line.startswith("✔ Daemon: running at ") for line in told.stdout.splitlines())
    checks = json.loads(shared.spellq("doctor", "-o", "json").stdout)
    assert all(check["good"] for check in checks)


def test_labels_from_the_command_line(shared: Installation, project: Path) -> None:
    number = launched(shared, project, "true")
    told = shared.spellq("label", number, "nightly")
    assert told.stdout == f"Successfully added label nightly to run {number}.\n"
    listed = json.loads(shared.spellq("ps", "-l", "nightly", "-o", "json").stdout)
    assert [str(run["id"]) for run in listed] == [number]
    assert shared.spellq("label", number, "nightly", "--remove").returncode == 0
    assert json.loads(shared.spellq("ps", "-l", "nightly", "-o", "json").stdout) == []


def test_stop_and_kill_one_and_many(shared: Installation, project: Path) -> None:
    one, two, three = (launched(shared, project, "sleep 60") for _ in range(3))
    told = shared.spellq("stop", one)
    assert told.stdout.startswith(f"Stopping run {one}.")
    told = shared.spellq("kill", two, three, "999999")
    assert "Executing batch kill" in told.stdout
    assert "999999" in told.stdout + told.stderr
    for number, ending in ((one, r"stopped|killed"), (two, "killed"), (three, "killed")):
        log = shared.spellq("logs", "-f", number).stdout.splitlines()
        assert re.search(rf"Run {number} ({ending})", log[-1])
    again = shared.spellq("kill", two)
    assert again.returncode == 0
    assert "killed" in again.stdout


def test_a_workflow_that_has_ended_is_neither_stopped_nor_killed(
    shared: Installation, project: Path
) -> None:
    told = shared.spellq("workflow", "create", "-b", "-o", "json", "exit 3", cwd=project)
    workflow = json.loads(told.stdout)
    shared.spellq("logs", "-f", str(workflow["managing_run"]["id"]))
    for verb in ("stop", "kill"):
        told = shared.spellq("workflow", verb, str(workflow["id"]))
        assert told.stdout == f"Workflow {workflow['id']} has already finished: complete.\n"


def test_outputs_are_listed_and_copied(shared: Installation, project: Path) -> None:
    number = launched(shared, project, "mkdir d; echo one > d/a.txt; echo two > b.txt")
    shared.spellq("logs", "-f", number)
    rows = json.loads(shared.spellq("ls", f"runs/{number}", "-o", "json").stdout)
    assert sorted(row["path"] for row in rows) == ["b.txt", "d/"]
    assert shared.spellq("cp", f"runs/{number}", "copied", cwd=project).returncode == 0
    assert (project / "copied" / "d" / "a.txt").read_text() == "one\n"
    info = json.loads(shared.spellq("info", number, "-o", "json").stdout)
    assert (info["status"], info["outputs_files"]) == ("complete", 2)


def test_events_are_followed_as_json_lines(shared: Installation, project: Path) -> None:
    number = launched(shared, project, "exit 3")
    following = subprocess.Popen(
        [SPELLQ, "events", "--run", number, "--after", "0", "-o", "json"],
        cwd=project,
        env=shared.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    seen = []
    for line in following.stdout:
        seen.append(json.loads(line)["status"])
        if seen[-1] == "complete":
            break
    following.terminate()
    following.communicate()
    assert seen[0] == "machine_requested"
    assert seen[-3:] == ["saving", "pushing", "complete"]
