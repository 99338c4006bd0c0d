"""Settings of an installation: a flag, then the environment, then `$SPELLQ_HOME/config.toml`."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from spellq.runs import MASTER_QUEUE, machine_type_key
from spellq.sizes import parse_size

DEFAULT_PORT: Final = 7735
DEFAULT_NAMESPACE: Final = "spellq"
DEFAULT_MASTER_SLOTS: Final = 16
DEFAULT_MIN_FREE_BYTES: Final = 256 << 20
LEAST_SLOTS: Final = 4
MAX_SLOTS: Final = 1024
_SHOWN: Final = 40

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class InvalidSetting(ValueError):
    """A setting that cannot be; the message names it, its value and what would do."""


def parse_machine_types(text: str) -> dict[str, int]:
    """`cpu=8,t4=1` as slots by machine type; without a number, one slot a core, at least 4.

    Raises:
        InvalidSetting: a name or number that cannot be, or one type named twice.
    """
    slots: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        key = machine_type_key(name)
        if not _NAME.fullmatch(key):
            raise InvalidSetting(
                f"Invalid machine type {name!r} in {text!r}: "
                "use letters, digits and . _ - , for example cpu=8,t4=1."
            )
        if key == MASTER_QUEUE:
            raise InvalidSetting(
                f"{key!r} in {text!r} cannot be a machine type: master runs have slots of that "
                "name by themselves. SPELLQ_MASTER_SLOTS says how many."
            )
        if key in slots:
            raise InvalidSetting(f"The machine type {key!r} is named twice in {text!r}.")
        if equals and not _is_slots(number, 1):
            raise InvalidSetting(
                f"Invalid number of slots {number[:_SHOWN]!r} for {key!r}: use 1 to {MAX_SLOTS}."
            )
        slots[key] = int(number) if equals else max(LEAST_SLOTS, os.cpu_count() or 1)
    return slots


def parse_master_slots(text: str | None, slots: Mapping[str, int]) -> int:
    """How many master runs at once: 16 by default where cpu is served, else none.

    Raises:
        InvalidSetting: no such number can be.
    """
    if text is None:
        return DEFAULT_MASTER_SLOTS if "cpu" in slots else 0
    if not _is_slots(text, 0):
        raise InvalidSetting(
            f"Invalid number of slots for masters {text[:_SHOWN]!r}: use 0 to {MAX_SLOTS} "
            "in SPELLQ_MASTER_SLOTS."
        )
    return int(text)


def parse_min_free(text: str | None) -> int:
    """How many bytes of the disk are left to the store's own records: 256 MiB by default.

    Raises:
        InvalidSetting: no such number can be.
    """
    if text is None:
        return DEFAULT_MIN_FREE_BYTES
    size = parse_size(text)
    if size is None:
        raise InvalidSetting(
            f"Invalid free space {text[:_SHOWN]!r}: use bytes, or KiB, MiB or GiB as in 256MiB, "
            "in SPELLQ_MIN_FREE_BYTES."
        )
    return size


class Settings(Struct, frozen=True):
    """What a daemon serves, and where; `port` is one that was asked for."""

    port: str | None
    slots: dict[str, int]
    master_slots: int
    min_free_bytes: int


def read_settings(
    home: Path, port: str | None = None, machine_types: str | None = None
) -> Settings:
    """All of them, checked; the arguments are flags.

    Raises:
        InvalidSetting: the first that cannot be.
    """
    config = read_config(home)
    types = setting("SPELLQ_MACHINE_TYPES", machine_types, config)
    slots = parse_machine_types(types or "cpu")
    return Settings(
        port=setting("SPELLQ_PORT", port, config),
        slots=slots,
        master_slots=parse_master_slots(setting("SPELLQ_MASTER_SLOTS", None, config), slots),
        min_free_bytes=parse_min_free(setting("SPELLQ_MIN_FREE_BYTES", None, config)),
    )


class ClusterSettings(Struct, frozen=True):
    """The engines of a cluster. URLs hold passwords: they are never shown."""

    amqp_url: str
    redis_url: str
    artifacts: Path
    namespace: str
    unsafe_redis: bool = False


def read_cluster_settings(home: Path) -> ClusterSettings:
    """
    Raises:
        InvalidSetting: the first that is missing or cannot be.
    """
    config = read_config(home)
    return ClusterSettings(
        amqp_url=_url("SPELLQ_AMQP_URL", config, ("amqp", "amqps"), "amqp://user@host:5672/"),
        redis_url=_url("SPELLQ_REDIS_URL", config, ("redis", "rediss"), "redis://host:6379/0"),
        artifacts=_folder(
            _url("SPELLQ_ARTIFACTS_URL", config, ("file",), "file:///shared/artifacts")
        ),
        namespace=setting("SPELLQ_NAMESPACE", None, config) or DEFAULT_NAMESPACE,
        unsafe_redis=setting("SPELLQ_UNSAFE_REDIS", None, config) is not None,
    )


def _url(name: str, config: Mapping[str, Any], schemes: Sequence[str], example: str) -> str:
    value = setting(name, None, config)
    if value is None:
        raise InvalidSetting(f"{name} is missing. Set it, for example to {example}.")
    scheme, colon, _ = value.partition("://")
    if not colon or scheme not in schemes:
        known = " or ".join(f"{each}://" for each in schemes)
        raise InvalidSetting(f"{name} has to begin with {known}, for example {example}.")
    return value


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise InvalidSetting(
            f"SPELLQ_ARTIFACTS_URL {url[:_SHOWN]!r} names no folder of this machine: it has three "
            "slashes, as in file:///shared/artifacts."
        )
    return path


def _is_slots(text: str, least: int) -> bool:
    few_digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SLOTS))
    return few_digits and least <= int(text) <= MAX_SLOTS


def read_config(home: Path) -> Mapping[str, Any]:
    """The settings in `home/config.toml`, or none.

    Raises:
        InvalidSetting: the file cannot be read or is no TOML.
    """
    path = home / "config.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise InvalidSetting(
            f"{path} cannot be read: {error.strerror}. Make it a file you can read, or remove it."
        ) from error


def setting(name: str, flag: str | None, config: Mapping[str, Any]) -> str | None:
    """One setting by its environment name (`SPELLQ_PORT`), from the first place that has it.

    In the file it is written without the prefix, in lower case (`port = 7735`).
    """
    if flag is not None:
        return flag
    value = os.environ.get(name) or config.get(name.removeprefix("SPELLQ_").lower())
    return str(value) if value is not None else None
