"""Runs a command as an ordinary user, in a checkout that may lie where no such user can look.

    python -m tests.as_user COMMAND...

As root: makes the user `spellq-test` where there is none, and shows them this checkout and its
interpreter at their own paths, read-only, in a mount namespace that ends with the command. Of the
environment only PATH and LANG go with it.
"""

import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

from spellq_workers.mounts import (
    CLONE_NEWNS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    make_read_only,
    mount,
    unshare,
)

USER: Final = "spellq-test"
GROUP: Final = "users"
"""A second group for them, as most people have one."""
CHECKOUT: Final = Path(__file__).parents[1]


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("tests.as_user becomes another user: run it as root.")
    user = _user()
    unshare(CLONE_NEWNS)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    _show([CHECKOUT.resolve(), Path(sys.executable).resolve().parents[1], Path(sys.base_prefix)])
    os.chdir(CHECKOUT)
    os.initgroups(USER, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    own = {"HOME": user.pw_dir, "USER": USER, "PYTHONDONTWRITEBYTECODE": "1"}
    os.execvpe(sys.argv[1], sys.argv[1:], kept | own)


def _user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--groups", GROUP, USER], check=True)
        return pwd.getpwnam(USER)


def _show(folders: list[Path]) -> None:
    """Make these folders readable: what closes the way to one is covered, and they are put back."""
    opened = [(folder, os.open(folder, os.O_PATH)) for folder in dict.fromkeys(folders)]
    closed = {place for folder, _ in opened if (place := _closed(folder))}
    for place in closed:
        mount("tmpfs", str(place), "tmpfs", 0, "mode=755")
    for folder, descriptor in opened:
        if any(folder.is_relative_to(place) for place in closed) and not folder.exists():
            folder.mkdir(parents=True)
            mount(f"/proc/self/fd/{descriptor}", str(folder), "", MS_BIND | MS_REC)
            make_read_only(str(folder))
        os.close(descriptor)


def _closed(folder: Path) -> Path | None:
    """The first folder on the way that others may not go through."""
    way = [*reversed(folder.parents), folder]
    return next((each for each in way if not each.stat().st_mode & stat.S_IXOTH), None)


if __name__ == "__main__":
    main()
