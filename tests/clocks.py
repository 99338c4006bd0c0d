"""A clock a test sets by hand."""

import secrets
from datetime import UTC, datetime, timedelta


class HandClock:
    """Implements `spellq.ports.Clock`; time passes when the test says so."""

    def __init__(self) -> None:
        self._now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self._monotonic = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def fresh_id(self) -> str:
        return secrets.token_hex(16)

    def pass_seconds(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds
