"""Who listens on a port of this machine, as far as this user may know."""

import os
import pwd
from pathlib import Path
from typing import Final

_LISTENING: Final = "0A"


def listener(port: int) -> str:
    """`nginx (process 812)`, or `a process of www-data`; "" where nobody is found."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                return _process(f"socket:[{fields[9]}]") or f"a process of {_name(int(fields[7]))}"
    return ""


def _process(socket: str) -> str:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = [os.readlink(each.path) for each in os.scandir(process / "fd")]
            if socket in descriptors:
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return ""


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
