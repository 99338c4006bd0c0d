"""What a client asks of its gateway, one method a question."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from spellq.events import EventFilter
from spellq.logs import LogEntry as StoredEntry
from spellq.runs import FINAL
from spellq.trees import InvalidTreeError, Tree, decode_tree, encode_tree
from spellq.wire import (
    Hashes,
    LabelRequest,
    LogLine,
    LsReply,
    Me,
    RunBatch,
    RunPage,
    RunReply,
    RunRequest,
    RunView,
    TreeReply,
    WorkflowRequest,
    WorkflowView,
)
from spellq_sdk.backoff import backoff
from spellq_sdk.batching import BATCH, LaunchBatcher
from spellq_sdk.event_socket import EventSocket
from spellq_sdk.exceptions import JsonDecodeError
from spellq_sdk.models import RunEvent, run_event
from spellq_sdk.transport import ConnectionLost, Transport

PAGE: Final = 200
_KNOWN_RUNS: Final = 100_000
_lines = msgspec.json.Decoder(LogLine)


class Gateway:
    """Typed questions over one transport and one event socket."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.socket = EventSocket(transport)
        self._batcher = LaunchBatcher(self.launch_all)

    async def launch(self, request: RunRequest) -> RunView:
        """Launch a run; those asked for in the same tick of the loop travel together."""
        return await self._batcher.launch(request)

    async def launch_all(self, requests: Sequence[RunRequest]) -> list[RunView]:
        """Launch at most 500 runs in one request: all of them or (an error) none."""
        if len(requests) == 1:
            view = await self.transport.request("POST", "/api/runs", requests[0], reply=RunView)
            return [view]
        batch = RunBatch(list(requests))
        page = await self.transport.request("POST", "/api/runs/batch", batch, reply=RunPage)
        if len(page.runs) != len(requests):
            raise JsonDecodeError(
                f"{len(requests)} runs were asked for and {len(page.runs)} came back."
            )
        return page.runs

    async def launch_many(self, requests: Sequence[RunRequest]) -> list[RunView]:
        """Launch any number, 500 a request and one request after the other, in order."""
        views: list[RunView] = []
        for start in range(0, len(requests), BATCH):
            views += await self.launch_all(requests[start : start + BATCH])
        return views

    async def run(self, run: int) -> RunView:
        return await self.transport.request("GET", f"/api/runs/{run}", reply=RunView)

    async def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        labels: Sequence[str] = (),
        workflow: int | None = None,
        live: bool = False,
    ) -> RunPage:
        """The newest `limit` runs below the number `before`, newest first."""
        query = [("limit", str(limit))] + [("label", label) for label in labels]
        if before is not None:
            query.append(("before", str(before)))
        if workflow is not None:
            query.append(("workflow", str(workflow)))
        if live:
            query.append(("live", "true"))
        return await self.transport.request("GET", "/api/runs", reply=RunPage, query=query)

    async def runs(
        self, number: int, *, labels: Sequence[str] = (), workflow: int | None, live: bool
    ) -> list[RunView]:
        """The newest `number` runs, newest first."""
        found: list[RunView] = []
        before: int | None = None
        while len(found) < number:
            page = await self.page(
                limit=min(PAGE, number - len(found)),
                before=before,
                labels=labels,
                workflow=workflow,
                live=live,
            )
            found += page.runs
            before = page.next
            if before is None:
                break
        return found

    async def end(self, run: int, how: str, grace_seconds: float | None = None) -> RunReply:
        """`how` is "stop", whose grace may be given, or "kill"."""
        path = f"/api/runs/{run}/{how}"
        query = _grace(grace_seconds)
        return await self.transport.request("POST", path, reply=RunReply, query=query)

    async def label(self, run: int, change: LabelRequest) -> RunView:
        path = f"/api/runs/{run}/labels"
        return await self.transport.request("POST", path, change, reply=RunView)

    async def launch_workflow(self, request: RunRequest) -> WorkflowView:
        body = WorkflowRequest(request)
        return await self.transport.request("POST", "/api/workflows", body, reply=WorkflowView)

    async def workflow(self, workflow: int) -> WorkflowView:
        path = f"/api/workflows/{workflow}"
        return await self.transport.request("GET", path, reply=WorkflowView)

    async def end_workflow(
        self, workflow: int, how: str, grace_seconds: float | None = None
    ) -> WorkflowView:
        """As `end`, for the master run and every worker run."""
        path = f"/api/workflows/{workflow}/{how}"
        query = _grace(grace_seconds)
        return await self.transport.request("POST", path, reply=WorkflowView, query=query)

    async def me(self) -> Me:
        return await self.transport.request("GET", "/api/me", reply=Me)

    async def ls(self, path: str) -> LsReply:
        query = [("path", path)]
        return await self.transport.request("GET", "/api/resources/ls", reply=LsReply, query=query)

    async def tree(self, resource: str) -> Tree:
        """The saved files at a resource, checked.

        Raises:
            JsonDecodeError: not a tree, or one with unsafe paths.
        """
        data = b""
        async for piece in self.transport.stream("/api/resources/tree", [("path", resource)]):
            data += piece
        try:
            return decode_tree(data)
        except InvalidTreeError as error:
            raise JsonDecodeError(f"The files of {resource} are unsafe: {error}") from error

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those of the SHA-256 hashes whose content is not stored yet."""
        path = "/api/artifacts/missing"
        reply = await self.transport.request("POST", path, Hashes(list(hashes)), reply=Hashes)
        return reply.hashes

    async def upload(self, sha256: str, source: bytes | Path) -> None:
        """Store content under its hash; a file is sent in pieces."""
        await self.transport.upload(f"/api/artifacts/{sha256}", source)

    async def upload_batch(self, contents: Sequence[bytes]) -> list[str]:
        """Store contents of at most 64 KiB each, at most 1,000 and 8 MiB; gives their hashes."""
        data = msgspec.msgpack.encode(list(contents))
        reply = await self.transport.post_bytes(
            "/api/artifacts/batch", data, reply=Hashes, kind="application/msgpack"
        )
        return reply.hashes

    async def create_tree(self, tree: Tree) -> str:
        """Store a tree whose files are all stored, and give its id."""
        _, data = encode_tree(tree)
        return (await self.transport.post_bytes("/api/trees", data, reply=TreeReply)).id

    async def logs(self, run: int, *, follow: bool, offset: int) -> AsyncGenerator[LogLine, None]:
        """The run's log from `offset` on (negative: from the end), no line missing or twice.

        A follow goes on over lost connections until the run is final and all was given.
        """
        at = offset
        delays = backoff()
        give_up_at = time.monotonic() + self.transport.patience
        while True:
            heard, last = False, None
            try:
                async with contextlib.aclosing(self._log_once(run, follow, at)) as lines:
                    async for line in lines:
                        heard, at, last = True, line.offset + 1, line.entry
                        yield line
                if not follow or await self._log_is_over(run, last, heard):
                    return
            except ConnectionLost:
                if not (follow or heard) and time.monotonic() > give_up_at:
                    raise
            if heard:
                delays = backoff()
                give_up_at = time.monotonic() + self.transport.patience
            await asyncio.sleep(next(delays))

    async def _log_once(self, run: int, follow: bool, at: int) -> AsyncGenerator[LogLine, None]:
        query = [("offset", str(at))] + ([("follow", "true")] if follow else [])
        path = f"/api/runs/{run}/logs"
        async with contextlib.aclosing(self.transport.stream_lines(path, query)) as lines:
            async for line in lines:
                try:
                    decoded = _lines.decode(line)
                except msgspec.DecodeError as error:
                    raise ConnectionLost(f"A line of run {run}'s log was cut.") from error
                yield decoded

    async def _log_is_over(self, run: int, last: StoredEntry | None, heard: bool) -> bool:
        """A gateway that shuts down may end a followed log as if it were over."""
        if last is not None and last.status_event and last.status in FINAL:
            return True
        return (await self.run(run)).status in FINAL and not heard

    async def events(
        self, wanted: EventFilter, after: str | None
    ) -> AsyncGenerator[RunEvent, None]:
        """The events that match, without the repeats that follow a lost connection."""
        latest: dict[int, int] = {}
        async with contextlib.aclosing(self.socket.events(wanted, after)) as messages:
            async for message in messages:
                event = run_event(message)
                if event is None or event.version <= latest.get(event.run, 0):
                    continue
                latest.pop(event.run, None)
                latest[event.run] = event.version
                if len(latest) > _KNOWN_RUNS:
                    del latest[next(iter(latest))]
                yield event

    async def aclose(self) -> None:
        await self._batcher.aclose()
        await self.socket.aclose()
        await self.transport.aclose()


def _grace(seconds: float | None) -> list[tuple[str, str]]:
    return [] if seconds is None else [("grace_seconds", repr(seconds))]
