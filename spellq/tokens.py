"""Tokens: `sq_<owner>_<name>_<secret>` for people and agents, `sqr_…` for a master run.

Secrets are 256 random bits; only SHA-256 of a whole token is ever stored.
"""

import hashlib
import secrets
from typing import Final

from msgspec import Struct

from spellq.runs import parse_number

_PERSON: Final = "sq_"
_MASTER: Final = "sqr_"


class MasterToken(Struct, frozen=True):
    """What a master run's token says of itself; the hash proves it."""

    run: int
    attempt: int


def make_token(owner: str, name: str) -> str:
    return f"{_PERSON}{owner}_{name}_{secrets.token_hex(32)}"


def make_master_token(run: int, attempt: int) -> str:
    return f"{_MASTER}{run}_{attempt}_{secrets.token_hex(32)}"


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def parse_master_token(token: str) -> MasterToken | None:
    """The run and attempt a master's token names, or None if it is no such token."""
    if not token.startswith(_MASTER):
        return None
    parts = token[len(_MASTER) :].split("_")
    if len(parts) != 3:
        return None
    run, attempt = parse_number(parts[0]), parse_number(parts[1])
    return None if run is None or attempt is None else MasterToken(run, attempt)
