"""Room on a disk: what lacks, who waits for it, and what is done once it is there."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

import spellq_brokers.embedded.artifacts
import spellq_workers.room
from spellq.ports import StoreFull, StoreUnavailable
from spellq.sizes import parse_size
from spellq_brokers.embedded import DiskArtifacts
from spellq_workers.room import Room

MIB = 1 << 20


class FakeDisk:
    """How much is free, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        for module in (spellq_workers.room, spellq_brokers.embedded.artifacts):
            monkeypatch.setattr(module, "free_bytes", lambda _: self.free)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FakeDisk:
    return FakeDisk(monkeypatch)


def test_what_lacks_is_said(disk: FakeDisk) -> None:
    room = Room(Path("/home/ada"), 2 * MIB)
    disk.free = 2 * MIB
    assert room.lack() is None
    assert room.lack(1) is not None
    disk.free = MIB
    assert room.lack() == "disk space: 1 MiB free, 2 MiB wanted on /home/ada"
    assert room.lack(MIB) == "disk space: 1 MiB free, 3 MiB wanted on /home/ada"


def test_a_disk_that_cannot_be_looked_at_lacks_nothing() -> None:
    assert Room(Path("/nowhere"), MIB).lack() is None


async def test_a_step_waits_for_room_and_is_repeated_where_that_was_not_enough(
    disk: FakeDisk,
) -> None:
    room = Room(Path("/home"), MIB)
    said: list[str] = []
    tried: list[int] = []

    async def say(texts: Sequence[str]) -> None:
        said.extend(texts)

    async def step() -> str:
        tried.append(disk.free)
        if disk.free < 3 * MIB:
            raise StoreFull("full", 2 * MIB)
        return "done"

    spending = asyncio.ensure_future(room.spend(step, say))
    for free in (0, MIB, 2 * MIB, 3 * MIB):
        disk.free = free
        for _ in range(5):
            await asyncio.sleep(0)
        room.look()
    assert await spending == "done"
    assert tried == [MIB, 3 * MIB]
    assert said == [
        "Waiting for disk space: 0 B free, 1 MiB wanted on /home",
        "Waiting for disk space: 2 MiB free, 3 MiB wanted on /home",
    ]


async def test_another_fault_is_not_waited_for(disk: FakeDisk) -> None:
    disk.free = MIB

    async def step() -> None:
        raise StoreUnavailable("broken")

    async def say(_: Sequence[str]) -> None:
        raise AssertionError("nothing is waited for")

    with pytest.raises(StoreUnavailable, match="broken"):
        await Room(Path("/home"), MIB).spend(step, say)


async def test_contents_leave_the_reserve_alone(disk: FakeDisk, tmp_path: Path) -> None:
    artifacts = await DiskArtifacts.make(tmp_path / "artifacts", 2 * MIB)
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    disk.free = 3 * MIB - 1
    with file.open("rb") as content:
        with pytest.raises(StoreFull) as copied:
            await artifacts.adopt([content], copy=True)
        assert copied.value.wanted_bytes == MIB
        assert "SPELLQ_MIN_FREE_BYTES" in str(copied.value)
        with pytest.raises(StoreFull):
            await artifacts.put_all([bytes(MIB)])
        disk.free = 3 * MIB
        [(sha256, size)] = await artifacts.adopt([content], copy=True)
    assert (await artifacts.missing([sha256]), size) == ([], MIB)
    assert list((tmp_path / "artifacts" / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("268435456", 256 * MIB), ("256MiB", 256 * MIB), (" 1 GiB ", 1024 * MIB),
     ("", None), ("-1", None), ("1.5GiB", None), ("256MB", None), ("9" * 50, None), ("١", None)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size
