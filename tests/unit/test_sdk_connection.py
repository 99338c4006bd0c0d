"""The client against a small gateway of the test's own, spoken to over real sockets."""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from spellq.events import EventType
from spellq.logs import LogEntry
from spellq.runs import FINAL, Status
from spellq.trees import Tree, TreeEntry
from spellq.wire import (
    Cancel,
    ClientMessage,
    EndedElsewhere,
    ErrorReply,
    EventMessage,
    EventView,
    Hashes,
    LogLine,
    Reached,
    RequestFailed,
    RunBatch,
    RunPage,
    RunRequest,
    RunView,
    ServerMessage,
    Subscribe,
    Wait,
    WorkflowView,
)
from spellq_sdk import BadRequest, ClientException, UnauthorizedRequest, WaitError, event_socket
from spellq_sdk.blocking import Client
from spellq_sdk.client import AsyncClient
from spellq_sdk.doors import LocalDoor

NOW = datetime(2024, 5, 6, 15, 56, 7, tzinfo=UTC)


def view(number: int, status: Status = Status.MACHINE_REQUESTED, command: str = "true") -> RunView:
    return RunView(
        id=number,
        status=status,
        version=1,
        attempt=1,
        command=command,
        machine_type="CPU",
        owner="ada",
        created_at=NOW,
        started_at=None,
        ended_at=None,
        user_exit_code=None,
        cause=None,
        reason="",
        description="",
        git_commit_hash="",
        repository="",
        cwd="",
        attached_resources={},
        environment_names=[],
        labels=[],
        workflow=None,
        master=False,
        agent=None,
        outputs_files=0,
        outputs_bytes=0,
        timeout_minutes=None,
    )


class MiniGateway:
    """Just enough of a gateway; `requests` and `connections` say what clients really did."""

    def __init__(self) -> None:
        self.port = 0
        self.reached: dict[int, list[Status]] = {}
        self.events: list[EventView] = []
        self.log: list[LogLine] = []
        self.log_cuts: list[int] = []
        self.artifacts: dict[str, bytes] = {}
        self.tree = Tree(())
        self.requests: list[str] = []
        self.keys: list[str] = []
        self.connections = 0
        self.waits_seen = 0
        self.changed = asyncio.Condition()
        self._open: dict[web.WebSocketResponse, dict[int, Wait | Subscribe]] = {}
        self._sent: dict[tuple[web.WebSocketResponse, int], int] = {}
        self._launched: dict[str, list[RunView]] = {}
        self._answers_lost = 0
        self.is_unavailable = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/api/socket", self._socket)
        app.router.add_post("/api/runs", self._new)
        app.router.add_post("/api/runs/batch", self._new_batch)
        app.router.add_get("/api/runs/{run}", self._get)
        app.router.add_get("/api/runs/{run}/logs", self._logs)
        app.router.add_get("/api/workflows/{workflow}", self._workflow)
        app.router.add_get("/api/resources/tree", self._tree)
        app.router.add_get("/api/artifacts/{sha256}", self._artifact)
        app.router.add_post("/api/artifacts/batch", self._batch)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self.cut()
        await self._runner.cleanup()

    def cut(self) -> None:
        """Break every event socket, as a killed gateway does."""
        for socket in self._open:
            assert socket._req is not None
            assert socket._req.transport is not None
            socket._req.transport.abort()

    def lose_answers(self, number: int) -> None:
        """Serve the next launches, and break the connection instead of answering."""
        self._answers_lost = number

    async def reach(self, run: int, status: Status) -> None:
        self.reached.setdefault(run, []).append(status)
        await self._push()

    async def happen(self, run: int, version: int, status: Status) -> None:
        self.events.append(
            EventView(
                run=run,
                version=version,
                type=EventType.RUN_STATUS,
                status=status,
                at=NOW,
                attempt=1,
                owner="ada",
            )
        )
        await self._push()

    async def until_waits(self, number: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.waits_seen >= number)

    async def _push(self) -> None:
        for socket, requests in list(self._open.items()):
            for number, request in list(requests.items()):
                with contextlib.suppress(ConnectionError):
                    await self._serve(socket, number, request)

    async def _serve(
        self, socket: web.WebSocketResponse, number: int, request: Wait | Subscribe
    ) -> None:
        if isinstance(request, Subscribe):
            start = self._sent[socket, number]
            self._sent[socket, number] = len(self.events)
            for place in range(start, len(self.events)):
                event = self.events[place]
                await send(socket, EventMessage(number, str(place + 1), event))
            return
        if request.run > 90_000:
            await send(socket, RequestFailed(number, 404, f"There is no run {request.run}."))
            return
        history = self.reached.get(request.run, [])
        if hit := next((status for status in history if status in request.statuses), None):
            await send(socket, Reached(number, hit))
        elif history and history[-1] in FINAL:
            await send(socket, EndedElsewhere(number, history[-1]))

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] != "Bearer secret":
            return error(401, "This token is not valid.")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        mine = self._open[socket] = {}
        try:
            async for frame in socket:
                message = msgspec.json.decode(frame.data, type=ClientMessage)
                if isinstance(message, Cancel):
                    mine.pop(message.id, None)
                    continue
                mine[message.id] = message
                if isinstance(message, Subscribe):
                    after = len(self.events) if message.after is None else int(message.after)
                    self._sent[socket, message.id] = after
                    await send(socket, EventMessage(message.id, str(after)))
                await self._serve(socket, message.id, message)
                async with self.changed:
                    self.waits_seen += 1
                    self.changed.notify_all()
        finally:
            del self._open[socket]
        return socket

    async def _new(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=RunRequest)
        return self._launch(request, [body])

    async def _new_batch(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=RunBatch)
        return self._launch(request, body.runs)

    def _launch(self, request: web.Request, runs: list[RunRequest]) -> web.StreamResponse:
        self.requests.append(f"{request.path} {len(runs)}")
        key = request.headers["Idempotency-Key"]
        self.keys.append(key)
        if any(run.command == "bad" for run in runs):
            return error(400, "bad is no command.")
        if key not in self._launched:
            first = 1 + sum(len(views) for views in self._launched.values())
            self._launched[key] = [
                view(first + place, command=run.command) for place, run in enumerate(runs)
            ]
        if self._answers_lost:
            self._answers_lost -= 1
            assert request.transport is not None
            request.transport.abort()
        views = self._launched[key]
        return reply(views[0] if request.path == "/api/runs" else RunPage(views), 201)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if self.is_unavailable:
            return web.json_response({"error": "The store is away."}, status=503)
        if request.headers["Authorization"] != "Bearer secret":
            return error(401, "This token is not valid.")
        number = int(request.match_info["run"])
        if number > 90_000:
            return error(404, f"There is no run {number}.")
        status = self.reached.get(number, [Status.MACHINE_REQUESTED])[-1]
        return reply(view(number, status))

    async def _workflow(self, request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["workflow"])
        return reply(
            WorkflowView(id=number, owner="ada", created_at=NOW, managing_run=view(1), runs=[])
        )

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        offset = int(request.query["offset"])
        start = max(0, len(self.log) + offset) if offset < 0 else offset
        response = web.StreamResponse()
        await response.prepare(request)
        for line in self.log[start:]:
            await response.write(msgspec.json.encode(line) + b"\n")
            if self.log_cuts and line.offset == self.log_cuts[0]:
                del self.log_cuts[0]
                await response.write(b'{"offset":99999,"en')
                assert request.transport is not None
                request.transport.close()
                return response
        return response

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        return reply(self.tree)

    async def _batch(self, request: web.Request) -> web.StreamResponse:
        contents = msgspec.msgpack.decode(await request.read(), type=list[bytes])
        return reply(Hashes([hashlib.sha256(content).hexdigest() for content in contents]))

    async def _artifact(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.artifacts[request.match_info["sha256"]])


async def send(socket: web.WebSocketResponse, message: ServerMessage) -> None:
    await socket.send_str(msgspec.json.encode(message).decode())


def reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status)


def error(status: int, message: str) -> web.Response:
    return reply(ErrorReply(message, status), status)


@pytest.fixture
async def gateway() -> AsyncIterator[MiniGateway]:
    gateway = MiniGateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest.fixture
async def client(gateway: MiniGateway) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.url, "secret") as client:
        yield client


async def test_ten_thousand_waits_share_one_connection_and_cost_no_task(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    runs = await client.runs.new_many([{"command": "true"}] * 10_000)
    tasks_before = len(asyncio.all_tasks())
    waits = [asyncio.ensure_future(run.wait_status(*client.runs.FINAL)) for run in runs]
    await gateway.until_waits(10_000)
    assert len(asyncio.all_tasks()) - tasks_before < 10_010
    for run in runs:
        gateway.reached[run.id] = [Status.COMPLETE]
    await gateway.reach(runs[0].id, Status.COMPLETE)
    await asyncio.gather(*waits)
    assert gateway.connections == 1
    assert gateway.requests == ["/api/runs/batch 500"] * 20


async def test_a_wait_survives_a_lost_connection(gateway: MiniGateway, client: AsyncClient) -> None:
    run = await client.runs.get(7)
    wait = asyncio.ensure_future(run.wait_status("running"))
    await gateway.until_waits(1)
    gateway.cut()
    await gateway.until_waits(2)
    await gateway.reach(7, Status.RUNNING)
    await wait
    assert gateway.connections == 2


async def test_a_wait_sees_what_happened_while_the_gateway_was_away(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    run = await client.runs.get(7)
    wait = asyncio.ensure_future(run.wait_status("complete"))
    await gateway.until_waits(1)
    await gateway.stop()
    gateway.reached[7] = [Status.RUNNING, Status.COMPLETE]
    await gateway.start()
    await wait


async def test_a_status_of_the_past_is_reached_at_once(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    gateway.reached[3] = [Status.RUNNING, Status.COMPLETE]
    await (await client.runs.get(3)).wait_status("running")


async def test_a_run_that_ended_elsewhere_raises(gateway: MiniGateway, client: AsyncClient) -> None:
    gateway.reached[3] = [Status.FAILED]
    run = await client.runs.get(3)
    with pytest.raises(WaitError, match=r"Run 3 ended with status 'failed'.*'complete'"):
        await run.wait_status("complete")


async def test_the_gateways_refusals_are_exceptions(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    with pytest.raises(ClientException, match="There is no run 99999") as caught:
        await client.runs.get(99_999)
    assert caught.value.response is not None
    assert caught.value.response.status_code == 404
    async with AsyncClient(gateway.url, "wrong") as stranger:
        with pytest.raises(UnauthorizedRequest):
            await stranger.runs.get(1)
        with pytest.raises(UnauthorizedRequest):
            await anext(stranger.events())


async def test_a_cancelled_wait_is_taken_back(gateway: MiniGateway, client: AsyncClient) -> None:
    run = await client.runs.get(7)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run.wait_status("running")
    again = asyncio.ensure_future(run.wait_status("running"))
    await gateway.reach(7, Status.RUNNING)
    await again
    assert gateway.connections == 1


async def test_closing_the_client_ends_its_waits(gateway: MiniGateway) -> None:
    client = AsyncClient(gateway.url, "secret")
    run = await client.runs.get(7)
    wait = asyncio.ensure_future(run.wait_status("running"))
    await gateway.until_waits(1)
    await client.aclose()
    with pytest.raises(ClientException, match="closed"):
        await wait


async def test_events_have_no_gap_and_no_repeat_over_reconnections(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    seen = []
    async with contextlib.aclosing(client.events()) as events:
        first = asyncio.ensure_future(anext(events))
        await gateway.until_waits(1)
        for version in range(1, 51):
            await gateway.happen(5, version, Status.RUNNING)
            if version % 10 == 0:
                gateway.cut()
            if version % 20 == 0:
                gateway.events.append(gateway.events[-1])  # a repeat, as after a crash
        seen.append(await first)
        while len(seen) < 50:
            seen.append(await anext(events))
    assert [event.version for event in seen] == list(range(1, 51))
    assert gateway.connections > 1
    assert seen[0].status == "running"


async def test_a_slow_reader_is_resumed_where_it_was(
    gateway: MiniGateway, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_socket, "UNREAD_EVENTS", 10)
    for version in range(1, 101):
        await gateway.happen(5, version, Status.RUNNING)
    async with contextlib.aclosing(client.events(after="0")) as events:
        seen = [(await anext(events)).version for _ in range(100)]
    assert seen == list(range(1, 101))


async def test_launches_of_one_tick_travel_together(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    runs = await asyncio.gather(*(client.runs.new(command=f"echo {n}") for n in range(60)))
    assert [run.command for run in runs] == [f"echo {n}" for n in range(60)]
    assert (await client.runs.new(command="true")).id == 61
    assert gateway.requests == ["/api/runs/batch 60", "/api/runs 1"]


async def test_one_bad_launch_spoils_no_other(gateway: MiniGateway, client: AsyncClient) -> None:
    commands = ("a", "bad", "b")
    results = await asyncio.gather(
        *(client.runs.new(command=command) for command in commands), return_exceptions=True
    )
    assert [type(result).__name__ for result in results] == ["Run", "BadRequest", "Run"]
    with pytest.raises(BadRequest, match="bad is no command"):
        await client.runs.new_many([{"command": "a"}, {"command": "bad"}])


async def test_a_launch_whose_answer_was_lost_happens_once(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    gateway.lose_answers(2)
    run = await client.runs.new(command="true")
    assert run.id == 1
    assert len(gateway.keys) == 3
    assert len(set(gateway.keys)) == 1
    assert (await client.runs.new(command="true")).id == 2


async def test_a_gateway_that_stays_away_is_named(
    gateway: MiniGateway, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.transport.PATIENCE_SECONDS", 0.1)
    await gateway.stop()
    with pytest.raises(ClientException, match=f"127.0.0.1:{gateway.port}") as caught:
        await client.runs.new(command="true")
    assert caught.value.exception is not None
    await gateway.start()


async def test_a_gateway_that_was_there_before_is_waited_for(
    gateway: MiniGateway, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.transport.PATIENCE_SECONDS", 0.0)
    away = asyncio.Event()
    client.gateway.transport.on_away = lambda _: away.set()
    monkeypatch.setattr("spellq_sdk.transport.AWAY_SECONDS", 0.1)
    await client.runs.get(7)
    await gateway.stop()
    launch = asyncio.create_task(client.runs.new(command="true"))
    await away.wait()
    assert not launch.done()
    await gateway.start()
    assert (await launch).id == 1


def lines(number: int) -> list[LogLine]:
    texts = [f"line {n}" for n in range(number - 1)]
    user = [LogEntry(status=Status.RUNNING, log=text, at=NOW) for text in texts]
    end = LogEntry(status=Status.COMPLETE, log="Run 7 complete", at=NOW, status_event=True)
    return [LogLine(offset, entry) for offset, entry in enumerate([*user, end])]


@pytest.mark.parametrize("follow", [True, False])
async def test_a_log_goes_on_where_it_was_cut(
    gateway: MiniGateway, client: AsyncClient, follow: bool
) -> None:
    gateway.log, gateway.log_cuts = lines(100), [10, 50]
    run = await client.runs.get(7)
    entries = [entry async for entry in run.logs(follow=follow)]
    assert [str(entry) for entry in entries] == [line.entry.log for line in gateway.log]
    assert gateway.log_cuts == []
    assert (entries[0].status_event, entries[-1].status_event) == (None, True)
    assert entries[0].timestamp == "2024-05-06T15:56:07+00:00"


async def test_a_negative_offset_counts_from_the_end(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    gateway.log = lines(100)
    run = await client.runs.get(7)
    assert [entry.offset async for entry in run.logs(offset=-3)] == [97, 98, 99]


def stored(gateway: MiniGateway, path: str, content: bytes, executable: bool = False) -> TreeEntry:
    sha256 = hashlib.sha256(content).hexdigest()
    gateway.artifacts[sha256] = content
    return TreeEntry(path, len(content), sha256, executable=executable)


async def test_cp_copies_files_modes_and_links(
    gateway: MiniGateway, client: AsyncClient, tmp_path: Path
) -> None:
    big = bytes(range(256)) * 20_000
    gateway.tree = Tree(
        (
            stored(gateway, "a/big.bin", big),
            stored(gateway, "go", b"#!/bin/sh\n", executable=True),
            TreeEntry("latest", link="a/big.bin"),
        )
    )
    await (await client.runs.get(7)).cp("", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "latest").read_bytes() == (out / "a/big.bin").read_bytes() == big
    assert (out / "go").stat().st_mode & 0o111
    assert not (out / "a/big.bin").stat().st_mode & 0o111
    assert sorted(path.name for path in out.rglob("*")) == ["a", "big.bin", "go", "latest"]


async def test_cp_never_writes_outside_its_destination(
    gateway: MiniGateway, client: AsyncClient, tmp_path: Path
) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "trap").symlink_to(outside)
    gateway.tree = Tree((stored(gateway, "trap/x", b"x"),))
    run = await client.runs.get(7)
    with pytest.raises(ClientException, match="leads out of"):
        await run.cp("", inside)
    for path in ("../x", "/x"):
        gateway.tree = Tree((stored(gateway, path, b"x"),))
        with pytest.raises(ClientException, match="unsafe"):
            await run.cp("", inside)
    gateway.tree = Tree((TreeEntry("a/up", link=".."), TreeEntry("out", link="a/up/../..")))
    with pytest.raises(ClientException, match="leads out of"):
        await run.cp("", inside)
    assert os.listdir(outside) == []
    assert not (inside / "out").is_symlink()


async def test_cp_leaves_nothing_of_a_damaged_file(
    gateway: MiniGateway, client: AsyncClient, tmp_path: Path
) -> None:
    entry = stored(gateway, "x", b"right")
    assert entry.sha256 is not None
    gateway.artifacts[entry.sha256] = b"wrong"
    gateway.tree = Tree((entry,))
    with pytest.raises(ClientException, match="damaged"):
        await (await client.runs.get(7)).cp("", tmp_path)
    assert os.listdir(tmp_path) == []


async def test_the_active_workflow_is_loaded_on_entering(gateway: MiniGateway) -> None:
    async with AsyncClient(gateway.url, "secret", workflow_id=14) as client:
        assert client.active_workflow is not None
        assert repr(client.active_workflow).startswith("Workflow(id=14, managing_run=Run(id=1, ")


@pytest.fixture
def served() -> Iterator[tuple[MiniGateway, asyncio.AbstractEventLoop]]:
    """A gateway in a thread of its own, for blocking clients."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> MiniGateway:
        gateway = MiniGateway()
        await gateway.start()
        return gateway

    gateway = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield gateway, loop
    asyncio.run_coroutine_threadsafe(gateway.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


Served = tuple[MiniGateway, asyncio.AbstractEventLoop]


def test_the_blocking_client_serves_several_threads(served: Served) -> None:
    gateway, loop = served
    with Client(gateway.url, "secret") as client:
        run = client.runs.new(command="true")
        woken: list[int] = []

        def wait(number: int) -> None:
            run.wait_status(*client.runs.FINAL)
            woken.append(number)

        threads = [threading.Thread(target=wait, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        asyncio.run_coroutine_threadsafe(gateway.until_waits(20), loop).result()
        asyncio.run_coroutine_threadsafe(gateway.reach(run.id, Status.COMPLETE), loop).result()
        for thread in threads:
            thread.join()
        assert sorted(woken) == list(range(20))
        assert gateway.connections == 1
        assert run.status == client.runs.MACHINE_REQUESTED
        run.refresh()
        assert run.status == client.runs.COMPLETE


def test_the_blocking_client_works_inside_a_running_loop(served: Served) -> None:
    gateway, _ = served
    code = (
        "import asyncio, spellq\n"
        "async def cell():\n"
        f"    client = spellq.Client({gateway.url!r}, 'secret')\n"
        "    assert client.runs.new(command='true').id == 1\n"
        "asyncio.run(cell())\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_blocking_logs_can_be_left_early(served: Served) -> None:
    gateway, _ = served
    gateway.log = lines(5000)
    with Client(gateway.url, "secret") as client:
        run = client.runs.get(7)
        for entry in run.logs(follow=True):
            if entry.offset == 10:
                break
        assert len(list(run.logs())) == 5000
        with pytest.raises(ClientException, match="not available"):
            list(run.metrics("loss"))


def test_an_interrupt_ends_a_blocking_wait_at_once(served: Served) -> None:
    gateway, loop = served

    def interrupt() -> None:
        asyncio.run_coroutine_threadsafe(gateway.until_waits(1), loop).result()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    with Client(gateway.url, "secret") as client:
        run = client.runs.get(7)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run.wait_status("running")
        thread.join()
        assert client.runs.get(7).id == 7


def test_a_closed_client_says_so(served: Served) -> None:
    gateway, _ = served
    client = Client(gateway.url, "secret")
    run = client.runs.get(7)
    client.close()
    client.close()
    with pytest.raises(ClientException, match="closed"):
        run.refresh()


def test_a_forked_child_leaves_its_parents_client_alone(served: Served) -> None:
    gateway, _ = served
    code = (
        "import gc, os, sys, spellq\n"
        f"client = spellq.Client({gateway.url!r}, 'secret')\n"
        "run = client.runs.get(7)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    client = run = None  # as where a function ends\n"
        "    gc.collect()\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert client.runs.get(8).id == 8\n"
        "run.wait_status('running')\n"
    )
    gateway.reached[7] = [Status.RUNNING]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    assert gateway.connections == 1


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:7735", "ftp://example.org", "http://", "http://host:port", "https://[::"]
)
def test_a_url_that_is_none_is_said_at_once(url: str) -> None:
    with pytest.raises(ClientException, match=r"is not the URL of a gateway.*http://127\.0\.0\.1"):
        AsyncClient(url, "secret")


@pytest.fixture
async def stranger() -> AsyncIterator[str]:
    """A web server that is no gateway: a page for everything, and some places that moved."""

    async def page(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/moved"):
            raise web.HTTPFound("/elsewhere")
        return web.Response(text="<html>Hello</html>", content_type="text/html")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", page)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("path", ["", "/moved"])
async def test_what_is_no_gateway_is_named(stranger: str, path: str) -> None:
    async with AsyncClient(stranger + path, "secret") as client:
        with pytest.raises(ClientException, match=f"{stranger}.*Is this a spellq gateway"):
            await client.runs.get(1)
        with pytest.raises(ClientException, match=f"{stranger}.*Is this a spellq gateway"):
            await anext(client.events())


async def test_what_is_not_utf8_is_refused(client: AsyncClient) -> None:
    with pytest.raises(BadRequest, match=r"command is not valid UTF-8.*udce9"):
        await client.runs.new(command="echo \udce9")
    with pytest.raises(BadRequest, match="not valid UTF-8"):
        await client.ls("runs/1/\udce9")
    with pytest.raises(BadRequest, match="not valid UTF-8"):
        await client.runs.list(labels=["\udce9"])


async def test_a_gateway_that_is_away_is_told_of_once(
    gateway: MiniGateway, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.transport.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("spellq_sdk.transport.AWAY_SECONDS", 0.05)
    told: list[str] = []
    client.gateway.transport.on_away = told.append
    await gateway.stop()
    with pytest.raises(ClientException):
        await client.runs.get(1)
    assert told == [gateway.url]
    await gateway.start()


async def test_a_gateway_that_can_do_nothing_is_told_of_and_waited_for(
    gateway: MiniGateway, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spellq_sdk.transport.AWAY_SECONDS", 0.05)
    told = asyncio.Event()
    client.gateway.transport.on_away = lambda _: told.set()
    await client.runs.get(7)
    gateway.is_unavailable = True
    asking = asyncio.create_task(client.runs.get(7))
    await told.wait()
    gateway.is_unavailable = False
    assert (await asking).id == 7


@pytest.mark.parametrize("number", ["7", True, 1.5, None])
async def test_a_number_is_a_whole_one(client: AsyncClient, number: object) -> None:
    with pytest.raises(TypeError, match="run_id"):
        await client.runs.get(number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workflow_id"):
        await client.workflows.get(number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="number"):
        await client.runs.list(number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels"):
        await client.runs.list(labels="nightly")


async def test_an_unknown_type_of_event_is_refused(client: AsyncClient) -> None:
    with pytest.raises(BadRequest, match=r"Unknown type 'x'.*run\.created"):
        await anext(client.events(types=["x"]))


async def test_cp_into_a_file_is_refused(client: AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = await client.runs.get(7)
    with pytest.raises(ClientException, match="file is not a folder"):
        await run.cp("", tmp_path / "file")


def test_nobody_waits_for_a_daemon_that_starts_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, over = threading.Event(), threading.Event()

    def ensure(*_: object, **__: object) -> None:
        started.set()
        over.wait(30)

    async def interrupted() -> None:
        locating = asyncio.ensure_future(LocalDoor(tmp_path).locate())
        await asyncio.to_thread(started.wait)
        locating.cancel()

    monkeypatch.setattr("spellq_sdk.doors.ensure_daemon", ensure)
    asyncio.run(interrupted())
    assert not over.is_set()
    over.set()


async def test_small_contents_are_posted_together(
    gateway: MiniGateway, client: AsyncClient
) -> None:
    contents = [b"a", b"", b"x" * 2_000_000]
    stored = await client.gateway.upload_batch(contents)
    assert stored == [hashlib.sha256(content).hexdigest() for content in contents]
