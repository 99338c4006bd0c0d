"""Times and durations as people read them."""

from datetime import UTC, datetime, timedelta
from typing import Final

_UNITS: Final = (
    (timedelta(minutes=1), timedelta(seconds=1), "second"),
    (timedelta(hours=1), timedelta(minutes=1), "minute"),
    (timedelta(days=1), timedelta(hours=1), "hour"),
    (timedelta(days=14), timedelta(days=1), "day"),
)


def ago(then: datetime, now: datetime) -> str:
    """`3 minutes ago`; after 14 days the date."""
    past = max(now - then, timedelta())
    for limit, unit, name in _UNITS:
        if past < limit:
            count = past // unit
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return then.astimezone(UTC).strftime("%Y-%m-%d")


def duration(span: timedelta) -> str:
    """`1d 2h 3m 4s`, from the first part that is not zero."""
    seconds = max(0, round(span.total_seconds()))
    parts = ((seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"))
    first = next((at for at, (count, _) in enumerate(parts) if count), len(parts))
    words = [f"{count}{unit}" for count, unit in parts[first:]]
    return " ".join([*words, f"{seconds % 60}s"])


def stamp(then: datetime) -> str:
    """`2020-05-06 15:56:07`, in UTC."""
    return then.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def listed(then: datetime, now: datetime) -> str:
    """The local time of a file in a list: `Oct 21 17:00`, or `Oct 21 2021` half a year on."""
    local = then.astimezone()
    recent = abs(now - then) < timedelta(days=183)
    return local.strftime("%b %d %H:%M" if recent else "%b %d %Y")
