"""ArtifactStore: each content once, whole and verified, or not at all."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from spellq.ports import ArtifactStore


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def whole(artifacts: ArtifactStore, name: str) -> bytes:
    return b"".join([piece async for piece in await artifacts.open(name)])


async def test_a_stream_is_stored_under_its_hash(artifacts: ArtifactStore) -> None:
    name = sha256(b"hello world")
    assert await artifacts.missing([name]) == [name]
    assert await artifacts.put(name, pieces(b"hello ", b"world")) == 11
    assert await artifacts.missing([name]) == []
    assert await whole(artifacts, name) == b"hello world"
    assert await artifacts.get_bytes(name) == b"hello world"


async def test_another_content_than_said_is_not_kept(artifacts: ArtifactStore) -> None:
    name = sha256(b"right")
    with pytest.raises(ValueError, match="SHA-256"):
        await artifacts.put(name, pieces(b"wrong"))
    assert await artifacts.missing([name, sha256(b"wrong")]) == [name, sha256(b"wrong")]


async def test_a_stream_that_breaks_leaves_nothing(artifacts: ArtifactStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    name = sha256(b"halfwhole")
    with pytest.raises(ConnectionResetError):
        await artifacts.put(name, broken())
    assert await artifacts.missing([name]) == [name]


async def test_empty_and_large_contents(artifacts: ArtifactStore) -> None:
    empty = await artifacts.put_bytes(b"")
    assert await whole(artifacts, empty) == b""
    large = bytes(range(256)) * 20_000
    assert await whole(artifacts, await artifacts.put_bytes(large)) == large


@pytest.mark.parametrize("copy", [False, True])
async def test_a_file_is_adopted_and_adopting_it_again_says_the_same(
    artifacts: ArtifactStore, tmp_path: Path, copy: bool
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    with path.open("rb") as file:
        assert await artifacts.adopt([file], copy=copy) == [(sha256(b"weights"), 7)]
        assert await artifacts.adopt([file], copy=copy) == [(sha256(b"weights"), 7)]
    path.unlink()
    assert await whole(artifacts, sha256(b"weights")) == b"weights"


async def test_an_executable_keeps_its_mode_and_lends_it_to_nobody(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    path = tmp_path / "run.sh"
    path.write_bytes(b"#!/bin/sh\n")
    path.chmod(0o755)
    with path.open("rb") as file:
        [(name, _)] = await artifacts.adopt([file])
    assert path.stat().st_mode & 0o111
    [stored] = await artifacts.local_paths([name])
    assert not stored.stat().st_mode & 0o111


@pytest.mark.parametrize("several_names", [False, True])
async def test_what_others_may_write_to_is_copied_and_left_as_it_is(
    artifacts: ArtifactStore, tmp_path: Path, several_names: bool
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    path.chmod(0o640)
    if several_names:
        (tmp_path / "other name").hardlink_to(path)
    with path.open("rb") as file:
        [(name, _)] = await artifacts.adopt([file], copy=not several_names)
    assert path.stat().st_mode & 0o777 == 0o640
    path.write_bytes(b"changed")
    assert await whole(artifacts, name) == b"weights"


async def test_what_is_adopted_is_the_open_file_whatever_its_name_means_now(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    with path.open("rb") as file:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(secret)
        [(name, _)] = await artifacts.adopt([file])
    assert await whole(artifacts, name) == b"weights"
    assert secret.stat().st_mode & 0o777 == 0o600


async def test_only_regular_files_are_adopted(artifacts: ArtifactStore) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    with os.fdopen(null, "rb") as file, pytest.raises(ValueError, match="regular"):
        await artifacts.adopt([file])


async def test_what_is_not_there_is_a_key_error(artifacts: ArtifactStore) -> None:
    name = sha256(b"nothing")
    for ask in (artifacts.open, artifacts.get_bytes):
        with pytest.raises(KeyError):
            await ask(name)
    with pytest.raises(KeyError):
        await artifacts.local_paths([await artifacts.put_bytes(b"there"), name])


async def test_several_contents_at_once_and_the_same_from_many_sides(
    artifacts: ArtifactStore,
) -> None:
    contents = [b"a", b"b", b"a", b""]
    answers = await asyncio.gather(*(artifacts.put_all(contents) for _ in range(20)))
    assert all(answer == [sha256(data) for data in contents] for answer in answers)
    assert await whole(artifacts, sha256(b"b")) == b"b"
