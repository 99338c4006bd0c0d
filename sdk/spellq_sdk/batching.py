"""Launches that are asked for together travel together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from spellq.wire import RunRequest, RunView
from spellq_sdk.exceptions import ClientException

BATCH: Final = 500
"""The most runs one request carries."""

Send = Callable[[Sequence[RunRequest]], Awaitable[list[RunView]]]


class LaunchBatcher:
    """Gathers the launches of one tick of the loop into one request.

    A launch alone is sent alone. When a batch is refused as a whole, each of its launches is sent
    by itself, so that only the one that is wrong raises.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[tuple[RunRequest, asyncio.Future[RunView]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def launch(self, request: RunRequest) -> RunView:
        """The launched run. A caller that is cancelled after its request left may have a run."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[RunView] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((request, future))
        return await future

    async def aclose(self) -> None:
        """Cancel what is still being sent."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    def _flush(self) -> None:
        waiting = [(request, future) for request, future in self._waiting if not future.done()]
        self._waiting = []
        for start in range(0, len(waiting), BATCH):
            task = asyncio.ensure_future(self._deliver(waiting[start : start + BATCH]))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _deliver(self, batch: list[tuple[RunRequest, asyncio.Future[RunView]]]) -> None:
        try:
            views = await self._send([request for request, _ in batch])
        except ClientException as error:
            if len(batch) > 1 and _is_the_callers_fault(error):
                await asyncio.gather(*(self._deliver([one]) for one in batch))
                return
            _fail(batch, error)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            _fail(batch, error)
        else:
            for (_, future), view in zip(batch, views, strict=True):
                if not future.done():
                    future.set_result(view)


def _fail(batch: list[tuple[RunRequest, asyncio.Future[RunView]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)


def _is_the_callers_fault(error: ClientException) -> bool:
    return error.response is not None and error.response.status_code in (400, 404, 409, 413)
