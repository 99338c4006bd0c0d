"""Files with holes keep them, and lose no byte."""

import os
from pathlib import Path

import pytest

from spellq import sparse

MIB = 1 << 20

CONTENTS = {
    "empty": b"",
    "short": b"x",
    "zeros alone": bytes(3 * MIB + 1),
    "data between holes": bytes(2 * MIB) + b"data" * 10 + bytes(5 * MIB),
    "data at both ends": b"a" + bytes(3 * MIB) + b"b",
    "no zero at all": b"abc" * MIB,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_copy_is_equal_and_takes_no_more_room(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dense").write_bytes(content)
    with (tmp_path / "dense").open("rb") as source, (tmp_path / "thin").open("wb", 0) as target:
        for piece in sparse.pieces(source.fileno()):
            sparse.write(target.fileno(), piece)
        sparse.end(target.fileno())
    assert (tmp_path / "thin").read_bytes() == content
    with (tmp_path / "thin").open("rb") as source:
        assert b"".join(sparse.pieces(source.fileno())) == content
    data = sum(any(content[at : at + MIB]) for at in range(0, len(content), MIB))
    assert (tmp_path / "thin").stat().st_blocks * 512 <= data * MIB + 8192


def test_what_is_appended_meanwhile_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x" * (MIB + 1))
    with path.open("r+b") as file:
        pieces = sparse.pieces(file.fileno())
        assert len(next(pieces)) == MIB
        os.truncate(path, 5 * MIB)
        assert list(pieces) == [b"x"]
        pieces = sparse.pieces(file.fileno())
        next(pieces)
        os.truncate(path, MIB)
        assert list(pieces) == []
