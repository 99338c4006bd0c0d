"""Slot helpers of a home as they are found from outside, without a word to them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct


class FoundHelper(Struct, frozen=True):
    """A living helper. `lost`: its slot's folder is gone or another helper's, so nobody asks it."""

    pid: int
    slot: Path
    lost: bool


def find_helpers(home: Path) -> list[FoundHelper]:
    """The helpers that live for this home, of this user."""
    of_home = {pid: slot for pid, cover, slot in _processes() if cover == os.path.realpath(home)}
    return [
        FoundHelper(pid, slot, lost=not slot.exists() or _pid(slot) in of_home.keys() - {pid})
        for pid, slot in of_home.items()
    ]


def find_left_runs(home: Path) -> list[int]:
    """Runs whose folder is there and whose helper is dead: an agent ends them when it starts."""
    living = {helper.slot for helper in find_helpers(home) if not helper.lost}
    found = []
    for folder in sorted((Path(os.path.realpath(home)) / "agent" / "slots").glob("*/*-*/")):
        run, _, attempt = folder.name.partition("-")
        if folder.parent not in living and run.isdigit() and attempt.isdigit():
            found.append(int(run))
    return found


def _pid(slot: Path) -> int | None:
    try:
        return int((slot / "helper.pid").read_text())
    except (OSError, ValueError):
        return None


def _processes() -> Iterator[tuple[int, str, Path]]:
    """(pid, the home it covers, slot) of every helper of this user, by its command line."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                words = os.fsdecode(file.read()).split("\0")
            if len(words) < 3 or not words[-3].endswith("/helper.py"):
                continue
            config = json.loads(words[-2])
            if _user(entry.name) == os.geteuid():
                yield int(entry.name), config["cover"], Path(config["slot"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # it has ended, or is none


def _user(pid: str) -> int:
    """Its folder in /proc belongs to root: nobody may look into a helper."""
    with open(f"/proc/{pid}/status") as file:
        [user] = [int(line.split()[1]) for line in file if line.startswith("Uid:")]
    return user
