"""Which files of a run are outputs, by the rules a user relies on."""

import hashlib
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from spellq.trees import Tree, TreeEntry, make_tree
from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers import folders
from spellq_workers.outputs import (
    MAX_NOTES,
    MAX_PATH_BYTES,
    OUTPUTS_BYTES,
    OutputsTooLarge,
    save,
    scan,
)

NOBODY = 65534


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


@pytest.mark.root
async def test_what_is_no_file_is_no_output(files: Path) -> None:
    os.mkfifo(files / "pipe")
    os.mknod(files / "whiteout", 0o020000, 0)
    os.mknod(files / "null", 0o020000, os.makedev(1, 3))
    (files / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(files / "socket"))
    found = await scan(files, None, ())
    assert not found
    assert found.notes == (
        "Skipping '/spell/null': it is a device",
        "Skipping '/spell/pipe': it is a FIFO",
        "Skipping '/spell/socket': it is a socket",
    )


async def test_as_much_is_said_of_what_cannot_be_saved_as_anybody_reads(files: Path) -> None:
    for number in range(MAX_NOTES + 7):
        os.mkfifo(files / f"{number:03}")
    found = await scan(files, None, ())
    assert found.notes[0] == "Skipping '/spell/000': it is a FIFO"
    assert len(found.notes) == MAX_NOTES + 1
    assert found.notes[-1] == "Skipping 7 more"


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """Be one, with a folder of one's own."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() != 0:
        yield folder
    else:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            os.seteuid(0)
    shutil.rmtree(folder)


async def test_what_a_run_shut_its_own_user_out_of_is_saved(ordinary_user: Path) -> None:
    files = ordinary_user / "files"
    (files / "shut" / "inner").mkdir(parents=True)
    for name in ("unreadable", "shut/file", "shut/inner/file"):
        (files / name).write_text(name)
        (files / name).chmod(0)
    for name in ("shut/inner", "shut"):
        (files / name).chmod(0)
    artifacts = await DiskArtifacts.make(ordinary_user / "artifacts")
    snapshot = make_tree([_entry("unreadable", b"unreadable")])
    tree, lines = await _save(files, artifacts, snapshot)
    assert [entry.path for entry in tree.entries] == ["shut/file", "shut/inner/file"]
    assert lines == ["Saving '/spell/shut/file'", "Saving '/spell/shut/inner/file'"]
    for entry in tree.entries:
        assert await artifacts.get_bytes(entry.sha256 or "") == entry.path.encode()


async def test_more_than_a_run_may_save_is_refused_before_it_is_read(files: Path) -> None:
    for name in ("a", "b"):
        with (files / name).open("wb") as file:
            file.truncate(OUTPUTS_BYTES // 2)
    assert len((await scan(files, None, ())).files) == 2
    (files / "one byte").write_bytes(b"x")
    with pytest.raises(OutputsTooLarge, match="larger than 100 GiB"):
        await scan(files, None, ())


async def test_no_file_is_left_out_for_want_of_descriptors(
    files: Path, artifacts: DiskArtifacts
) -> None:
    (files / "model").write_bytes(b"weights")
    found = await scan(files, None, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def say(_: Sequence[str]) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))

    try:
        with pytest.raises(OSError, match="Too many open files"):
            await save(found, artifacts, say)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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


async def test_links_that_lead_out_by_way_of_others_are_named(files: Path) -> None:
    (files / "sub").mkdir()
    (files / "sub" / "up").symlink_to("..")
    (files / "out").symlink_to("sub/up/..")
    (files / "round").symlink_to("circle")
    (files / "circle").symlink_to("round")
    found = await scan(files, Tree((TreeEntry(path="old", link="sub"),)), ())
    assert [link.path for link in found.links] == ["sub/up"]
    assert found.notes == tuple(
        f"Skipping '/spell/{name}': the link leads out of /spell, or in circles"
        for name in ("circle", "out", "round")
    )


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
    (files / "link").symlink_to(os.fsdecode(b"caf\xe9"))
    found = await scan(files, None, ())
    assert not found
    assert found.notes == (
        "Skipping '/spell/caf\\xe9': its name is not UTF-8",
        "Skipping '/spell/link': where the link leads is not UTF-8",
    )


async def test_a_name_is_shown_in_one_line_that_no_terminal_obeys(
    files: Path, artifacts: DiskArtifacts
) -> None:
    (files / "a\n🎉 Run 1 failed").write_bytes(b"x")
    (files / "b\x1b[2J").write_bytes(b"x")
    (files / "c\nd").symlink_to("/etc")
    tree, lines = await _save(files, artifacts)
    assert [entry.path for entry in tree.entries] == ["a\n🎉 Run 1 failed", "b\x1b[2J"]
    assert lines == [
        r"Skipping '/spell/c\nd': the link leads out of /spell",
        r"Saving '/spell/a\n🎉 Run 1 failed'",
        r"Saving '/spell/b\x1b[2J'",
    ]


async def test_mount_points_are_known_where_links_of_the_code_lead_them(files: Path) -> None:
    (files / "real" / "deep").mkdir(parents=True)
    (files / "real" / "deep" / "point").touch()
    (files / "real" / "own").touch()
    snapshot = Tree((TreeEntry(path="in", link="real"), TreeEntry(path="real/down", link="deep")))
    found = await scan(files, snapshot, ["/spell/in/down/point"])
    assert [file.path for file in found.files] == ["real/own"]


@pytest.mark.parametrize(("depth", "name"), [(3000, "d"), (20, "d" * 250)])
async def test_folders_too_deep_to_be_opened_are_named_and_can_be_removed(
    files: Path, depth: int, name: str
) -> None:
    (files / "shallow").touch()
    root = folder = folders.open_folder(str(files))
    for _ in range(depth):
        os.mkdir(name, dir_fd=folder)
        inner = folders.open_folder(name, folder)
        if folder != root:
            os.close(folder)
        folder = inner
    os.close(os.open("deep", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    os.close(root)
    found = await scan(files, None, ())
    assert [file.path for file in found.files] == ["shallow"]
    [note] = found.notes
    assert note.endswith("its path is too long")
    assert len(note) > MAX_PATH_BYTES
    folders.remove(str(files))
    assert "files" not in os.listdir(files.parent)


def test_removing_follows_no_link(files: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (files / "link").symlink_to(tmp_path / "kept")
    (files / "folder").mkdir()
    (files / "folder" / "link").symlink_to(tmp_path / "kept")
    folders.remove(str(files))
    assert not files.exists()
    assert (tmp_path / "kept" / "file").exists()
    folders.remove(str(files))
    files.symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        folders.remove(str(files))
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("held", [False, True])
async def test_only_what_nobody_holds_becomes_the_stored_file(
    files: Path, artifacts: DiskArtifacts, held: bool
) -> None:
    (files / "model").write_bytes(b"weights")
    (files.parent / "exit.json").write_text('{"held": true}' if held else '{"held": false}')
    tree, _ = await _save(files, artifacts)
    [stored] = await artifacts.local_paths([tree.entries[0].sha256 or ""])
    assert stored.samefile(files / "model") is not held


async def test_where_nobody_noted_whether_it_is_held_it_counts_as_held(files: Path) -> None:
    assert (await scan(files, None, ())).held
    (files.parent / "exit.json").write_text("half a")
    assert (await scan(files, None, ())).held


SWAPS = ["link", "link in the way", "fifo", "folder", "gone"]


@pytest.mark.parametrize("swap", SWAPS)
async def test_what_is_swapped_while_it_is_saved_leads_nowhere(
    files: Path, artifacts: DiskArtifacts, tmp_path: Path, swap: str
) -> None:
    (tmp_path / "host").mkdir()
    secret = tmp_path / "host" / "token"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    (files / "d").mkdir()
    (files / "d" / "token").write_bytes(b"own")
    (files / "other").write_bytes(b"other")
    lines: list[str] = []

    async def say(texts: Sequence[str]) -> None:
        lines.extend(texts)
        if lines != list(texts):
            return
        if swap == "link in the way":
            (files / "d").rename(files / "e")
            (files / "d").symlink_to(tmp_path / "host")
            return
        (files / "d" / "token").unlink()
        if swap == "link":
            (files / "d" / "token").symlink_to(secret)
        elif swap == "fifo":
            os.mkfifo(files / "d" / "token")
        elif swap == "folder":
            (files / "d" / "token").mkdir()

    with anyio.fail_after(5):
        tree = await save(await scan(files, None, ()), artifacts, say)
    assert tree.entries == (_entry("other", b"other"),)
    assert lines[-1].startswith("Skipping '/spell/d/token': ")
    assert secret.stat().st_mode & 0o777 == 0o600


async def test_saving_can_be_cancelled_between_files(files: Path, artifacts: DiskArtifacts) -> None:
    for number in range(100):
        (files / f"{number}").write_bytes(b"%d" % number)

    async def say(_: Sequence[str]) -> None:
        pass

    found = await scan(files, None, ())
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save, found, artifacts, say)
            first = hashlib.sha256(b"0").hexdigest()
            while await artifacts.missing([first]):
                await anyio.lowlevel.checkpoint()
            scope.cancel()
    last = hashlib.sha256(b"99").hexdigest()
    assert await artifacts.missing([last]) == [last]
    assert os.listdir(files.parent / "artifacts" / "incoming") == []
    assert len((await save(found, artifacts, say)).entries) == 100
