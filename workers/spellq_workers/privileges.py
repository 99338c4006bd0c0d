"""How a slot helper gets the right to make worlds. Only the standard library.

Three ways lead to the same world. Whoever may make namespaces (root, or a container's root with
SYS_ADMIN) simply does. Anyone else makes a user namespace first, in which they stay who they are
and may mount. Where that is forbidden to all but bubblewrap, as AppArmor does on Ubuntu, the helper
is started by bubblewrap, which hands it such a user namespace ready made.
"""

import os

from spellq_workers.mounts import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    unshare,
)

NO_ENTRY = 3
"""The helper's exit status where it may not make namespaces: another way in may be open."""

_NAMESPACES = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
_CAP_SYS_ADMIN = 21


def enter_namespaces() -> None:
    """Have the next child of this process be pid 1 of new namespaces, and be able to mount there.

    User and group stay what they are. Raises OSError with a sentence that says `namespaces`.
    """
    if _may_mount():
        unshare(_NAMESPACES)
        return
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | _NAMESPACES)
    for file, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        try:
            with open(f"/proc/self/{file}", "w") as setting:
                setting.write(content)
        except OSError as error:
            message = f"making new namespaces: {file}: {error.strerror}"
            raise OSError(error.errno, message) from error


def in_user_namespace() -> bool:
    """Whether this process's rights are those of a user namespace, not the machine's own."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", "4294967295"]


def _may_mount() -> bool:
    with open("/proc/self/status") as file:
        [held] = [line.split()[1] for line in file if line.startswith("CapEff:")]
    return bool(int(held, 16) >> _CAP_SYS_ADMIN & 1)
