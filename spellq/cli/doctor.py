"""`spellq doctor`: whether this machine can do what spellq needs."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from msgspec import Struct

from spellq.cli.connection import print_json
from spellq.cli.options import output_option
from spellq.cli.screen import output
from spellq.version import __version__

if TYPE_CHECKING:
    from spellq.settings import Settings
    from spellq_workers.worldcheck import WorldReport

_LEAST_PYTHON: Final = (3, 11)
_LEAST_DISK_BYTES: Final = 1 << 30
_INSTALL: Final = 'Install them: pip install "spellq[all]"'


class Check(Struct, frozen=True):
    """One thing looked at. Without `remedy` nothing has to be done."""

    name: str
    good: bool
    found: str
    remedy: str = ""


@click.command(epilog="Example: spellq doctor")
@output_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check this machine, and say how to mend what is missing."""
    from spellq_sdk.settings import spellq_home

    checks = list(examine(spellq_home()))
    if as_json:
        print_json(checks)
    else:
        for check in checks:
            output().line(line(check))
    context.exit(0 if all(check.good for check in checks) else 1)


def line(check: Check) -> str:
    """`✔ git: 2.39.5`, or `✖ git: missing. Install git.`"""
    remedy = f" {check.remedy}" if check.remedy else ""
    mark = "✔" if check.good else "✖"
    if not output().unicode:
        mark = "ok  " if check.good else "FAIL"
    return f"{mark} {check.name}: {check.found}{remedy}"


def examine(home: Path) -> Iterator[Check]:
    """Look at everything, one after the other."""
    yield Check("spellq", True, __version__)
    yield _python()
    yield Check("Kernel", sys.platform == "linux", f"{os.uname().sysname} {os.uname().release}")
    yield _git()
    yield _packages()
    yield from _worlds(home)
    yield _writable(home)
    settings = _settings(home)
    if isinstance(settings, Check):
        yield settings
    else:
        yield _disk(home, settings.min_free_bytes)
        yield from _daemon(home, settings.port)
    yield _helpers(home)


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= _LEAST_PYTHON
    return Check("Python", good, version, "" if good else "Use Python 3.11 or newer.")


def _git() -> Check:
    try:
        said = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return Check("git", False, "missing.", "Install git.")
    return Check("git", True, said.stdout.strip().removeprefix("git version "))


def _packages() -> Check:
    from spellq_sdk.daemon import SERVER_PACKAGES

    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Check("Packages", False, f"{', '.join(missing)} missing.", _INSTALL)
    return Check("Packages", True, "all there")


class CannotTry(Exception):
    """No world could be tried, for a reason that is not the machine's; the message says which."""


def try_world(home: Path) -> "WorldReport":
    """Have a world made where those of runs will be.

    Raises:
        CannotTry: packages are missing, or the folder cannot be written to.
    """
    try:
        worldcheck = importlib.import_module("spellq_workers.worldcheck")
        report: WorldReport = worldcheck.check_world(_nearest(home))
    except (ImportError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CannotTry(f"cannot be tried: {why}.") from error
    return report


def _worlds(home: Path) -> Iterator[Check]:
    """Namespaces and overlay, tried out by those who will make the runs' worlds."""
    try:
        report = try_world(home)
    except CannotTry as error:
        yield Check("Worlds of runs", False, str(error), "Mend what else is missing first.")
        return
    if report.problem:
        yield Check("Worlds of runs", False, report.problem)
        return
    yield Check("Namespaces", True, _namespaces(report.through))
    yield _overlay(report.overlay_refusal)


def _namespaces(through: str) -> str:
    if os.geteuid() == 0:
        return "root makes them"
    return "user namespaces work" + (f", through {through}" if through else "")


def _overlay(refusal: str) -> Check:
    if not refusal:
        return Check("Overlay", True, "works")
    return Check(
        "Overlay",
        True,
        f"refused ({refusal}), so every run gets a copy of its code.",
        "For overlays, set SPELLQ_HOME to a folder of your own user and group on an ordinary local "
        "file system (in a container, on a volume), with the kernel module overlay and, as an "
        "ordinary user, Linux 5.11 or newer.",
    )


def _writable(home: Path) -> Check:
    """Found out by writing: root is told by the kernel that it may, even where nobody can."""
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=_nearest(home)):
            return Check("Home", True, str(home))
    except OSError as error:
        found = f"{home} cannot be written to: {error.strerror}."
        remedy = "Make it writable, or set SPELLQ_HOME to a folder that is."
        return Check("Home", False, found, remedy)


def _settings(home: Path) -> "Settings | Check":
    """The settings of a daemon that is started now; or what it would refuse to start with."""
    from spellq.settings import InvalidSetting, read_settings

    try:
        return read_settings(home)
    except InvalidSetting as error:
        return Check("Settings", False, str(error))


def _disk(home: Path, reserve_bytes: int) -> Check:
    from spellq.files import free_bytes
    from spellq.sizes import human_size

    free = free_bytes(_nearest(home))
    found = f"{human_size(free)} free"
    remedy = f"Free some where {home} lies; code and outputs are kept there."
    if free < reserve_bytes:
        found += f", and no run starts below {human_size(reserve_bytes)}"
        remedy += " SPELLQ_MIN_FREE_BYTES is how much has to be free."
    elif free >= _LEAST_DISK_BYTES:
        return Check("Disk space", True, found)
    return Check("Disk space", False, f"{found}.", remedy)


def _daemon(home: Path, port: str | None) -> Iterator[Check]:
    from spellq_sdk.daemon import find_daemon

    found = find_daemon(home)
    if found is not None:
        same = found.version == __version__
        yield Check(
            "Daemon",
            True,
            f"running at {found.url}, version {found.version}"
            + ("" if same else f" (this is {__version__}; the next command replaces it)"),
        )
        return
    yield Check("Daemon", True, "not running (started when needed)")
    yield _port(port)
    yield from _left_runs(home)


def _port(asked: str | None) -> Check:
    from spellq.settings import DEFAULT_PORT

    if asked is not None and not (asked.isdigit() and int(asked) < 65536):
        return Check("Port", False, f"SPELLQ_PORT is {asked!r}.", "Set it to a number below 65536.")
    port = int(asked or DEFAULT_PORT)
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1", port))
        except OSError:
            return _taken(port, asked=asked is not None)
    return Check("Port", True, f"{port} is free")


def _taken(port: int, *, asked: bool) -> Check:
    from spellq.cli.listeners import listener

    whom = listener(port)
    taken = f"{port} is taken{f' by {whom}' if whom else ''}"
    if asked:
        return Check("Port", False, f"{taken}.", "Set SPELLQ_PORT to a free one.")
    return Check("Port", True, f"{taken}; another free one will be used")


def _helpers(home: Path) -> Check:
    """Helpers that nobody can ask any more."""
    from spellq_workers.stale import find_helpers

    helpers = find_helpers(home)
    lost = [str(helper.pid) for helper in helpers if helper.lost]
    if not lost:
        return Check("Slot helpers", True, f"{len(helpers)} alive, none stale")
    found = f"{len(lost)} of {len(helpers)} lost their slots."
    return Check("Slot helpers", False, found, f"End them: kill -9 {' '.join(lost)}")


def _left_runs(home: Path) -> Iterator[Check]:
    """Runs whose helper died while no daemon was there to end them."""
    from spellq_workers.stale import find_left_runs

    if left := find_left_runs(home):
        numbers = ", ".join(str(run) for run in left)
        remedy = "'spellq up' ends them, with their exit codes where those are known."
        yield Check("Runs left behind", False, f"{numbers}: their helpers are dead.", remedy)


def _nearest(home: Path) -> Path:
    """The home folder, or the folder it would be made in."""
    return next(place for place in (home, *home.parents) if place.exists())
