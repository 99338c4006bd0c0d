"""Whether anybody asks anything of the gateway."""

import time

from litestar.types import ASGIApp, Receive, Scope, Send


class Activity:
    """Wraps the application and knows how long it has been quiet."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self.stir()

    def stir(self) -> None:
        """Something happened just now."""
        self._last = time.monotonic()

    def quiet_seconds(self) -> float:
        """Seconds since the last request was answered; none while one is being answered."""
        return 0.0 if self._open else time.monotonic() - self._last
