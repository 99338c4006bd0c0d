"""spellq's client: async (`AsyncClient`) and blocking (`Client`), over one transport.

The names are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from spellq_sdk.blocking import Client
    from spellq_sdk.client import AsyncClient
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
    from spellq_sdk.models import LogEntry, RunEvent

__all__ = [
    "AsyncClient",
    "BadRequest",
    "Client",
    "ClientException",
    "ConflictRequest",
    "JsonDecodeError",
    "LogEntry",
    "RunEvent",
    "ServerError",
    "UnauthorizedClient",
    "UnauthorizedRequest",
    "WaitError",
]

_HOMES: Final = {
    "AsyncClient": "spellq_sdk.client",
    "Client": "spellq_sdk.blocking",
    "LogEntry": "spellq_sdk.models",
    "RunEvent": "spellq_sdk.models",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "spellq_sdk.exceptions")), name)
    raise AttributeError(f"module 'spellq_sdk' has no attribute {name!r}")
