"""The snapshot of code, with real git repositories and folders."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread
import pytest

from spellq.sizes import human_size
from spellq.trees import Tree, decode_tree, encode_tree
from spellq_sdk.exceptions import BadRequest
from spellq_sdk.sending import upload
from spellq_sdk.snapshot import Snapshot, SnapshotError, take_snapshot


@pytest.fixture(autouse=True)
def _git_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "ada@example.org")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "-q")
    write(root, {"train.py": "print(1)\n", "lib/net.py": "x = 1\n", ".gitignore": "*.log\n"})
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Add the training")
    return root


def paths(snapshot: Snapshot) -> list[str]:
    return [entry.path for entry in snapshot.tree.entries]


def content(snapshot: Snapshot, path: str) -> str:
    entry = snapshot.tree.entry(path)
    assert entry is not None
    assert entry.sha256 is not None
    data = snapshot.files[entry.sha256].read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.sha256
    assert len(data) == entry.size
    return data.decode()


def test_a_clean_repository(repository: Path) -> None:
    snapshot = take_snapshot(repository / "lib")
    assert paths(snapshot) == [".gitignore", "lib/net.py", "train.py"]
    assert (snapshot.root, snapshot.subfolder) == (repository, "lib")
    assert snapshot.repository == "project"
    assert snapshot.commit_hash == git(repository, "rev-parse", "HEAD")
    assert snapshot.description == "Add the training"
    assert not snapshot.dirty
    assert snapshot.untracked == 0
    assert decode_tree(encode_tree(snapshot.tree)[1]) == snapshot.tree


def test_uncommitted_changes_are_included(repository: Path) -> None:
    write(repository, {"train.py": "print(2)\n", "staged.py": "s\n"})
    git(repository, "add", "staged.py")
    (repository / "lib/net.py").unlink()
    snapshot = take_snapshot(repository)
    assert paths(snapshot) == [".gitignore", "staged.py", "train.py"]
    assert content(snapshot, "train.py") == "print(2)\n"
    assert snapshot.dirty


def test_a_touched_file_is_no_change(repository: Path) -> None:
    os.utime(repository / "train.py", (1, 1))
    assert not take_snapshot(repository).dirty


def test_untracked_files_are_counted_and_can_be_left_out(repository: Path) -> None:
    write(repository, {"new.py": "n", "data/a.txt": "a", "noise.log": "ignored"})
    snapshot = take_snapshot(repository)
    assert {"new.py", "data/a.txt"} < set(paths(snapshot))
    assert "noise.log" not in paths(snapshot)
    assert snapshot.untracked == 2
    assert not snapshot.dirty
    without = take_snapshot(repository, untracked=False)
    assert without.untracked == 0
    assert "new.py" not in paths(without)


def test_a_repository_without_commits(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(tmp_path, {"a.py": "a", "b.py": "b"})
    git(tmp_path, "add", "a.py")
    snapshot = take_snapshot(tmp_path)
    assert paths(snapshot) == ["a.py", "b.py"]
    assert (snapshot.commit_hash, snapshot.description) == ("", "")
    assert snapshot.dirty


def test_taking_one_changes_nothing_in_git(repository: Path) -> None:
    write(repository, {"train.py": "stashed\n"})
    git(repository, "stash")
    write(repository, {"train.py": "print(3)\n", "new.py": "n", "staged.py": "s"})
    git(repository, "add", "staged.py")
    os.utime(repository / "lib/net.py", (1, 1))  # makes git want to refresh its index

    def state() -> dict[str, tuple[int, bytes]]:
        files = (path for path in (repository / ".git").rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    take_snapshot(repository)
    assert state() == before


def test_links_stay_links_when_they_stay_inside(repository: Path) -> None:
    (repository / "inside").symlink_to("lib/net.py")
    (repository / "folder").symlink_to("lib")
    (repository / "outside").symlink_to("/etc/passwd")
    (repository / "lib/up").symlink_to("../../elsewhere")
    git(repository, "add", "-A")
    snapshot = take_snapshot(repository)
    links = {entry.path: entry.link for entry in snapshot.tree.entries if entry.link}
    assert links == {"inside": "lib/net.py", "folder": "lib"}
    assert [warning.split(" is ")[0] for warning in snapshot.warnings] == [
        "The link lib/up",
        "The link outside",
    ]


def test_a_folder_that_became_a_link(repository: Path, tmp_path: Path) -> None:
    (repository / "lib").rename(repository / "renamed")
    (repository / "lib").symlink_to("renamed")
    snapshot = take_snapshot(repository)
    assert paths(snapshot) == [".gitignore", "lib", "renamed/net.py", "train.py"]


def test_executable_bits(repository: Path) -> None:
    (repository / "train.py").chmod(0o755)
    entries = {entry.path: entry.executable for entry in take_snapshot(repository).tree.entries}
    assert entries == {".gitignore": False, "lib/net.py": False, "train.py": True}


def test_what_cannot_be_shipped_is_skipped_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "a"})
    os.mkfifo(tmp_path / "pipe")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py")).write_text("x")
    snapshot = take_snapshot(tmp_path)
    assert paths(snapshot) == ["a.py"]
    assert sorted(snapshot.warnings) == [
        "\\xff.py is left out: its name is not UTF-8.",
        "pipe is left out: it is neither a file nor a folder nor a link.",
    ]


def test_submodules_and_nested_repositories_are_left_out(repository: Path) -> None:
    for name in ("module", "nested"):
        git(repository, "init", "-q", name)
        write(repository / name, {"m.py": "m"})
        git(repository / name, "add", "-A")
        git(repository / name, "commit", "-q", "-m", "m")
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "module")
    snapshot = take_snapshot(repository)
    assert paths(snapshot) == [".gitignore", "lib/net.py", "train.py"]
    assert set(snapshot.warnings) == {
        "The submodule module is left out.",
        "nested/ is a git repository of its own and is left out.",
    }


def test_an_unmerged_file_ships_once(repository: Path) -> None:
    git(repository, "checkout", "-q", "-b", "other")
    write(repository, {"train.py": "theirs\n"})
    git(repository, "commit", "-q", "-am", "theirs")
    git(repository, "checkout", "-q", "-")
    write(repository, {"train.py": "ours\n"})
    git(repository, "commit", "-q", "-am", "ours")
    merge = subprocess.run(["git", "merge", "other"], cwd=repository, capture_output=True)
    assert merge.returncode == 1
    assert paths(take_snapshot(repository)).count("train.py") == 1


def test_a_folder_outside_git(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.py": "a",
            ".env": "e",
            "data/big.bin": "b",
            "data/keep.txt": "k",
            "build/x": "x",
            "home/token": "t",
            "sub/.git/HEAD": "h",
            "sub/b.py": "b",
            ".spellqignore": "*.bin\nbuild/\n",
        },
    )
    snapshot = take_snapshot(tmp_path, home=tmp_path / "home")
    assert paths(snapshot) == [".env", ".spellqignore", "a.py", "data/keep.txt", "sub/b.py"]
    assert (snapshot.subfolder, snapshot.commit_hash, snapshot.dirty) == ("", "", False)


def test_spellqignore_holds_in_a_repository_too(repository: Path) -> None:
    write(repository, {".spellqignore": "lib/\n.spellqignore\n"})
    snapshot = take_snapshot(repository)
    assert paths(snapshot) == [".gitignore", "train.py"]
    assert snapshot.untracked == 0


def test_too_large_names_the_size_the_largest_and_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "a", "data/deep/big.bin": "b" * 4096, "many/1": "x" * 600})
    write(tmp_path, {"many/2": "x" * 600})
    with pytest.raises(SnapshotError) as caught:
        take_snapshot(tmp_path, limit=2048)
    assert str(caught.value) == (
        f"The code in {tmp_path} has 5.2 KiB; the limit is 2 KiB. The largest entries: "
        "data/deep/big.bin (4 KiB), many/ (1.2 KiB), a.py (1 B). Name what runs do not need in "
        ".spellqignore or, where it is untracked, in .gitignore."
    )


def test_a_home_folder_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SnapshotError, match="is your home folder"):
        take_snapshot(tmp_path)
    git(tmp_path, "init", "-q")
    assert not take_snapshot(tmp_path).plain


def test_an_ignore_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ".spellqignore").write_bytes(b"caf\xe9\n")
    with pytest.raises(SnapshotError, match="spellqignore is not UTF-8"):
        take_snapshot(tmp_path)
    (tmp_path / ".spellqignore").unlink()
    (tmp_path / ".spellqignore").mkdir()
    with pytest.raises(SnapshotError, match=r"spellqignore cannot be read: Is a directory\."):
        take_snapshot(tmp_path)


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    os.mkfifo(tmp_path / "p\nq")
    assert sorted(take_snapshot(tmp_path).warnings) == [
        "caf\\xe9 is left out: its name is not UTF-8.",
        "p\\nq is left out: it is neither a file nor a folder nor a link.",
    ]


def test_a_broken_repository_is_an_error_and_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    with pytest.raises(SnapshotError, match="not a git repository"):
        take_snapshot(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert paths(take_snapshot(tmp_path)) == []


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5120 GiB")]
)
def test_human_size(size: int, text: str) -> None:
    assert human_size(size) == text


class Shelf:
    """Storage in memory that keeps the gateway's rules."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.trees: list[Tree] = []
        self.questions: list[int] = []
        self.batches: list[int] = []
        self.sending = 0
        self.most_at_once = 0

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        self.questions.append(len(hashes))
        return [sha256 for sha256 in hashes if sha256 not in self.contents]

    async def upload(self, sha256: str, source: Path) -> None:
        self.sending += 1
        self.most_at_once = max(self.most_at_once, self.sending)
        data = await anyio.to_thread.run_sync(source.read_bytes)
        self.sending -= 1
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BadRequest("Nothing was stored: it has another hash.")
        self.contents[sha256] = data

    async def upload_batch(self, contents: Sequence[bytes]) -> list[str]:
        self.batches.append(len(contents))
        hashes = [hashlib.sha256(content).hexdigest() for content in contents]
        self.contents |= zip(hashes, contents, strict=True)
        return hashes

    async def create_tree(self, tree: Tree) -> str:
        assert {entry.sha256 for entry in tree.entries if entry.sha256} <= set(self.contents)
        self.trees.append(tree)
        return encode_tree(tree)[0]


async def taken(folder: Path) -> Snapshot:
    return await anyio.to_thread.run_sync(take_snapshot, folder)


async def test_small_files_travel_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spellq_sdk.sending.BATCH_FILES", 10)
    monkeypatch.setattr("spellq_sdk.sending.BATCH_BYTES", 100_000)
    write(tmp_path, {f"{name:02}.py": f"{name}" for name in range(25)})
    write(tmp_path, {"just.bin": "x" * 65_536, "large.bin": "x" * 65_537})
    shelf, told = Shelf(), list[tuple[int, int]]()
    snapshot = await taken(tmp_path)
    await upload(snapshot, shelf, lambda done, total: told.append((done, total)))
    assert sorted(shelf.batches) == [6, 10, 10]
    assert (shelf.most_at_once, max(told)) == (1, (27, 27))


async def test_only_what_is_missing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.sending.SMALL_BYTES", 0)
    write(tmp_path, {f"{name:02}.py": f"{name}" for name in range(40)})
    write(tmp_path, {"twin.py": "7"})
    shelf, told = Shelf(), list[tuple[int, int]]()
    first = await taken(tmp_path)
    tree = await upload(first, shelf, lambda done, total: told.append((done, total)))
    assert tree == encode_tree(first.tree)[0]
    assert told == [(done, 40) for done in range(1, 41)]
    assert shelf.most_at_once == 8
    write(tmp_path, {"new.py": "new"})
    told.clear()
    await upload(await taken(tmp_path), shelf, lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]


async def test_hashes_are_asked_for_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.sending.HASHES_A_QUESTION", 3)
    write(tmp_path, {f"{name}.py": f"{name}" for name in range(7)})
    shelf = Shelf()
    await upload(await taken(tmp_path), shelf)
    assert shelf.questions == [3, 3, 1]


async def test_a_small_file_that_changed_meanwhile_goes_as_it_is_now(tmp_path: Path) -> None:
    write(tmp_path, {"a.log": "before", "b.py": "b"})
    snapshot = await taken(tmp_path)
    write(tmp_path, {"a.log": "before and after"})
    shelf = Shelf()
    await upload(snapshot, shelf)
    entry = shelf.trees[-1].entry("a.log")
    assert entry is not None
    assert (entry.size, entry.sha256) == (16, hashlib.sha256(b"before and after").hexdigest())


@pytest.mark.parametrize("change", ["large", "gone", "twin"])
async def test_what_cannot_be_sent_as_it_is_now_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    write(tmp_path, {"a.py": "before", "b.py": "before" if change == "twin" else "b"})
    snapshot = await taken(tmp_path)
    if change == "large":
        monkeypatch.setattr("spellq_sdk.sending.SMALL_BYTES", 0)
    for name in ("a.py", "b.py") if change == "gone" else ("b.py", "a.py"):
        if change == "gone":
            (tmp_path / name).unlink()
        elif snapshot.files[snapshot.tree.entries[0].sha256 or ""] == tmp_path / name:
            (tmp_path / name).write_text("after!")
    with pytest.raises(SnapshotError, match=r"[ab]\.py changed while the code was being sent"):
        await upload(snapshot, Shelf())


async def test_an_empty_snapshot_is_a_tree_too(tmp_path: Path) -> None:
    snapshot = await taken(tmp_path)
    assert await upload(snapshot, Shelf()) == encode_tree(Tree(()))[0]
