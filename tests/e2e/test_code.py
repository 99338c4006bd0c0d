"""The code of a run: what is sent, and that nothing of the user's is touched."""

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import SPELLQ, Installation


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(project: Path) -> Path:
    """A repository with a commit, an uncommitted change, and untracked and ignored files."""
    git(project, "init", "-q")
    (project / "kept.txt").write_text("old\n")
    (project / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (project / "run.sh").chmod(0o755)
    (project / ".gitignore").write_text("ignored\n")
    (project / "sub").mkdir()
    (project / "sub" / "deep.txt").write_text("deep\n")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "First things")
    (project / "kept.txt").write_text("new\n")
    (project / "untracked.txt").write_text("u\n")
    (project / "ignored").write_text("i\n")
    return project


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_uncommitted_and_untracked_files_come_along(shared: Installation, repository: Path) -> None:
    before = state_of(repository)
    told = shared.spellq("run", "cat kept.txt; ls -A; ./run.sh", cwd=repository)
    lines = told.stdout.splitlines()
    assert "✨ Preparing uncommitted changes…" in lines
    assert any("1 untracked file" in line for line in lines)
    assert {"new", "untracked.txt", "sub", "ran"} <= set(lines)
    assert not {"old", "ignored", ".git"} & set(lines)
    assert state_of(repository) == before
    told = shared.spellq("run", "--no-untracked", "ls", cwd=repository)
    assert "untracked.txt" not in told.stdout.splitlines()


def test_a_run_starts_where_it_was_launched_and_saves_only_what_is_new(
    shared: Installation, repository: Path
) -> None:
    command = "pwd; cat deep.txt; cp deep.txt same.txt; echo more >> ../kept.txt; touch deep.txt"
    told = shared.spellq("run", command, cwd=repository / "sub")
    lines = told.stdout.splitlines()
    assert {"/spell/sub", "deep"} <= set(lines)
    number = next(line.split("#")[1].strip("…") for line in lines if "Casting spell" in line)
    assert "Saving '/spell/sub/same.txt'" in lines
    listed = shared.spellq("ls", f"runs/{number}").stdout.split()
    assert "kept.txt" in listed
    assert "sub/" in listed
    assert "run.sh" not in listed
    assert "deep.txt" not in shared.spellq("ls", f"runs/{number}/sub").stdout
    assert (repository / "kept.txt").read_text() == "new\n"


def test_a_plain_folder_and_its_ignore_file(shared: Installation, project: Path) -> None:
    (project / "big.bin").write_bytes(b"x")
    (project / "small.txt").write_text("s")
    (project / ".spellqignore").write_text("*.bin\n")
    told = shared.spellq("run", "ls", cwd=project)
    assert "small.txt" in told.stdout.splitlines()
    assert "big.bin" not in told.stdout.splitlines()


def test_two_runs_write_to_the_same_code_and_see_only_their_own(
    shared: Installation, repository: Path
) -> None:
    command = "echo mine >> kept.txt; cat kept.txt"
    for _ in range(2):
        told = shared.spellq("run", command, cwd=repository)
        assert told.stdout.splitlines().count("mine") == 1


def test_what_the_command_itself_writes_is_no_code(shared: Installation, project: Path) -> None:
    """`spellq run … > out.log` and `| tee tee.log` in the folder that is sent."""
    (project / "kept.txt").write_text("kept\n")
    words = f"{SPELLQ} run ls 2>&1 | tee tee.log > /dev/null; {SPELLQ} run ls > out.log"
    subprocess.run(["sh", "-c", words], cwd=project, env=shared.environment(), check=True)
    listed = (project / "out.log").read_text().splitlines()
    assert {"kept.txt", "tee.log"} <= set(listed)
    assert "out.log" not in listed
    assert "complete" in (project / "tee.log").read_text()


def test_a_home_within_the_project_stays_behind(own: Installation) -> None:
    """Worlds that were made for runs hold folders which an ordinary user cannot read."""
    folder = own.home.parent
    (folder / "a.py").touch()
    for _ in range(2):
        told = own.spellq("run", "ls -A", cwd=folder)
        assert told.returncode == 0, told.stderr
        assert "a.py" in told.stdout.splitlines()
        assert own.home.name not in told.stdout.splitlines()
