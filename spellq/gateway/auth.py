"""Who is calling: a bearer token on every request, from people, agents and master runs."""

import secrets
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult
from msgspec import Struct

from spellq.control.errors import Unauthorized
from spellq.ports import Store
from spellq.tokens import parse_master_token, token_hash

ADMIN: Final = "admin"
USER: Final = "user"
MASTER: Final = "master"

_REMEDY: Final = "Set SPELLQ_TOKEN to a valid one; `spellq token` prints the local daemon's."


class Caller(Struct, frozen=True):
    """Whom a request comes from. `workflow` is the one a master run belongs to."""

    owner: str
    scope: str
    workflow: int | None = None

    @property
    def sees(self) -> str | None:
        """The owner whose runs the caller sees; None is everybody's."""
        return None if self.scope == ADMIN else self.owner


class Authenticator:
    """Tells callers by their tokens. It remembers none: a token is valid while it is stored."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def caller(self, authorization: str) -> Caller:
        """
        Raises:
            Unauthorized: no bearer token, an unknown one, or one of an attempt that is over.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized(f"A bearer token is missing. {_REMEDY}")
        master = parse_master_token(token)
        if master is not None:
            return await self._master(master.run, master.attempt, token)
        known = await self._store.get_token(token_hash(token))
        if known is None:
            raise Unauthorized(f"The token is not valid. {_REMEDY}")
        return Caller(known.owner, known.scope)

    async def _master(self, number: int, attempt: int, token: str) -> Caller:
        run = await self._store.get(number)
        expected = (run.token_hash if run is not None else None) or ""
        genuine = secrets.compare_digest(token_hash(token), expected)
        if run is None or not genuine or run.attempt != attempt:
            raise Unauthorized(f"The token of master run {number} is not valid (any more).")
        return Caller(run.owner, MASTER, run.workflow)


class AuthenticationMiddleware(AbstractAuthenticationMiddleware):
    """Lets nobody in without a token, over HTTP and WebSocket alike."""

    async def authenticate_request(
        self, connection: ASGIConnection[Any, Any, Any, Any]
    ) -> AuthenticationResult:
        authenticator: Authenticator = connection.app.state.services.authenticator
        caller = await authenticator.caller(connection.headers.get("authorization", ""))
        return AuthenticationResult(user=caller, auth=None)
