"""HTTP to the gateway: one session, requests that are repeated safely, streams in pieces.

aiohttp is imported when the first request is made.
"""

import asyncio
import contextlib
import io
import os
import socket
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from spellq.wire import IDEMPOTENCY_HEADER, ErrorReply
from spellq_sdk.backoff import backoff
from spellq_sdk.doors import Address, Door
from spellq_sdk.exceptions import (
    ClientException,
    JsonDecodeError,
    ServerError,
    bad_request,
    exception_for,
)

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

PATIENCE_SECONDS: Final = 10.0
"""How long a request is tried again while a gateway cannot be reached that never was."""

RETURN_SECONDS: Final = 600.0
"""The same for one that was reached before: it is being restarted, or stands still."""

AWAY_SECONDS: Final = 1.0
"""How long the gateway is away before `on_away` is called."""

CONNECT_SECONDS: Final = 5.0
REPLY_SECONDS: Final = 60.0
PIECE_BYTES: Final = 1 << 20
KEEP_SECONDS: Final = 4.0
"""How long an idle connection is kept: less than the server does, so that it is never stale."""

REQUESTS_AT_ONCE: Final = 64
HEARTBEAT_SECONDS: Final = 10.0
MESSAGE_BYTES: Final = 64 << 20

_TRY_AGAIN: Final = (502, 503, 504)
_AWAY: Final = {502: "bad gateway", 503: "unavailable", 504: "timed out"}

_JSON: Final = "application/json"

Query = Sequence[tuple[str, str]]


class ConnectionLost(ClientException):
    """The gateway could not be reached, or went away in the middle of an answer."""


class Transport:
    """All a client's traffic with one gateway. Belongs to one event loop.

    `on_away` is called with the URL once the gateway could not be reached, or could do nothing
    (502 to 504), for a second, and again only after it could.
    """

    def __init__(self, door: Door) -> None:
        self.on_away: Callable[[str], None] | None = None
        self._door = door
        self._address: Address | None = None
        self._finding = asyncio.Lock()
        self._at_once = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._was_reached = False
        self._away_since: float | None = None
        self._told_away = False
        _transports.add(self)

    async def address(self, failed: Address | None = None) -> Address:
        """Where the gateway is; `failed` is where it was looked for in vain.

        Raises:
            ClientException: the local daemon cannot be started.
        """
        if self._address is not None and self._address is not failed:
            return self._address
        async with self._finding:
            if self._address is None or self._address is failed:
                self._address = await self._door.locate()
            return self._address

    async def request(
        self, method: str, path: str, body: Any = None, *, reply: type[T], query: Query = ()
    ) -> T:
        """Send `body` as JSON and read a `reply`.

        Repeated while the gateway is away: for up to 10 s, and for ten minutes if it was there
        before. A POST carries the same idempotency key each time, so that it happens once.

        Raises:
            ClientException: refused (see exceptions), or the gateway could not be reached.
        """
        with _text():
            data = None if body is None else msgspec.json.encode(body)
        answer = await self._send(method, path, data, query=query, kind=_JSON)
        return self._decoded(answer, f"{method} {path}", reply)

    async def upload(self, path: str, source: bytes | Path) -> bytes:
        """PUT bytes, or a file in pieces. Repeated like any request."""
        return await self._send("PUT", path, source, kind="application/octet-stream")

    async def post_bytes(self, path: str, data: bytes, *, reply: type[T], kind: str = _JSON) -> T:
        """POST bytes as they are and read a `reply`. Repeated, and refused, like any request."""
        answer = await self._send("POST", path, data, kind=kind)
        return self._decoded(answer, f"POST {path}", reply)

    async def stream(self, path: str, query: Query = ()) -> AsyncGenerator[bytes, None]:
        """GET a body of any length in pieces of up to 1 MiB. One try; no limit in time.

        Raises:
            ConnectionLost: unreachable, or cut before the end.
            ClientException: refused.
        """
        address = await self.address()
        try:
            async with self._open(address, "GET", path, query=query) as response:
                await _check(response)
                _keep_alive(response)
                async for piece in response.content.iter_chunked(PIECE_BYTES):
                    yield piece
        except ConnectionLost:
            await self._forget(address)
            raise
        except ServerError as error:
            if _is_away(error):
                raise ConnectionLost(error.message, error.response, error) from error
            raise

    async def stream_lines(self, path: str, query: Query = ()) -> AsyncGenerator[bytes, None]:
        """`stream`, by lines. A line that was cut off is not given."""
        rest = b""
        async with contextlib.aclosing(self.stream(path, query)) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line:
                        yield line
        if rest:
            yield rest

    async def connect(self, path: str, failed: Address | None = None) -> "Connection":
        """Open a WebSocket. One try.

        Raises:
            ConnectionLost: unreachable; `address` on it is where it was looked for.
            ClientException: refused.
        """
        import aiohttp

        address = await self.address(failed)
        began = time.monotonic()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                websocket = await self._get_session().ws_connect(
                    address.url + path,
                    headers=_headers(address),
                    heartbeat=HEARTBEAT_SECONDS,
                    max_msg_size=MESSAGE_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                )
        except aiohttp.WSServerHandshakeError as error:
            if error.status >= 500:
                raise self._unreachable(address, error, began) from error
            if error.status in (401, 403):
                raise exception_for(error.status, error.message) from error
            raise _no_gateway(address, error) from error
        except aiohttp.ClientSSLError as error:
            raise ClientException(f"Cannot use {address.url}: {error}", None, error) from error
        except (aiohttp.ClientConnectionError, TimeoutError, OSError) as error:
            raise self._unreachable(address, error, began) from error
        except aiohttp.ClientError as error:
            raise _no_gateway(address, error) from error
        self._reached()
        return Connection(address, websocket)

    @property
    def was_reached(self) -> bool:
        """Whether a gateway has ever answered."""
        return self._was_reached

    @property
    def patience(self) -> float:
        """How long, in seconds, to try again while nobody answers."""
        return RETURN_SECONDS if self._was_reached else PATIENCE_SECONDS

    async def aclose(self) -> None:
        """Close every connection. Nothing can be asked afterwards."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def _send(
        self, method: str, path: str, data: bytes | Path | None, *, kind: str, query: Query = ()
    ) -> bytes:
        headers = {"Content-Type": kind} if data is not None else {}
        if method == "POST":
            headers[IDEMPOTENCY_HEADER] = uuid.uuid4().hex
        give_up_at = time.monotonic() + self.patience
        failed: Address | None = None
        async with self._at_once:
            for delay in backoff():
                address = await self.address(failed)
                try:
                    return await self._send_once(address, method, path, data, headers, query)
                except ClientException as error:
                    if not _is_away(error) or time.monotonic() + delay > give_up_at:
                        raise
                failed = address
                await asyncio.sleep(delay)
        raise AssertionError("backoff has no end")

    async def _send_once(
        self,
        address: Address,
        method: str,
        path: str,
        data: bytes | Path | None,
        headers: dict[str, str],
        query: Query,
    ) -> bytes:
        import aiohttp

        # How long a file takes nobody knows beforehand.
        reply_seconds = None if isinstance(data, Path) else REPLY_SECONDS
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=reply_seconds)
        with contextlib.ExitStack() as stack:
            body: Any = data
            if isinstance(data, bytes) and len(data) > PIECE_BYTES:
                body = io.BytesIO(data)  # aiohttp warns of long bytes: it sends them in one piece
            elif isinstance(data, Path):
                body = stack.enter_context(await asyncio.to_thread(data.open, "rb"))
            async with self._open(
                address, method, path, data=body, headers=headers, query=query, timeout=timeout
            ) as response:
                await _check(response)
                return await response.read()

    @contextlib.asynccontextmanager
    async def _open(
        self,
        address: Address,
        method: str,
        path: str,
        *,
        query: Query,
        data: Any = None,
        headers: dict[str, str] | None = None,
        timeout: "aiohttp.ClientTimeout | None" = None,
    ) -> AsyncGenerator["aiohttp.ClientResponse", None]:
        import aiohttp

        began = time.monotonic()
        with _text():
            path.encode()
            for pair in query:
                "".join(pair).encode()
        try:
            async with self._get_session().request(
                method,
                address.url + path,
                params=list(query),
                data=data,
                headers={**_headers(address), **(headers or {})},
                timeout=timeout or aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS),
                allow_redirects=False,
            ) as response:
                if response.status in _TRY_AGAIN:
                    self._note_away(address, began)
                else:
                    self._reached()
                yield response
        except (aiohttp.InvalidURL, aiohttp.ClientSSLError) as error:
            raise ClientException(f"Cannot use {address.url}: {error}", None, error) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(address, error, began) from error

    def _get_session(self) -> "aiohttp.ClientSession":
        import aiohttp

        if self._closed:
            raise ClientException("This client is closed.")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[_stay_here()],
            )
        return self._session

    def _decoded(self, answer: bytes, question: str, reply: type[T]) -> T:
        try:
            return msgspec.json.decode(answer, type=reply)
        except msgspec.DecodeError as error:
            url = self._address.url if self._address else "the gateway"
            raise JsonDecodeError(
                f"The answer of {url} to {question} could not be read: {error}. "
                "Is this a spellq gateway?",
                None,
                error,
            ) from error

    def _unreachable(self, address: Address, error: Exception, began: float) -> "Unreachable":
        self._note_away(address, began)
        return Unreachable(address, error)

    def _note_away(self, address: Address, began: float) -> None:
        self._away_since = began if self._away_since is None else self._away_since
        away = time.monotonic() - self._away_since
        if self.on_away and not self._told_away and away >= AWAY_SECONDS:
            self._told_away = True
            self.on_away(address.url)

    def _reached(self) -> None:
        self._was_reached = True
        self._away_since, self._told_away = None, False

    def _leave_to_the_parent(self) -> None:
        """After a fork: drop the session without touching its sockets or its loop's epoll."""
        if self._session is not None:
            connector = self._session.connector
            self._session.detach()
            if connector is not None:
                connector._closed = True  # else it closes in __del__ what the parent still uses

    async def _forget(self, address: Address) -> None:
        async with self._finding:
            if self._address is address:
                self._address = None


_transports: "weakref.WeakSet[Transport]" = weakref.WeakSet()


def _in_the_child() -> None:
    for transport in list(_transports):
        transport._leave_to_the_parent()


os.register_at_fork(after_in_child=_in_the_child)


class Unreachable(ConnectionLost):
    """Nobody answered at `address`."""

    def __init__(self, address: Address, error: BaseException) -> None:
        reason = getattr(error, "os_error", error)
        code = getattr(reason, "errno", None)
        why = os.strerror(code) if code else str(error) or type(error).__name__
        super().__init__(
            f"Could not reach spellq at {address.url}: {why}. "
            "Is it running, and is SPELLQ_URL right?",
            None,
            error,
        )
        self.address = address


class Connection:
    """An open WebSocket, and where it leads."""

    def __init__(self, address: Address, websocket: "aiohttp.ClientWebSocketResponse") -> None:
        self.address = address
        self._websocket = websocket

    async def send(self, text: str) -> None:
        """Send one message.

        Raises:
            ConnectionError: the connection is gone.
        """
        await self._websocket.send_str(text)

    async def messages(self) -> AsyncGenerator[str, None]:
        """The messages that come, until the connection is gone."""
        import aiohttp

        async for frame in self._websocket:
            if frame.type is aiohttp.WSMsgType.TEXT:
                yield frame.data

    async def aclose(self) -> None:
        await self._websocket.close()


def _is_away(error: ClientException) -> bool:
    return isinstance(error, ConnectionLost) or (
        error.response is not None and error.response.status_code in _TRY_AGAIN
    )


def _no_gateway(address: Address, error: Exception) -> ClientException:
    return ClientException(
        f"{address.url} does not open the connection for events: {error}. "
        "Is this a spellq gateway?",
        None,
        error,
    )


def _stay_here() -> "aiohttp.TraceConfig":
    """A gateway redirects nobody; and whoever follows shows the token to somebody else."""
    import aiohttp

    async def refuse(_session: Any, _context: Any, found: Any) -> None:
        where = found.response.headers.get("Location", "somewhere else")
        raise aiohttp.ClientPayloadError(f"it redirects to {where}")

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(refuse)
    return tracing


@contextlib.contextmanager
def _text() -> Iterator[None]:
    """What is sent is UTF-8; what cannot be is refused as the gateway would."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise bad_request(f"{error.object!a} cannot be sent: it is not valid UTF-8.") from None


def _headers(address: Address) -> dict[str, str]:
    return {"Authorization": f"Bearer {address.token}"}


async def _check(response: "aiohttp.ClientResponse") -> None:
    if response.status < 300:
        return
    text = await response.text(errors="replace")
    try:
        message = msgspec.json.decode(text, type=ErrorReply).error
    except msgspec.DecodeError:
        said = (
            text.strip()[:200] or response.reason or _AWAY.get(response.status, "no reason given")
        )
        origin = response.url.origin()
        message = (
            f"{origin} answered {response.method} {response.url.path} with {response.status}: "
            f"{said}. Is this a spellq gateway?"
        )
    raise exception_for(response.status, message)


def _keep_alive(response: "aiohttp.ClientResponse") -> None:
    """A stream may be silent for days; let the kernel find out when its other end is gone."""
    connection = response.connection
    transport = connection.transport if connection else None
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None:
        return
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if option := getattr(socket, name, None):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
