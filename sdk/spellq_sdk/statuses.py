"""The status words, comparison words and the check of what a caller waits for."""

from typing import ClassVar, Final

from spellq.events import EventType
from spellq.runs import FINAL, Status
from spellq_sdk.exceptions import bad_request

FINAL_WORDS: Final[tuple[str, ...]] = tuple(status.value for status in FINAL)


class Constants:
    """The words of `client.runs`, as class attributes. All are plain strings."""

    USER_REQUESTED: ClassVar[str] = Status.USER_REQUESTED.value
    MACHINE_REQUESTED: ClassVar[str] = Status.MACHINE_REQUESTED.value
    BUILDING: ClassVar[str] = Status.BUILDING.value
    MOUNTING: ClassVar[str] = Status.MOUNTING.value
    RUNNING: ClassVar[str] = Status.RUNNING.value
    STOPPING: ClassVar[str] = Status.STOPPING.value
    KILLING: ClassVar[str] = Status.KILLING.value
    SAVING: ClassVar[str] = Status.SAVING.value
    PUSHING: ClassVar[str] = Status.PUSHING.value
    COMPLETE: ClassVar[str] = Status.COMPLETE.value
    FAILED: ClassVar[str] = Status.FAILED.value
    BUILD_FAILED: ClassVar[str] = Status.BUILD_FAILED.value
    MOUNT_FAILED: ClassVar[str] = Status.MOUNT_FAILED.value
    INTERRUPTED: ClassVar[str] = Status.INTERRUPTED.value
    KILLED: ClassVar[str] = Status.KILLED.value
    STOPPED: ClassVar[str] = Status.STOPPED.value
    FINAL: ClassVar[tuple[str, ...]] = FINAL_WORDS
    """The statuses a run ends in."""

    EQUALS: ClassVar[str] = "eq"
    GREATER_THAN: ClassVar[str] = "gt"
    GREATER_THAN_EQUALS: ClassVar[str] = "gte"
    LESS_THAN: ClassVar[str] = "lt"
    LESS_THAN_EQUALS: ClassVar[str] = "lte"


def parse_statuses(words: tuple[str, ...], what: str = "wait_status") -> tuple[Status, ...]:
    """The statuses that `words` name, in their order.

    Raises:
        BadRequest: none given, or one that is no status; the message names the valid ones.
    """
    if not words:
        raise bad_request(f"{what} needs at least one status.")
    return tuple(_parse(word, what) for word in words)


def parse_types(words: tuple[str, ...]) -> frozenset[str]:
    """The types of events that `words` name.

    Raises:
        BadRequest: one that is none; the message names those there are.
    """
    known = [kind.value for kind in EventType]
    for word in words:
        if word not in known:
            raise bad_request(f"Unknown type {word!r}. The types are: {', '.join(known)}.")
    return frozenset(words)


def _parse(word: str, what: str) -> Status:
    if not isinstance(word, str):
        raise bad_request(f"{what} takes statuses one by one: write {what}(*client.runs.FINAL).")
    try:
        return Status(word)
    except ValueError:
        raise bad_request(
            f"Unknown status {word!r}. The statuses are: {', '.join(Status)}."
        ) from None
