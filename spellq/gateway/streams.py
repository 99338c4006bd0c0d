"""Streams over HTTP: a run's log as JSON lines, events as server-sent events."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import msgspec
from litestar import get
from litestar.params import FromPath, FromQuery
from litestar.response import ServerSentEventMessage

from spellq.control.errors import Rejected
from spellq.events import Cursor, EventFilter, EventType, Logged
from spellq.gateway.closing import OpenEnded
from spellq.gateway.services import ApiRequest, Provided, Services
from spellq.logs import LogEntry
from spellq.runs import MAX_NUMBER, Status
from spellq.wire import LogLine, event_view

_JSON_LINES: Final = "application/x-ndjson"
_EVENT_STREAM: Final = "text/event-stream"
_STREAM_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",
}

_encode = msgspec.json.Encoder().encode_lines


@get("/runs/{number:int}/logs", media_type=_JSON_LINES)
async def logs(
    number: FromPath[int],
    request: ApiRequest,
    services: Provided,
    offset: FromQuery[int] = 0,
    follow: FromQuery[bool] = False,
) -> OpenEnded:
    """The run's log from an entry on (negative: from the end), as JSON lines.

    With `follow` it goes on until the run has ended and all of its log was sent. A gateway that
    closes ends it too: as long as the run has not ended, ask again from the next offset.
    """
    await services.runs.get(number, request.user.sees)
    if abs(offset) > MAX_NUMBER:
        raise Rejected("The offset is beyond every log.")
    if offset < 0:
        length, _ = await services.store.log_state(number)
        offset = max(0, length + offset)
    lines = _lines(services, number, offset, follow)
    return OpenEnded(lines, services.closing, media_type=_JSON_LINES)


async def _lines(
    services: Services, number: int, offset: int, follow: bool
) -> AsyncGenerator[bytes, None]:
    while True:
        with services.feed.log_growth(number) as growth:
            run = await services.store.get(number)
            entries = await services.store.read(number, offset)
            if not entries and follow and run is not None and not run.is_final:
                await growth.wait()
                continue
        if not entries:
            return
        yield _chunk(offset, entries)
        offset += len(entries)


def _chunk(offset: int, entries: list[LogEntry]) -> bytes:
    return _encode([LogLine(offset + place, entry) for place, entry in enumerate(entries)])


@get("/events", media_type=_EVENT_STREAM)
async def events(
    request: ApiRequest,
    services: Provided,
    run: FromQuery[list[int] | None] = None,
    workflow: FromQuery[int | None] = None,
    type: FromQuery[list[EventType] | None] = None,  # noqa: A002
    status: FromQuery[list[Status] | None] = None,
    after: FromQuery[Cursor | None] = None,
) -> OpenEnded:
    """Events from now on, or from after `Last-Event-ID`; filters narrow them, each may repeat.

    What happens after this answer has begun is in it.
    """
    wanted = EventFilter(
        runs=frozenset(run) if run else None,
        workflow=workflow,
        types=frozenset(type) if type else None,
        statuses=frozenset(status) if status else None,
        owner=request.user.sees,
    )
    cursor = request.headers.get("last-event-id") or after
    if cursor is None:
        cursor = services.feed.newest
    else:
        await _check_cursor(services, cursor)
    return OpenEnded(
        _messages(services, wanted, cursor),
        services.closing,
        media_type=_EVENT_STREAM,
        headers=_STREAM_HEADERS,
        keep_alive=ServerSentEventMessage(comment="still here", data=None).encode(),
    )


async def _check_cursor(services: Services, cursor: Cursor) -> None:
    try:
        await services.feed.check(cursor)
    except (ValueError, OverflowError) as error:
        raise Rejected(
            f"{cursor[:40]!r} is no cursor of this event log. "
            "Leave Last-Event-ID (or after) out to begin now."
        ) from error


async def _messages(
    services: Services, wanted: EventFilter, cursor: Cursor
) -> AsyncGenerator[bytes, None]:
    yield ServerSentEventMessage(comment="spellq events", data=None).encode()
    async with aclosing(services.feed.events(wanted, cursor)) as found:
        async for logged in found:
            yield _message(logged).encode()


def _message(logged: Logged) -> ServerSentEventMessage:
    return ServerSentEventMessage(
        data=msgspec.json.encode(event_view(logged.event)).decode(),
        event=logged.event.type,
        id=logged.cursor,
    )


HANDLERS = [logs, events]
