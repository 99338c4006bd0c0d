"""What keeps a process from serving: errors whose message is all that the user needs to be told."""

from typing import Final

from spellq.daemon import AlreadyRunning, UnusableHome
from spellq.gateway.server import CannotListen
from spellq.ports import StoreUnavailable
from spellq.seal import UnusableKey
from spellq.settings import InvalidSetting


class CannotStart(Exception):
    """The daemon cannot start; the message says why and what would help."""


REFUSALS: Final = (
    InvalidSetting,
    AlreadyRunning,
    CannotListen,
    CannotStart,
    UnusableHome,
    UnusableKey,
    StoreUnavailable,
    OSError,
)


def only_error(error: BaseException) -> BaseException:
    """What task groups wrapped, if that is a single error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
