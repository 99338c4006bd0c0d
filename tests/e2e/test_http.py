"""The HTTP door as others use it: server-sent events, logs, artifacts, repeated requests."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from spellq.wire import LogLine
from spellq_sdk import AsyncClient
from spellq_sdk.daemon import LocalDaemon


@pytest.fixture
async def http(daemon: LocalDaemon) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {daemon.token}"}
    async with aiohttp.ClientSession(daemon.url, headers=headers) as session:
        yield session


async def sse(http: aiohttp.ClientSession, count: int, path: str, **headers: str) -> list[str]:
    """The ids of the first events of a stream."""
    ids: list[str] = []
    async with http.get(path, headers=headers) as answer:
        assert answer.content_type == "text/event-stream"
        async for line in answer.content:
            if line.startswith(b"id: "):
                ids.append(line[4:].decode().strip())
                if len(ids) == count:
                    break
    return ids


async def test_events_go_on_from_the_last_one_seen(
    http: aiohttp.ClientSession, client: AsyncClient
) -> None:
    run = await client.runs.new(command="true")
    await run.wait_status(*client.runs.FINAL)
    path = f"/api/events?run={run.id}&after=0"
    ids = await sse(http, 6, path)
    assert len(set(ids)) == 6
    again = await sse(http, 3, f"/api/events?run={run.id}", **{"Last-Event-ID": ids[2]})
    assert again == ids[3:]
    final = await sse(http, 1, path + "&status=complete&type=run.status")
    assert final == ids[-1:]


async def test_a_last_event_id_of_nobody_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.get("/api/events", headers={"Last-Event-ID": "nonsense"}) as answer:
        assert answer.status == 400
        assert "Last-Event-ID" in (await answer.json())["error"]


async def test_logs_are_json_lines_from_any_offset(
    http: aiohttp.ClientSession, client: AsyncClient
) -> None:
    run = await client.runs.new(command="echo one; echo two")
    async with http.get(f"/api/runs/{run.id}/logs?follow=true") as answer:
        followed = [msgspec.json.decode(line, type=LogLine) async for line in answer.content]
    assert [line.offset for line in followed] == list(range(len(followed)))
    assert {"one", "two"} <= {line.entry.log for line in followed}
    async with http.get(f"/api/runs/{run.id}/logs?offset=-2") as answer:
        tail = [msgspec.json.decode(line, type=LogLine) async for line in answer.content]
    assert tail == followed[-2:]


async def test_what_happens_once_the_stream_has_begun_is_in_it(
    http: aiohttp.ClientSession, client: AsyncClient
) -> None:
    for _ in range(20):
        async with http.get("/api/events?type=run.created") as answer:
            run = await client.runs.new(command="true")
            async with asyncio.timeout(5):
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        break
            assert msgspec.json.decode(line[6:])["run"] == run.id


@pytest.mark.parametrize("path", ["/api/runs", "/api/workflows"])
async def test_a_repeated_request_launches_nothing_more(
    http: aiohttp.ClientSession, path: str
) -> None:
    headers = {"Idempotency-Key": os.urandom(16).hex()}
    request = {"command": "true"}
    body = request if path == "/api/runs" else {"run": request}
    answers = []
    for _ in range(3):
        async with http.post(path, json=body, headers=headers) as answer:
            assert answer.status == 201
            answers.append((await answer.json())["id"])
    assert len(set(answers)) == 1


async def test_a_key_belongs_to_its_request(http: aiohttp.ClientSession) -> None:
    headers = {"Idempotency-Key": os.urandom(16).hex()}
    runs: list[int] = []
    workflows: list[int] = []
    for path, body in (
        ("/api/workflows", {"run": {"command": "true"}}),
        ("/api/workflows", {"run": {"command": "echo other"}}),
        ("/api/runs", {"command": "true"}),
        ("/api/runs", {"command": "echo other"}),
        ("/api/runs/batch", {"runs": [{"command": "true"}]}),
        ("/api/runs/batch", {"runs": [{"command": "true"}] * 3}),
    ):
        first: list[Any] = []
        again: list[Any] = []
        for answers in (first, again):
            async with http.post(path, json=body, headers=headers) as answer:
                assert answer.status == 201, await answer.text()
                reply = await answer.json()
            if path == "/api/workflows":
                answers += [reply["id"], reply["created_at"], reply["managing_run"]["id"]]
            else:
                answers += [run["id"] for run in reply.get("runs", [reply])]
        assert first == again
        if path == "/api/workflows":
            workflows.append(first[0])
            runs.append(first[2])
        else:
            runs += first
    assert len(set(runs)) == len(runs) == 8
    assert len(set(workflows)) == 2


async def test_large_contents_travel_both_ways_without_being_held(
    http: aiohttp.ClientSession, daemon: LocalDaemon, tmp_path: Path
) -> None:
    piece = os.urandom(1 << 20)
    pieces = 192
    digest = hashlib.sha256()
    for _ in range(pieces):
        digest.update(piece)
    name = digest.hexdigest()

    async def content() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield piece

    before = peak_memory(daemon.pid)
    async with http.put(f"/api/artifacts/{name}", data=content()) as answer:
        assert answer.status == 204
    received = hashlib.sha256()
    async with http.get(f"/api/artifacts/{name}") as answer:
        async for part in answer.content.iter_any():
            received.update(part)
    assert received.hexdigest() == name
    assert peak_memory(daemon.pid) - before < (pieces << 20) / 3


def peak_memory(pid: int) -> int:
    """The most memory the process ever held, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")
