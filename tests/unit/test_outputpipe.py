"""The pipe between a command and the file of its output."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spellq_workers.outputpipe import Carrier, OutputPipe


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def test_all_that_was_written_is_there_once_it_is_closed(tmp_path: Path) -> None:
    pipe = OutputPipe(opened(tmp_path / "output"))
    os.write(pipe.writer, b"one\n")
    pipe.carry()
    pipe.carry()  # nothing is there: it does not wait
    os.write(pipe.writer, b"two\n" * 1000)
    pipe.close()
    assert (tmp_path / "output").read_bytes() == b"one\n" + b"two\n" * 1000


def test_a_carrier_carries_one_after_the_other(tmp_path: Path) -> None:
    carrier = Carrier()
    for name in ("first", "second", "third"):
        pipe = OutputPipe(opened(tmp_path / name))
        carrier.begin(pipe)
        os.write(pipe.writer, b"more than fits\n" * 100_000)
        carrier.end()
        pipe.close()
        assert (tmp_path / name).read_bytes() == b"more than fits\n" * 100_000


@contextmanager
def file_system(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
def test_what_a_full_disk_cannot_take_is_said_to_be_missing(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "64k") as disk:
        pipe = OutputPipe(opened(disk / "output"))
        (disk / "ballast").write_bytes(bytes(48 << 10))
        os.write(pipe.writer, b"x" * 50_000)
        pipe.carry()
        os.write(pipe.writer, b"lost")
        pipe.carry()
        kept = (disk / "output").stat().st_size
        (disk / "ballast").unlink()
        os.write(pipe.writer, b"back\n")
        pipe.close()
        output = (disk / "output").read_text()
    lost = 50_004 - kept
    assert 0 < kept < 50_000
    assert output == "x" * kept + f"\nspellq: {lost} bytes of output are missing here\nback\n"
