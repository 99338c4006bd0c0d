"""The gateway's parts: the socket's conversation, streams without end, activity, the daemon."""

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest
from litestar.exceptions import WebSocketDisconnect

from spellq.compose.embedded import _Starter
from spellq.control.errors import NotFound
from spellq.events import Event, EventType
from spellq.gateway import socket as socket_module
from spellq.gateway.activity import Activity
from spellq.gateway.auth import ADMIN, USER, Authenticator, Caller
from spellq.gateway.closing import Closing, OpenEnded
from spellq.gateway.crowd import most_connections
from spellq.gateway.errors import HANDLERS
from spellq.gateway.server import leave_when_idle
from spellq.gateway.socket import _Conversation
from spellq.ports import RunQuery, StoreFull, StoreUnavailable, Token
from spellq.runs import Run, RunSpec, Status
from spellq.tokens import make_token, token_hash
from spellq_brokers.embedded import SqliteStore
from tests.clocks import HandClock

NOW = HandClock().now()


def test_clients_leave_descriptors_to_the_runs() -> None:
    assert most_connections(20_000, 20) == 20_000 - 200 - 80
    assert most_connections(256, 20) == 16


@pytest.mark.parametrize(
    ("error", "status", "remedy"),
    [
        (StoreFull("The disk is full. Free some space."), 507, "Free some space"),
        (StoreUnavailable("away"), 503, "away"),
        (RuntimeError("can't start new thread"), 503, "ulimit -u"),
        (RuntimeError("a fault"), 500, "internal error of spellq"),
        (RecursionError("deep"), 400, "nested too deeply"),
    ],
)
def test_what_is_told_of_errors(error: Exception, status: int, remedy: str) -> None:
    request: Any = SimpleNamespace(method="GET", url=SimpleNamespace(path="/"))
    handler = next(HANDLERS[kind] for kind in type(error).__mro__ if kind in HANDLERS)
    reply = handler(request, error)
    assert reply.status_code == status
    assert remedy in reply.content.error


def a_run(number: int, status: Status = Status.MACHINE_REQUESTED) -> Run:
    return Run(
        id=number,
        owner="ada",
        spec=RunSpec("true"),
        status=status,
        version=1,
        attempt=1,
        created_at=NOW,
    )


def an_event(number: int, status: Status) -> Event:
    return Event(
        run=number, version=2, owner="ada", attempt=1, type=EventType.RUN_STATUS, status=status,
        at=NOW,
    )  # fmt: skip


class FakeFeed:
    newest = "0"

    def __init__(self) -> None:
        self.watchers: dict[int, list[Callable[[Event], None]]] = {}

    def add_watcher(self, number: int, watcher: Callable[[Event], None]) -> None:
        self.watchers.setdefault(number, []).append(watcher)

    def remove_watcher(self, number: int, watcher: Callable[[Event], None]) -> None:
        self.watchers[number].remove(watcher)
        if not self.watchers[number]:
            del self.watchers[number]

    def tell(self, event: Event) -> None:
        for watcher in tuple(self.watchers.get(event.run, ())):
            watcher(event)


class FakeRuns:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.answers: dict[int, Run | Exception] = {}
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def get(self, number: int, owner: str | None) -> Run:
        self.asked.set()
        await self.go_on.wait()
        answer = self.answers[number]
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeSocket:
    def __init__(self) -> None:
        self.user = Caller("ada", USER)
        self.sent: deque[dict[str, Any]] = deque()
        self.closed: tuple[int, str] | None = None
        self.reads = True
        self._said: asyncio.Queue[str | None] = asyncio.Queue()
        self._sent = asyncio.Event()

    def say(self, **message: Any) -> None:
        self._said.put_nowait(msgspec.json.encode(message).decode())

    def leave(self) -> None:
        self._said.put_nowait(None)

    async def receive_text(self) -> str:
        said = await self._said.get()
        if said is None:
            raise WebSocketDisconnect(detail="gone")
        return said

    async def send_text(self, text: str) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        self.sent.append(msgspec.json.decode(text))
        self._sent.set()

    async def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)

    async def answer(self) -> dict[str, Any]:
        while not self.sent:
            self._sent.clear()
            async with asyncio.timeout(5):
                await self._sent.wait()
        return self.sent.popleft()


class Talk:
    def __init__(self) -> None:
        self.socket = FakeSocket()
        self.feed = FakeFeed()
        self.runs = FakeRuns()
        self.activity = Activity()
        services = SimpleNamespace(feed=self.feed, runs=self.runs, activity=self.activity)
        self.conversation = _Conversation(self.socket, services)  # type: ignore[arg-type]
        self.task = asyncio.ensure_future(self.conversation.run())

    async def over(self) -> tuple[int, str] | None:
        async with asyncio.timeout(5):
            await self.task
        return self.socket.closed

    @property
    def is_quiet(self) -> bool:
        return self.activity.quiet_seconds() > 0


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    talk = Talk()
    yield talk
    talk.socket.leave()
    await talk.over()
    assert talk.feed.watchers == {}
    assert talk.is_quiet


async def test_nothing_is_answered_before_the_run_may_be_seen(talk: Talk) -> None:
    talk.runs.answers[7] = NotFound("There is no run 7.")
    talk.runs.go_on.clear()
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    await talk.runs.asked.wait()
    talk.feed.tell(an_event(7, Status.RUNNING))
    talk.runs.go_on.set()
    answer = await talk.socket.answer()
    assert (answer["op"], answer["status"]) == ("error", 404)
    await asyncio.sleep(0)
    assert not talk.socket.sent
    assert talk.feed.watchers == {}


async def test_what_happens_while_the_run_is_looked_at_counts(talk: Talk) -> None:
    talk.runs.answers[7] = a_run(7)
    talk.runs.go_on.clear()
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    await talk.runs.asked.wait()
    talk.feed.tell(an_event(7, Status.RUNNING))
    talk.feed.tell(an_event(7, Status.COMPLETE))
    talk.runs.go_on.set()
    assert await talk.socket.answer() == {"op": "reached", "id": 1, "status": "running"}
    talk.feed.tell(an_event(7, Status.RUNNING))
    await asyncio.sleep(0.01)
    assert not talk.socket.sent


async def test_a_doubled_id_leaves_the_first_request_open(talk: Talk) -> None:
    talk.runs.answers[7] = a_run(7)
    for _ in range(2):
        talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    assert (await talk.socket.answer())["error"] == "A request 1 is open already."
    talk.feed.tell(an_event(7, Status.RUNNING))
    assert (await talk.socket.answer())["op"] == "reached"


async def test_a_cancelled_wait_is_forgotten(talk: Talk) -> None:
    talk.runs.answers[7] = a_run(7)
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    talk.socket.say(op="cancel", id=1)
    talk.socket.say(op="cancel", id=1)
    talk.socket.say(op="wait", id=0, run=7, statuses=[])
    assert (await talk.socket.answer())["id"] == 0
    assert talk.feed.watchers == {}


async def test_a_socket_keeps_nobody_awake_unless_something_is_asked(talk: Talk) -> None:
    talk.runs.answers[7] = a_run(7)
    await asyncio.sleep(0.001)
    assert talk.is_quiet
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    talk.socket.say(op="wait", id=2, run=7, statuses=["killed"])
    talk.socket.say(op="nonsense", id=3)
    await talk.socket.answer()
    assert not talk.is_quiet
    talk.feed.tell(an_event(7, Status.RUNNING))
    await talk.socket.answer()
    assert not talk.is_quiet


async def test_a_client_that_never_reads_is_left(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_module, "MAX_UNSENT", 10)
    talk.socket.reads = False
    for _ in range(20):
        talk.socket.say(op="nonsense", id=1)
    assert await talk.over() == (1008, "10 answers wait to be read")


async def test_a_store_that_is_away_closes_the_socket_for_now(talk: Talk) -> None:
    talk.runs.answers[7] = StoreUnavailable("The store cannot read: é" + "é" * 100)
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    closed = await talk.over()
    assert closed is not None
    assert closed[0] == 1013
    assert len(closed[1].encode()) <= 123


async def test_a_fault_of_ours_is_logged(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    talk.socket.say(op="wait", id=1, run=7, statuses=["running"])
    assert (await talk.over() or (0, ""))[0] == 1011
    assert "KeyError" in caplog.text


# Streams without end


async def pieces(*given: bytes) -> AsyncGenerator[bytes, None]:
    for piece in given:
        yield piece
    await anyio.sleep_forever()


class Reader:
    def __init__(self) -> None:
        self.body = b""
        self.ended = False
        self.heard = asyncio.Event()
        self.gone = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.body += message.get("body", b"")
        self.ended = message.get("more_body") is False
        self.heard.set()

    async def until(self, body: bytes) -> None:
        async with asyncio.timeout(5):
            while not self.body.startswith(body):
                self.heard.clear()
                await self.heard.wait()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("who", ["gateway", "reader"])
async def test_a_stream_ends_when_either_side_leaves(who: str) -> None:
    closing, reader = Closing(), Reader()
    stream = OpenEnded(pieces(b"one ", b"two "), closing, media_type="text/plain")
    sending: Any = reader.send, reader.receive
    task = asyncio.ensure_future(stream.send_body(*sending))
    await reader.until(b"one two ")
    assert not task.done()
    closing.begin() if who == "gateway" else reader.gone.set()
    async with asyncio.timeout(5):
        await task
    assert reader.ended


async def test_a_silent_stream_says_that_it_is_there() -> None:
    closing, reader = Closing(), Reader()
    stream = OpenEnded(
        pieces(),
        closing,
        media_type="text/plain",
        keep_alive=b": here\n\n",
        keep_alive_seconds=0.01,
    )
    sending: Any = reader.send, reader.receive
    task = asyncio.ensure_future(stream.send_body(*sending))
    await reader.until(3 * b": here\n\n")
    closing.begin()
    await task
    assert reader.ended


# Who is calling, and whether anybody is


async def test_a_token_is_valid_while_it_is_stored() -> None:
    store = await SqliteStore.in_memory(HandClock())
    authenticator = Authenticator(store)
    token = make_token("ada", "laptop")
    await store.put_token(token_hash(token), Token("ada", "laptop", ADMIN, NOW))
    assert await authenticator.caller(f"Bearer {token}") == Caller("ada", ADMIN)
    await store.put_token(token_hash(token), Token("ada", "laptop", USER, NOW))
    assert await authenticator.caller(f"Bearer {token}") == Caller("ada", USER)
    await store.close()


async def test_a_store_that_cannot_tell_keeps_the_daemon(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[RunQuery] = []

    async def find(query: RunQuery) -> list[Run]:
        asked.append(query)
        if len(asked) < 3:
            raise StoreUnavailable("away")
        return []

    server: Any = SimpleNamespace(should_exit=False)
    services: Any = SimpleNamespace(activity=Activity(), store=SimpleNamespace(find=find))
    caplog.set_level(logging.WARNING)
    async with asyncio.timeout(5):
        await leave_when_idle(server, services, idle_seconds=0.01)
    assert len(asked) == 3
    assert server.should_exit
    assert "cannot tell whether runs are under way: away" in caplog.text


def test_the_starter_is_told_once() -> None:
    reading, writing = os.pipe()
    starter = _Starter(writing)
    starter.say({"url": "x"})
    recycled = os.dup(reading)  # takes the number that was closed
    starter.say({"error": "y"})
    assert os.read(reading, 100) == b'{"url": "x"}\n'
    assert os.read(reading, 100) == b""
    os.close(recycled)
    os.close(reading)


def test_a_starter_that_has_given_up_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    _Starter(writing).say({"url": "x"})
    with contextlib.suppress(OSError):
        os.fstat(writing)
        raise AssertionError("the descriptor was not closed")
