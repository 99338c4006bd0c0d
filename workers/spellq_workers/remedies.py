"""What to do where worlds cannot be made: the exact remedy for what this machine lacks."""

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Final

_SETTINGS: Final = Path("/proc/sys")


def world_problem(error: str, settings: Path = _SETTINGS) -> str:
    """What a helper said, as a sentence, and what would mend it.

    `settings` is where the kernel's are to be read.
    """
    said = "; ".join(dict.fromkeys(filter(None, map(str.strip, error.splitlines()))))
    return f"{said.rstrip('.') or 'It said nothing'}. {_remedy(said, settings)}".rstrip()


def _remedy(error: str, settings: Path) -> str:
    if os.strerror(errno.EAGAIN) in error:
        return (
            "No more processes can be started: end some, or raise the limit (`ulimit -u`, or "
            "pids.max of the control group)."
        )
    if "namespaces" in error or (_is_restricted(settings) and os.geteuid() != 0):
        return _namespaces(settings)
    if "capabilities" in error:
        return (
            "A run's command has to go without capabilities: in a container, add the "
            "capability SETPCAP to SYS_ADMIN, and run it with seccomp unconfined."
        )
    if "mount of proc" in error:
        return (
            "A world needs a /proc of its own, which the kernel refuses where parts of /proc are "
            "covered: in a container, run it with the option systempaths=unconfined, or as root "
            "with the capability SYS_ADMIN."
        )
    return "A run's world cannot be made on this machine."


def _namespaces(settings: Path) -> str:
    if _value(settings, "user/max_user_namespaces") == 0:
        return (
            "This machine allows no user namespaces. Allow them: "
            "sudo sysctl -w user.max_user_namespaces=15000"
        )
    if _value(settings, "kernel/unprivileged_userns_clone") == 0:
        return (
            "Only root may make user namespaces here. Allow them to all: "
            "sudo sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if _is_restricted(settings):
        return (
            "AppArmor lets only programs with a profile make user namespaces. Give one to this "
            f"Python:\n{apparmor_profile()}\n"
            + _bubblewrap("Or bubblewrap, where AppArmor has a profile that leaves it its rights")
        )
    return (
        "In a container, run it as root with the capability SYS_ADMIN, and with seccomp and "
        "AppArmor unconfined. " + _bubblewrap("Elsewhere bubblewrap may be allowed to make them")
    )


def _bubblewrap(where: str) -> str:
    """The advice to install it, unless it is there and was tried in vain."""
    return "" if shutil.which("bwrap") else f"{where}: sudo apt-get install bubblewrap"


def _is_restricted(settings: Path) -> bool:
    return _value(settings, "kernel/apparmor_restrict_unprivileged_userns") == 1


def apparmor_profile() -> str:
    """The commands that allow this interpreter to make user namespaces, and nothing else to change.

    AppArmor goes by a program's real path.
    """
    return f"""\
sudo tee /etc/apparmor.d/spellq >/dev/null <<'EOF'
abi <abi/4.0>,
include <tunables/global>

profile spellq "{os.path.realpath(sys.executable)}" flags=(unconfined) {{
  userns,
  include if exists <local/spellq>
}}
EOF
sudo apparmor_parser -r /etc/apparmor.d/spellq"""


def _value(settings: Path, name: str) -> int | None:
    try:
        return int((settings / name).read_text())
    except (OSError, ValueError):
        return None
