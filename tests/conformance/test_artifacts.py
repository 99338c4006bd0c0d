"""ArtifactStore: each content once, whole and verified, or not at all."""

import hashlib
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


async def test_a_file_is_adopted_and_adopting_it_again_says_the_same(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    assert await artifacts.adopt(file) == (sha256(b"weights"), 7)
    assert await artifacts.adopt(file) == (sha256(b"weights"), 7)
    file.unlink()
    assert await whole(artifacts, sha256(b"weights")) == b"weights"


async def test_an_executable_keeps_its_mode_and_lends_it_to_nobody(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    file = tmp_path / "run.sh"
    file.write_bytes(b"#!/bin/sh\n")
    file.chmod(0o755)
    name, _ = await artifacts.adopt(file)
    assert file.stat().st_mode & 0o111
    assert not (await artifacts.local_path(name)).stat().st_mode & 0o111


async def test_what_is_not_there_is_a_key_error(artifacts: ArtifactStore) -> None:
    name = sha256(b"nothing")
    for ask in (artifacts.open, artifacts.get_bytes, artifacts.local_path):
        with pytest.raises(KeyError):
            await ask(name)
