"""Stored trees on this machine's disk."""

import os
from pathlib import Path

import anyio
import pytest

from spellq.ports import WorldError
from spellq.trees import TreeEntry, encode_tree, make_tree
from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers.checkouts import Checkouts


@pytest.fixture
async def artifacts(tmp_path: Path) -> DiskArtifacts:
    return await DiskArtifacts.make(tmp_path / "artifacts")


@pytest.fixture
def checkouts(tmp_path: Path, artifacts: DiskArtifacts) -> Checkouts:
    return Checkouts(tmp_path / "checkouts", artifacts)


async def _store(artifacts: DiskArtifacts) -> str:
    entries = [
        TreeEntry(path="a.txt", size=1, sha256=await artifacts.put_bytes(b"a")),
        TreeEntry(path="bin/run", size=1, sha256=await artifacts.put_bytes(b"r"), executable=True),
        TreeEntry(path="bin/latest", link="run"),
    ]
    _, data = encode_tree(make_tree(entries))
    return await artifacts.put_bytes(data)


async def test_a_tree_is_there_with_contents_modes_and_links(
    artifacts: DiskArtifacts, checkouts: Checkouts
) -> None:
    path = await checkouts.path(await _store(artifacts))
    assert (path / "a.txt").read_bytes() == b"a"
    assert (path / "bin/run").stat().st_mode & 0o777 == 0o555
    assert os.readlink(path / "bin/latest") == "run"


async def test_a_mounted_file_shares_its_bytes_with_the_store(
    artifacts: DiskArtifacts, checkouts: Checkouts
) -> None:
    path = await checkouts.path(await _store(artifacts))
    [stored] = await artifacts.local_paths([await artifacts.put_bytes(b"a")])
    assert (path / "a.txt").samefile(stored)


async def test_code_can_be_written_to_without_touching_the_store(
    artifacts: DiskArtifacts, checkouts: Checkouts
) -> None:
    path = await checkouts.code(await _store(artifacts))
    [stored] = await artifacts.local_paths([await artifacts.put_bytes(b"a")])
    assert (path / "a.txt").stat().st_mode & 0o777 == 0o644
    assert not (path / "a.txt").samefile(stored)


@pytest.mark.parametrize(("subpath", "content"), [("a.txt", b"a"), ("bin/latest", b"r")])
async def test_a_single_file_is_given_as_a_file(
    artifacts: DiskArtifacts, checkouts: Checkouts, subpath: str, content: bytes
) -> None:
    path = await checkouts.path(await _store(artifacts), subpath)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("subpath", "content"),
    [
        ("models/latest/model.bin", b"m"),
        ("best/latest/model.bin", b"m"),
        ("models/latest", None),
        ("best/7/../8", None),
    ],
)
async def test_every_part_of_a_path_may_be_a_link(
    artifacts: DiskArtifacts, checkouts: Checkouts, subpath: str, content: bytes | None
) -> None:
    entries = [
        TreeEntry(path="models/7/model.bin", size=1, sha256=await artifacts.put_bytes(b"m")),
        TreeEntry(path="models/latest", link="7"),
        TreeEntry(path="models/8", link="./latest/../7"),
        TreeEntry(path="best", link="models"),
    ]
    _, data = encode_tree(make_tree(entries))
    path = await checkouts.path(await artifacts.put_bytes(data), subpath)
    assert (path if content else path / "model.bin").read_bytes() == b"m"


@pytest.mark.parametrize("subpath", ["circle", "circle/x", "out/etc", "none/x", "7/model.bin/x"])
async def test_links_lead_nowhere_out_of_the_tree(
    artifacts: DiskArtifacts, checkouts: Checkouts, subpath: str
) -> None:
    entries = [
        TreeEntry(path="7/model.bin", size=1, sha256=await artifacts.put_bytes(b"m")),
        TreeEntry(path="7/up", link=".."),
        TreeEntry(path="circle", link="circle"),
        TreeEntry(path="out", link="7/up/.."),
        TreeEntry(path="none", link="gone"),
    ]
    _, data = encode_tree(make_tree(entries))
    with pytest.raises(WorldError, match="There is no") as missing:
        await checkouts.path(await artifacts.put_bytes(data), subpath)
    assert missing.value.mount


async def test_requests_at_once_share_one_build(
    artifacts: DiskArtifacts, checkouts: Checkouts, tmp_path: Path
) -> None:
    tree = await _store(artifacts)
    paths = []

    async def ask() -> None:
        paths.append(await checkouts.path(tree, "bin"))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
    assert len(paths) == 20
    assert len(set(paths)) == len(os.listdir(tmp_path / "checkouts")) == 1


async def test_what_is_missing_is_a_clear_error(
    artifacts: DiskArtifacts, checkouts: Checkouts
) -> None:
    with pytest.raises(WorldError, match="There is no 'nowhere'"):
        await checkouts.path(await _store(artifacts), "nowhere")
    with pytest.raises(WorldError, match="content is missing"):
        await checkouts.path("0" * 64)


async def test_what_an_earlier_boot_left_is_made_anew(
    artifacts: DiskArtifacts, checkouts: Checkouts, tmp_path: Path
) -> None:
    tree_id = await _store(artifacts)
    code = await checkouts.code(tree_id)
    (code / "bin/run").write_bytes(b"")  # as a power cut may leave it
    [boot] = os.listdir(tmp_path / "checkouts")
    (tmp_path / "checkouts" / boot).rename(tmp_path / "checkouts" / "an earlier boot")
    again = await Checkouts(tmp_path / "checkouts", artifacts).code(tree_id)
    assert (again / "bin/run").read_bytes() == b"r"
    assert os.listdir(tmp_path / "checkouts") == [boot]
