"""What `spell.client` raises."""

from spellq_sdk.exceptions import (
    BadRequest,
    ClientException,
    ConflictRequest,
    JsonDecodeError,
    ServerError,
    UnauthorizedClient,
    UnauthorizedRequest,
    WaitError,
)

__all__ = [
    "BadRequest",
    "ClientException",
    "ConflictRequest",
    "JsonDecodeError",
    "ServerError",
    "UnauthorizedClient",
    "UnauthorizedRequest",
    "WaitError",
]
