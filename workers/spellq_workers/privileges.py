"""How a slot helper gets the right to make worlds, and what it gives up. Only the standard library.

Three ways lead to the same world. Whoever may make namespaces (root, or a container's root with
SYS_ADMIN) simply does. Anyone else makes a user namespace first, in which they stay who they are
and may mount. Where that is forbidden to all but bubblewrap, as AppArmor does on Ubuntu, the helper
is started by bubblewrap, which hands it such a user namespace ready made.
"""

import ctypes
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

_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_VERSION = 1
_LANDLOCK_WITH_SCOPES = 6
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2


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


def keep_apart() -> bool:
    """From now on this process and all it starts reach no abstract Unix socket of anybody else.

    By such a socket two runs could hand each other what they have open, and the host's own do work
    for whoever asks. Signals do not get out either. False: this kernel (before 6.12) cannot do it;
    then runs are kept apart only by what is looked after when one of them ends.
    """
    libc = ctypes.CDLL(None)
    scopes = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS
    asked = (ctypes.c_uint64 * 3)(0, 0, scopes)  # rights on files, on the network; scopes
    if libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION) < _LANDLOCK_WITH_SCOPES:
        return False
    rules = libc.syscall(_LANDLOCK_CREATE_RULESET, asked, ctypes.sizeof(asked), 0)
    if rules < 0:
        return False
    try:
        return bool(libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(rules)


def _may_mount() -> bool:
    with open("/proc/self/status") as file:
        [held] = [line.split()[1] for line in file if line.startswith("CapEff:")]
    return bool(int(held, 16) >> _CAP_SYS_ADMIN & 1)
