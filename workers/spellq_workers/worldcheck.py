"""Whether this machine can make worlds, and what of the agent's own has to be visible in them."""

import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

from spellq.files import no_space
from spellq.ports import WorldError
from spellq_workers.environment import this_user
from spellq_workers.link import run_helper
from spellq_workers.remedies import world_problem

_NEEDS_LINUX: Final = "This release executes commands only on Linux."
_TMP: Final = "/tmp"  # noqa: S108


def refuse_without_linux() -> None:
    """Raises WorldError on anything but Linux."""
    if sys.platform != "linux":
        raise WorldError(_NEEDS_LINUX)


class WorldReport(Struct, frozen=True):
    """What a trial told. `problem` keeps worlds from being made, and says what to do.

    `overlay_refusal` says why a run gets a copy of its code instead; `through` is the program that
    helpers have to be started through, if any. Empty where it is as it should be.
    """

    problem: str = ""
    overlay_refusal: str = ""
    through: str = ""


def check_world(home: Path | None = None) -> WorldReport:
    """Whether worlds can be made here, found out by making one, below `home` where one is given.

    Blocks for some hundred milliseconds.
    """
    try:
        refuse_without_linux()
    except WorldError as error:
        return WorldReport(str(error))
    with (
        tempfile.TemporaryDirectory(prefix="world-check-", dir=home) as folder,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        config = {"check": os.path.realpath(folder)}
        started = run_helper(config, stderr.fileno(), stdout.fileno())
        if started.status != 0:
            said = _said(stderr)
            if home is not None and said == os.strerror(errno.ENOSPC):
                return WorldReport(no_space(home))
            return WorldReport(world_problem(said))
        return WorldReport("", _said(stdout), started.through)


def _said(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def visible_paths(home: Path) -> list[str]:
    """The folders of this interpreter and its packages, which every world shows where they lie.

    Never one that holds what a world keeps for itself (`home`, the user's home, /tmp), nor one that
    lies in `home`.
    """
    executable = Path(sys.executable)
    wanted = [sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(None, sys.path)]
    wanted.append(str(executable.parent))
    while executable.is_symlink():
        executable = executable.parent / executable.readlink()
        wanted.append(str(executable.parent))
    own = [Path(os.path.realpath(place)) for place in (home, this_user().home, _TMP)]
    found: list[Path] = []
    for path in sorted({Path(os.path.realpath(path)) for path in wanted if os.path.exists(path)}):
        holds_own = any(place.is_relative_to(path) for place in own)
        if holds_own or path.is_relative_to(own[0]):
            continue
        if not any(path.is_relative_to(shorter) for shorter in found):
            found.append(path)
    return [str(path) for path in found]
