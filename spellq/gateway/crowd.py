"""How many connections are served at once: clients never take the descriptors that runs need."""

import asyncio
import resource
from typing import Any, Final

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from spellq.wire import ErrorReply

FEWEST: Final = 16
RESERVED: Final = 200
"""Descriptors kept for the store, its logs, and whatever is opened for a moment."""

RESERVED_PER_SLOT: Final = 4
REFUSED_SECONDS: Final = 5.0
"""How long a refused connection may stay to read why."""

REFUSED_AT_ONCE: Final = 50
"""So many may stay; those beyond are not told why."""

_REFUSAL: Final = msgspec.json.encode(
    ErrorReply(
        "There are too many connections to spellq on this machine. End some clients, or raise the "
        "limit of open files (`ulimit -Hn`), restart spellq, and try again.",
        503,
    )
)


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_connections(descriptors: int, slots: int) -> int:
    """How many connections a process with so many descriptors and slots can serve."""
    return max(FEWEST, descriptors - RESERVED - RESERVED_PER_SLOT * slots)


def protocol(most: int) -> type[asyncio.Protocol]:
    """HTTP that answers 503 on connections beyond `most`, and lets go of them soon, or at once."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"most": most})


class _LimitedProtocol(HttpToolsProtocol):
    most = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        beyond = len(self.connections) - self.most
        if beyond > REFUSED_AT_ONCE:
            transport.abort()
        elif beyond > 0:
            self.app = _refuse
            self.loop.call_later(REFUSED_SECONDS, transport.abort)

    def _should_upgrade(self) -> bool:
        return self.app is not _refuse and super()._should_upgrade()


async def _refuse(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL})
