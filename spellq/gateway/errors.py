"""Every error as one JSON body: `{"error": sentence, "status": number}`."""

import logging
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException

from spellq.control.errors import Rejected
from spellq.ports import StoreFull, StoreUnavailable
from spellq.wire import ErrorReply

_log = logging.getLogger(__name__)


def _reply(status: int, error: str) -> Response[ErrorReply]:
    return Response(ErrorReply(error=error, status=status), status_code=status)


def rejected(_: Request[Any, Any, Any], error: Rejected) -> Response[ErrorReply]:
    return _reply(error.status, str(error))


def full(_: Request[Any, Any, Any], error: StoreFull) -> Response[ErrorReply]:
    return _reply(507, str(error))


def unavailable(_: Request[Any, Any, Any], error: StoreUnavailable) -> Response[ErrorReply]:
    return _reply(503, str(error))


def http_error(_: Request[Any, Any, Any], error: HTTPException) -> Response[ErrorReply]:
    """What the framework found wrong: unknown path, body that does not decode, body too large."""
    text = error.detail
    if isinstance(error.extra, list):
        found = [
            f"{problem.get('key', 'body')}: {problem.get('message', '')}"
            for problem in error.extra
            if isinstance(problem, dict)
        ]
        text = "; ".join(found) or text
    elif error.__cause__ is not None and error.status_code == 400:
        text = str(error.__cause__)
    return _reply(error.status_code, text)


def too_deep(_: Request[Any, Any, Any], __: RecursionError) -> Response[ErrorReply]:
    return _reply(400, "The body is nested too deeply.")


def exhausted(request: Request[Any, Any, Any], error: RuntimeError) -> Response[ErrorReply]:
    """Python has no type of its own for a thread that cannot be started."""
    if "can't start new thread" not in str(error):
        return unexpected(request, error)
    return _reply(
        503,
        "There are too many processes or threads here. End some, or raise the limit (`ulimit -u`, "
        "or pids.max of the control group), then try again.",
    )


def unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorReply]:
    """A fault of ours: the log tells it whole, the caller learns that it is ours."""
    _log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return _reply(500, f"An internal error of spellq: {type(error).__name__}. Its log tells more.")


HANDLERS: dict[Any, Any] = {
    Rejected: rejected,
    StoreFull: full,
    StoreUnavailable: unavailable,
    HTTPException: http_error,
    RecursionError: too_deep,
    RuntimeError: exhausted,
    Exception: unexpected,
}
