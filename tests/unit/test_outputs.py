"""Which files of a run are outputs, by the rules a user relies on."""

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from spellq.trees import Tree, TreeEntry, make_tree
from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers.outputs import save, scan


def _entry(path: str, content: bytes, *, executable: bool = False) -> TreeEntry:
    sha256 = hashlib.sha256(content).hexdigest()
    return TreeEntry(path=path, size=len(content), sha256=sha256, executable=executable)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
async def artifacts(tmp_path: Path) -> DiskArtifacts:
    return await DiskArtifacts.make(tmp_path / "artifacts")


async def _save(
    files: Path, artifacts: DiskArtifacts, snapshot: Tree | None = None, targets: Sequence[str] = ()
) -> tuple[Tree, list[str]]:
    lines: list[str] = []

    async def say(texts: Sequence[str]) -> None:
        lines.extend(texts)

    found = await scan(files, snapshot, targets)
    lines.extend(found.notes)
    return await save(found, artifacts, say), lines


async def test_new_files_are_saved_under_their_paths(files: Path, artifacts: DiskArtifacts) -> None:
    (files / "results").mkdir()
    (files / "results" / "model.bin").write_bytes(b"weights")
    (files / ".config").write_bytes(b"hidden")
    tree, lines = await _save(files, artifacts)
    assert tree.entries == (_entry(".config", b"hidden"), _entry("results/model.bin", b"weights"))
    assert lines == ["Saving '/spell/.config'", "Saving '/spell/results/model.bin'"]
    assert await artifacts.get_bytes(tree.entries[1].sha256 or "") == b"weights"


async def test_touched_and_rewritten_code_is_no_output(files: Path) -> None:
    snapshot = make_tree([_entry("train.py", b"code"), _entry("run.sh", b"x")])
    (files / "train.py").write_bytes(b"code")
    (files / "run.sh").write_bytes(b"x")
    assert not await scan(files, snapshot, ())


async def test_changed_code_is_an_output(files: Path) -> None:
    names = ["content", "mode", "size"]
    snapshot = make_tree([_entry(name, b"abc") for name in names])
    (files / "content").write_bytes(b"abd")
    (files / "mode").write_bytes(b"abc")
    (files / "mode").chmod(0o755)
    (files / "size").write_bytes(b"abcd")
    found = await scan(files, snapshot, ())
    assert [(file.path, file.executable) for file in found.files] == [
        ("content", False),
        ("mode", True),
        ("size", False),
    ]


async def test_what_is_no_file_is_no_output(files: Path) -> None:
    os.mkfifo(files / "pipe")
    os.mknod(files / "whiteout", 0o020000, 0)
    (files / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(files / "socket"))
    assert not await scan(files, None, ())


async def test_links_within_the_run_are_saved_and_others_named(
    files: Path, artifacts: DiskArtifacts
) -> None:
    (files / "runs").mkdir()
    (files / "runs" / "latest").symlink_to("7")
    (files / "runs" / "best").symlink_to("/spell/models/a")
    (files / "outside").symlink_to("/etc/passwd")
    (files / "above").symlink_to("../x")
    tree, lines = await _save(files, artifacts)
    assert [(entry.path, entry.link) for entry in tree.entries] == [
        ("runs/best", "../models/a"),
        ("runs/latest", "7"),
    ]
    assert lines[:2] == [
        "Skipping '/spell/above': the link leads out of /spell",
        "Skipping '/spell/outside': the link leads out of /spell",
    ]


async def test_an_unchanged_link_is_no_output(files: Path) -> None:
    (files / "latest").symlink_to("7")
    snapshot = Tree((TreeEntry(path="latest", link="7"),))
    assert not await scan(files, snapshot, ())


async def test_mount_points_of_the_run_are_no_outputs(files: Path) -> None:
    (files / "data" / "deep").mkdir(parents=True)
    (files / "data" / "deep" / "point").touch()
    (files / "data" / "own").touch()
    found = await scan(files, None, ["/spell/data/deep", "/mnt/x"])
    assert [file.path for file in found.files] == ["data/own"]


async def test_a_name_that_is_not_utf8_is_named_and_skipped(files: Path) -> None:
    (files / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    found = await scan(files, None, ())
    assert not found
    assert found.notes == ("Skipping '/spell/caf\\xe9': its name is not UTF-8",)
