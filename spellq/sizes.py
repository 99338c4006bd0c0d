"""Sizes in bytes, as people write and read them."""

import re
from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB")
_SIZE: Final = re.compile(r"(\d{1,15}) ?(B|KiB|MiB|GiB)?", re.ASCII)


def human_size(size: float) -> str:
    """`1.5 GiB`, `12 MiB`, `3 B`: bytes for people."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.1f}".removesuffix(".0") + f" {unit}"
        size /= 1024
    raise AssertionError


def parse_size(text: str) -> int | None:
    """The bytes that `268435456` or `256MiB` means; None when it means nothing."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    return int(found[1]) << 10 * _UNITS.index(found[2] or "B")
