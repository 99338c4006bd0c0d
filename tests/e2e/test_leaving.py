"""Ends: of workflows, into which nothing is launched any more, and of the daemon itself."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest

from spellq_sdk import AsyncClient, ClientException
from spellq_sdk.daemon import stop_daemon
from spellq_sdk.workflows import Workflow
from tests.e2e.conftest import Installation

LAUNCHES_ON_TERM = """
cat > launch.py <<'EOF'
import json, os, urllib.error, urllib.request
request = urllib.request.Request(
    os.environ["SPELLQ_URL"] + "/api/runs",
    json.dumps({"command": "sleep 60"}).encode(),
    {"Authorization": "Bearer " + os.environ["SPELLQ_TOKEN"], "Content-Type": "application/json"},
)
try:
    print("launch", urllib.request.urlopen(request).status, flush=True)
except urllib.error.HTTPError as error:
    print("launch", error.code, json.loads(error.read())["error"], flush=True)
EOF
trap 'python launch.py; exit 0' TERM
python launch.py
sleep 60 & wait
"""


@pytest.fixture
async def workflow(client: AsyncClient) -> Workflow:
    """A workflow whose master launched a worker, and tries again when it is stopped."""
    workflow = await client.workflows.new(command=LAUNCHES_ON_TERM)
    async for entry in workflow.managing_run.logs(follow=True):
        if entry.log.startswith("launch"):
            assert entry.log == "launch 201"
            break
    return workflow


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_an_ended_workflow_takes_no_more_runs(
    client: AsyncClient, workflow: Workflow, how: str
) -> None:
    await (workflow.stop() if how == "stop" else workflow.kill())
    with pytest.raises(ClientException) as caught:
        await client.runs.new(command="true", workflow_id=workflow.id)
    assert caught.value.response is not None
    assert caught.value.response.status_code == 409
    assert f"Workflow {workflow.id} takes no more runs" in str(caught.value)
    master = workflow.managing_run
    await master.wait_status(*client.runs.FINAL)
    await workflow.refresh()
    assert len(workflow.runs) == 1
    await workflow.runs[0].wait_status(*client.runs.FINAL)
    if how == "stop":
        said = [entry.log async for entry in master.logs()]
        assert f"launch 409 Workflow {workflow.id} takes no more runs" in "\n".join(said)
    with pytest.raises(ClientException, match="takes no more runs"):
        await client.runs.new(command="true", workflow_id=workflow.id)
    free = await client.runs.new(command="true")
    await free.wait_status("complete")


async def test_launches_while_a_workflow_is_killed_leave_nothing_behind(
    client: AsyncClient,
) -> None:
    workflow = await client.workflows.new(command="sleep 60")
    answers = await asyncio.gather(
        *(client.runs.new(command="sleep 60", workflow_id=workflow.id) for _ in range(20)),
        workflow.kill(),
        *(client.runs.new(command="sleep 60", workflow_id=workflow.id) for _ in range(20)),
        return_exceptions=True,
    )
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    assert all("takes no more runs" in str(error) for error in errors)
    await workflow.refresh()
    for run in workflow.runs:
        await run.wait_status(*client.runs.FINAL)


@pytest.fixture
async def followers(own: Installation) -> AsyncIterator[AsyncExitStack]:
    """A log, the events and a socket, all followed."""
    daemon = await asyncio.to_thread(own.start)
    headers = {"Authorization": f"Bearer {daemon.token}"}
    async with AsyncExitStack() as stack:
        session = aiohttp.ClientSession(daemon.url, headers=headers)
        await stack.enter_async_context(session)
        async with session.post("/api/runs", json={"command": "sleep 60"}) as launched:
            number = (await launched.json())["id"]
        for path in (f"/api/runs/{number}/logs?follow=true", "/api/events"):
            answer = await stack.enter_async_context(session.get(path))
            await answer.content.readany()
        socket = await stack.enter_async_context(session.ws_connect("/api/socket"))
        await socket.send_json({"op": "wait", "id": 1, "run": 4711, "statuses": ["complete"]})
        await socket.receive_json()
        await socket.send_json({"op": "wait", "id": 2, "run": number, "statuses": ["failed"]})
        yield stack


@pytest.mark.usefixtures("followers")
@pytest.mark.parametrize("arguments", [["--kill"], ["--stop"]])
async def test_the_daemon_leaves_its_followers_at_once_and_in_silence(
    own: Installation, arguments: list[str]
) -> None:
    began = time.monotonic()
    told = await asyncio.to_thread(own.spellq, "down", *arguments)
    assert told.returncode == 0, told.stderr
    assert time.monotonic() - began < 3
    log = await asyncio.to_thread((own.home / "log").read_text)
    assert "Traceback" not in log
    assert " ERROR " not in log


async def test_a_follower_who_does_not_read_is_left_too(own: Installation) -> None:
    daemon = await asyncio.to_thread(own.start)
    async with AsyncClient(daemon.url, daemon.token) as client:
        run = await client.runs.new(command="yes 0123456789012345678901234567890 | head -c 20M")
        await run.wait_status("complete")
    host, _, port = daemon.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    authorization = f"Authorization: Bearer {daemon.token}"
    request = f"GET /api/runs/{run.id}/logs HTTP/1.1\r\nHost: x\r\n{authorization}\r\n\r\n"
    writer.write(request.encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    await asyncio.to_thread(stop_daemon, own.home)
    assert time.monotonic() - began < 3
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    log = await asyncio.to_thread((own.home / "log").read_text)
    assert "Traceback" not in log
    assert " ERROR " not in log


async def test_a_follower_ends_in_good_order_when_the_daemon_leaves(own: Installation) -> None:
    daemon = await asyncio.to_thread(own.start)
    headers = {"Authorization": f"Bearer {daemon.token}"}
    async with aiohttp.ClientSession(daemon.url, headers=headers) as session:
        async with session.post("/api/runs", json={"command": "sleep 60"}) as launched:
            number = (await launched.json())["id"]
        async with (
            session.get(f"/api/runs/{number}/logs?follow=true") as log,
            session.get("/api/events") as events,
            session.ws_connect("/api/socket") as socket,
        ):
            await asyncio.to_thread(stop_daemon, own.home)
            async with asyncio.timeout(5):
                assert (await log.read()).endswith(b"\n")
                assert (await events.read()).endswith(b"\r\n\r\n")
                closed = await socket.receive()
                assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1012)
    assert " ERROR " not in await asyncio.to_thread((own.home / "log").read_text)
    again = await asyncio.to_thread(own.start)
    async with AsyncClient(again.url, again.token) as client:
        await (await client.runs.get(number)).kill()
