"""Whether this machine can make worlds, and what of the agent's own has to be visible in them."""

import os
import pwd
import sys
import tempfile
from pathlib import Path
from typing import Final

from spellq.ports import WorldError
from spellq_workers.link import run_helper

_NEEDS_LINUX: Final = "This release executes commands only on Linux."
_TMP: Final = "/tmp"  # noqa: S108


def refuse_without_linux() -> None:
    """Raises WorldError on anything but Linux."""
    if sys.platform != "linux":
        raise WorldError(_NEEDS_LINUX)


def check_world(home: Path | None = None) -> list[str]:
    """Why no world can be made here, each with its remedy; empty where one can.

    A world with an overlay is really made, below `home` where one is given. Blocks for some
    hundred milliseconds.
    """
    try:
        refuse_without_linux()
    except WorldError as error:
        return [str(error)]
    with (
        tempfile.TemporaryDirectory(prefix="world-check-", dir=home) as folder,
        tempfile.TemporaryFile() as stderr,
    ):
        code = run_helper({"check": os.path.realpath(folder)}, stderr.fileno())
        stderr.seek(0)
        return [] if code == 0 else [_remedy(stderr.read().decode(errors="replace").strip())]


def _remedy(error: str) -> str:
    if "namespaces" in error:
        return (
            f"{error}. In a container, add the capability SYS_ADMIN and run it with seccomp and "
            "AppArmor unconfined."
        )
    if "capabilities" in error:
        return (
            f"{error}. A run's command has to go without capabilities: in a container, add the "
            "capability SETPCAP to SYS_ADMIN, and run it with seccomp unconfined."
        )
    if "overlay" in error:
        return (
            f"{error}. Overlays need the kernel module overlay (`modprobe overlay`), and "
            "SPELLQ_HOME on an ordinary file system: in a container, on a volume."
        )
    return f"{error}. A run's world cannot be made on this machine."


def user_home() -> str:
    """The home folder of this user, whatever HOME says."""
    return pwd.getpwuid(os.geteuid()).pw_dir


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
    own = [Path(os.path.realpath(place)) for place in (home, user_home(), _TMP)]
    found: list[Path] = []
    for path in sorted({Path(os.path.realpath(path)) for path in wanted if os.path.exists(path)}):
        holds_own = any(place.is_relative_to(path) for place in own)
        if holds_own or path.is_relative_to(own[0]):
            continue
        if not any(path.is_relative_to(shorter) for shorter in found):
            found.append(path)
    return [str(path) for path in found]
