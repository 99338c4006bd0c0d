"""spellq: launch runs, mount what earlier runs saved, wait for what happens.

The user's front door. The names below are handed on from the SDK when first used (PEP 562), so
that `import spellq` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from spellq.version import __version__

if TYPE_CHECKING:
    from spellq_sdk import (
        AsyncClient,
        Client,
        ClientException,
        WaitError,
    )

__all__ = ["AsyncClient", "Client", "ClientException", "WaitError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spellq_sdk"), name)
    raise AttributeError(f"module 'spellq' has no attribute {name!r}")
