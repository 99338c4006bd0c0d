"""A loop in a thread of its own, that blocking code calls into."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

from spellq_sdk.exceptions import ClientException

T = TypeVar("T")

GATHERED: Final = 1000
"""How many items of a stream wait at most for a slow reader."""

CLOSE_SECONDS: Final = 5.0


class Portal:
    """Runs coroutines for any number of threads, also for one that has a running loop itself."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="spellq-client", daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._thread.start()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `work` makes, and give its result or raise its exception.

        An exception in the calling thread (KeyboardInterrupt) cancels it.

        Raises:
            ClientException: the portal is closed, or was made before this process was forked.
        """
        if self._pid != os.getpid():
            raise ClientException(
                "A client cannot be used in a process forked from the one that made it: "
                "make another one there."
            )
        with self._lock:  # nothing comes to the loop after its end was scheduled
            if self._closed:
                raise ClientException("This client is closed.")
            future = asyncio.run_coroutine_threadsafe(_called(work), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientException("This client was closed.") from None
        except BaseException:
            future.cancel()
            raise

    def stream(self, source: Callable[[], AsyncGenerator[T, None]]) -> Generator[T, None, None]:
        """The items of an async generator, as they come; closing it closes that one too."""
        pump = self.call(lambda: _Pump.start(source))
        try:
            while batch := self.call(pump.take):
                yield from batch
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the source
                self._loop.call_soon_threadsafe(pump.close)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `last`, cancel all that is still under way, and end the thread.

        Waits for that for at most 5 s, but not in a thread whose own loop is running, which it
        would hold up. Does nothing the second time, or in a forked process.
        """
        with self._lock:
            if self._closed or self._pid != os.getpid():
                return
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        if asyncio._get_running_loop() is None:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _finish(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await last()
        finally:
            self._loop.stop()


async def _called(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await work()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Pump:
    """Reads an async generator in one task, so that many items cost one change of threads."""

    def __init__(self, source: AsyncGenerator[Any, None]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue(GATHERED)
        self._failure: BaseException | None = None
        self._ended = asyncio.Event()
        self._task = asyncio.ensure_future(self._read(source))

    @classmethod
    async def start(cls, source: Callable[[], AsyncGenerator[Any, None]]) -> "_Pump":
        return cls(source())

    async def take(self) -> list[Any]:
        """All that is there, at least one item; empty at the end."""
        items = [] if self._items.empty() else [self._items.get_nowait()]
        if not items and not self._ended.is_set():
            items = [await self._items.get()]
        while not self._items.empty():
            items.append(self._items.get_nowait())
        if items and items[-1] is _END:
            items.pop()
            self._ended.set()
        if not items and self._failure:
            failure, self._failure = self._failure, None
            raise failure
        return items

    def close(self) -> None:
        self._task.cancel()

    async def _read(self, source: AsyncGenerator[Any, None]) -> None:
        async with contextlib.aclosing(source):
            try:
                async for item in source:
                    await self._items.put(item)
            except Exception as error:
                self._failure = error
            await self._items.put(_END)


_END: Final = object()
