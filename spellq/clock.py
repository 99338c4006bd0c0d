"""The real clock, and real chance."""

import secrets
import time
from datetime import UTC, datetime


class SystemClock:
    """Implements `spellq.ports.Clock`."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def fresh_id(self) -> str:
        return secrets.token_hex(16)
