"""What the client raises. The names and the tree are Spell's, so that its scripts catch them."""

from typing import Final

from msgspec import Struct


class Response(Struct, frozen=True):
    """What the gateway answered: the HTTP status and the text of the body."""

    status_code: int
    text: str = ""


class ClientException(Exception):
    """A request that could not be served, or a gateway that could not be reached.

    `message` says what happened, `response` is the answer where there was one (a number nobody
    has is a plain ClientException whose `response.status_code` is 404), and `exception` is the
    error below it, for example of the network.
    """

    def __init__(
        self,
        msg: str | None = None,
        response: Response | None = None,
        exception: BaseException | None = None,
    ) -> None:
        self.message = msg if msg is not None else str(exception or "")
        self.response = response
        self.exception = exception
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class ServerError(ClientException):
    """The gateway failed (500 and above)."""


class BadRequest(ClientException):
    """The request makes no sense (400)."""


class UnauthorizedRequest(ClientException):
    """The token is not valid, or no longer (401)."""


class ConflictRequest(ClientException):
    """The request does not fit the state of things (409)."""


class JsonDecodeError(ClientException):
    """The gateway's answer could not be read."""


class WaitError(ClientException):
    """What was waited for can no longer happen: the run has ended."""


class UnauthorizedClient(Exception):
    """A client was made without a token."""


_BY_STATUS: Final[dict[int, type[ClientException]]] = {
    400: BadRequest,
    401: UnauthorizedRequest,
    409: ConflictRequest,
}


def exception_for(status: int, message: str) -> ClientException:
    """The exception that an answer of that HTTP status means."""
    kind = ServerError if status >= 500 else _BY_STATUS.get(status, ClientException)
    return kind(message, Response(status, message))


def bad_request(message: str) -> BadRequest:
    """What the gateway would have answered, known without asking it."""
    return BadRequest(message, Response(400, message))
