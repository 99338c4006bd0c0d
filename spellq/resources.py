"""Resource paths (`runs/12/model.bin`) and where they may be mounted in a run's world."""

import posixpath
from typing import Final

from msgspec import Struct

from spellq.runs import parse_number

RUN_DIRECTORY: Final = "/spell"
"""Where a run's code and outputs are; relative mount points start here."""

_SHOWN: Final = 200
"""Characters of a refused resource that its error repeats."""

_RESERVED: Final = ("/", "/proc", "/sys", "/dev", "/tmp", RUN_DIRECTORY)  # noqa: S108


class InvalidResourceError(ValueError):
    """A resource path or mount point that cannot be; the message names it and says why."""


class Resource(Struct, frozen=True):
    """A run's saved outputs, or a place in them."""

    run: int
    path: str = ""

    def __str__(self) -> str:
        return f"runs/{self.run}/{self.path}".rstrip("/")


def parse_resource(text: str) -> Resource:
    """`runs/<number>[/path]`; trailing slashes are tolerated.

    Raises:
        InvalidResourceError: anything else, a number beyond all runs, `..`, a NUL.
    """
    kind, _, rest = text.partition("/")
    digits, _, path = rest.partition("/")
    number = parse_number(digits)
    if kind != "runs" or not number:
        raise InvalidResourceError(
            f"{text[:_SHOWN]!r} is not a valid resource. "
            "Use runs/<number>[/path], for example runs/12/model.bin."
        )
    return Resource(number, relative_path(path, f"resource {text[:_SHOWN]!r}"))


def relative_path(path: str, what: str) -> str:
    """`path` in one spelling, or "" for the folder itself.

    Raises:
        InvalidResourceError: an absolute path, one that leads out of its folder, or one with a NUL.
    """
    if "\0" in path:
        raise InvalidResourceError(f"Invalid {what}: a path cannot hold a NUL character.")
    if path.startswith("/"):
        raise InvalidResourceError(f"Invalid {what}: {path!r} has to be a relative path.")
    clean = posixpath.normpath(path) if path.strip("/") else ""
    if clean == ".":
        return ""
    if ".." in path.split("/"):
        raise InvalidResourceError(f"Invalid {what}: '..' is not allowed in {path!r}.")
    return clean


def working_directory(cwd: str) -> str:
    """The folder below /spell a command starts in, from `cwd` as users write it ("" is /spell)."""
    if cwd == RUN_DIRECTORY or cwd.startswith(RUN_DIRECTORY + "/"):
        cwd = cwd[len(RUN_DIRECTORY) + 1 :]
    return relative_path(cwd, f"cwd {cwd!r}")


def mount_target(resource: str, mount_point: str) -> str:
    """The absolute place of a mount: relative ones start in /spell, "" is the resource's own name.

    Raises:
        InvalidResourceError: a place that is taken by the world itself, `..`, or a NUL.
    """
    what = f"mount point {mount_point!r} of {resource!r}"
    if not mount_point:
        mount_point = posixpath.basename(resource.rstrip("/"))
    if mount_point.startswith("/"):
        target = "/" + relative_path(mount_point.lstrip("/"), what)
    else:
        target = posixpath.join(RUN_DIRECTORY, relative_path(mount_point, what))
    target = target.rstrip("/") or "/"
    if target in _RESERVED or target.startswith(("/proc/", "/sys/", "/dev/")):
        raise InvalidResourceError(
            f"Invalid {what}: {target} belongs to the run itself. "
            "Mount below it, or somewhere else, for example /mnt/data."
        )
    return target


def parse_mount(text: str) -> tuple[str, str]:
    """`RESOURCE[:MOUNT]` as the command line takes it, as (resource, mount point or "").

    Raises:
        InvalidResourceError: more than one colon.
    """
    resource, _, mount_point = text.partition(":")
    if ":" in mount_point:
        raise InvalidResourceError(
            f"Invalid mount {text!r}: use RESOURCE[:MOUNT], for example runs/12/data:/mnt/data."
        )
    return resource, mount_point
