"""Events: every change of a run's state, and how the state is folded from them."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import msgspec
from msgspec import Struct

from spellq.runs import SCHEMA, Cause, Reached, Run, Status

Cursor = str
"""A place in the event log, opaque to everyone but the log that made it."""

BEGINNING: Final[Cursor] = "0"
"""The cursor of every log's beginning, before the oldest event that is kept."""


class EventType(StrEnum):
    RUN_CREATED = "run.created"
    RUN_STATUS = "run.status"
    RUN_LABEL = "run.label"
    RUN_HURRIED = "run.hurried"
    RUN_LOST = "run.lost"
    RUN_FOUND = "run.found"
    RUN_LATE = "run.late"
    WORKFLOW_CREATED = "workflow.created"


class Event(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One change of one run.

    `version` is the event's place in its run (dense, from 1). `data` holds the fields of the run
    that changed, so that folding a run's events in order gives its state.
    """

    run: int
    version: int
    owner: str
    attempt: int
    type: EventType
    status: Status
    at: datetime
    schema: int = SCHEMA
    workflow: int | None = None
    cause: Cause | None = None
    data: dict[str, Any] = {}


class Logged(Struct, frozen=True):
    """An event and its place in the log."""

    cursor: Cursor
    event: Event


_FIELDS: Final[Mapping[str, Any]] = {info.name: info.type for info in msgspec.structs.fields(Run)}


def fold(events: Iterable[Event], run: Run | None = None) -> Run | None:
    """The state after `events`, which follow `run`'s version without a gap.

    Raises:
        ValueError: an event does not follow the one before.
    """
    for event in events:
        run = _fold_one(run, event)
    return run


def _fold_one(run: Run | None, event: Event) -> Run:
    if event.version != (run.version + 1 if run else 1):
        raise ValueError(
            f"run {event.run}: event {event.version} does not follow {run.version if run else 0}"
        )
    changes = {
        name: msgspec.convert(msgspec.to_builtins(value), _FIELDS[name])
        for name, value in event.data.items()
        if name in _FIELDS
    }
    if run is None:
        run = Run(
            id=event.run,
            owner=event.owner,
            spec=changes.pop("spec"),
            status=event.status,
            version=0,
            attempt=event.attempt,
            created_at=event.at,
            workflow=event.workflow,
        )
    return changed(run, event, changes)


def changed(run: Run, event: Event, changes: Mapping[str, Any]) -> Run:
    """`run` after `event`, whose data are `changes`."""
    entered = event.status is not run.status or event.version == 1
    return msgspec.structs.replace(
        run,
        **changes,
        status=event.status,
        version=event.version,
        attempt=event.attempt,
        history=(*run.history, Reached(event.status, event.version, event.at))
        if entered
        else run.history,
    )


class EventFilter(Struct, frozen=True, omit_defaults=True):
    """Which events a subscriber wants. What is not given matches everything."""

    runs: frozenset[int] | None = None
    workflow: int | None = None
    types: frozenset[str] | None = None
    statuses: frozenset[Status] | None = None
    owner: str | None = None

    def matches(self, event: Event) -> bool:
        return (
            (self.runs is None or event.run in self.runs)
            and (self.workflow is None or event.workflow == self.workflow)
            and (self.types is None or event.type in self.types)
            and (self.statuses is None or event.status in self.statuses)
            and (self.owner is None or event.owner == self.owner)
        )
