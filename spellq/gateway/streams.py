"""Streams over HTTP: a run's log as JSON lines, events as server-sent events."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import Request, get
from litestar.params import FromPath, FromQuery
from litestar.response import ServerSentEvent, ServerSentEventMessage, Stream

from spellq.control.errors import Rejected
from spellq.events import Cursor, EventFilter, EventType, Logged
from spellq.gateway.auth import Caller
from spellq.gateway.services import Provided, Services
from spellq.logs import LogEntry
from spellq.runs import Status
from spellq.wire import LogLine, event_view

ApiRequest = Request[Caller, Any, Any]

_encode = msgspec.json.Encoder().encode_lines


@get("/runs/{number:int}/logs")
async def logs(
    number: FromPath[int],
    request: ApiRequest,
    services: Provided,
    offset: FromQuery[int] = 0,
    follow: FromQuery[bool] = False,
) -> Stream:
    """The run's log from an entry on (negative: from the end), as JSON lines.

    With `follow` it goes on until the run has ended and all of its log was sent.
    """
    await services.runs.get(number, request.user.sees)
    if offset < 0:
        length, _ = await services.store.log_state(number)
        offset = max(0, length + offset)
    lines = _lines(services, number, offset, follow)
    return Stream(lines, media_type="application/x-ndjson")


async def _lines(
    services: Services, number: int, offset: int, follow: bool
) -> AsyncIterator[bytes]:
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


@get("/events")
async def events(
    request: ApiRequest,
    services: Provided,
    run: FromQuery[list[int] | None] = None,
    workflow: FromQuery[int | None] = None,
    type: FromQuery[list[EventType] | None] = None,  # noqa: A002
    status: FromQuery[list[Status] | None] = None,
    after: FromQuery[Cursor | None] = None,
) -> ServerSentEvent:
    """Events from now on, or from after `Last-Event-ID`; filters narrow them, each may repeat."""
    wanted = EventFilter(
        runs=frozenset(run) if run else None,
        workflow=workflow,
        types=frozenset(type) if type else None,
        statuses=frozenset(status) if status else None,
        owner=request.user.sees,
    )
    cursor = request.headers.get("last-event-id") or after
    if cursor is not None:
        try:
            await services.store.events_after(cursor, 1)
        except ValueError as error:
            raise Rejected(f"{error}. Leave Last-Event-ID out to begin now.") from error
    return ServerSentEvent(_messages(services, wanted, cursor))


async def _messages(
    services: Services, wanted: EventFilter, cursor: Cursor | None
) -> AsyncIterator[ServerSentEventMessage]:
    yield ServerSentEventMessage(comment="spellq events")
    async for logged in services.feed.events(wanted, cursor):
        yield _message(logged)


def _message(logged: Logged) -> ServerSentEventMessage:
    return ServerSentEventMessage(
        data=msgspec.json.encode(event_view(logged.event)).decode(),
        event=logged.event.type,
        id=logged.cursor,
    )


HANDLERS = [logs, events]
