"""Whether anybody asks anything of the gateway."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send


class Activity:
    """Knows how long the gateway has been quiet.

    A request counts while it is being answered, and a socket while something is asked on it: one
    that is merely open keeps nobody awake.
    """

    def __init__(self) -> None:
        self._busy = 0
        self._last = time.monotonic()

    def watch(self, app: ASGIApp) -> ASGIApp:
        """`app`, with its requests counted."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == ScopeType.WEBSOCKET:
                self.stir()
                await app(scope, receive, send)
                return
            with self.busy():
                await app(scope, receive, send)

        return watched

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Somebody waits for something."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Somebody begins to wait for something; `end` has to follow."""
        self._busy += 1

    def end(self) -> None:
        self._busy -= 1
        self.stir()

    def stir(self) -> None:
        """Something happened just now."""
        self._last = time.monotonic()

    def quiet_seconds(self) -> float:
        """Seconds since anybody waited for anything; none while somebody does."""
        return 0.0 if self._busy else time.monotonic() - self._last
