"""The loop: time costs nothing, the dead do nothing, and the real world cannot be reached."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from tests.simulation.loop import Process, Stuck, VirtualLoop
from tests.simulation.sealed import Unsealed, sealed


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.bury([])
    loop.close()


def test_a_year_passes_at_once(loop: VirtualLoop) -> None:
    async def wait() -> float:
        await anyio.sleep(365 * 86_400)
        with anyio.move_on_after(60):
            await anyio.Event().wait()
        return asyncio.get_running_loop().time()

    assert loop.run_until_complete(wait()) == 365 * 86_400 + 60


def test_timers_of_one_moment_come_in_the_order_they_were_set(loop: VirtualLoop) -> None:
    came: list[int] = []

    async def wait(number: int) -> None:
        await asyncio.sleep(5)
        came.append(number)

    async def all_of_them() -> None:
        await asyncio.gather(*map(wait, range(50)))

    loop.run_until_complete(all_of_them())
    assert came == list(range(50))


def test_waiting_for_nothing_is_found_out(loop: VirtualLoop) -> None:
    with pytest.raises(Stuck, match="nothing can ever happen again"):
        loop.run_until_complete(asyncio.Event().wait())


def test_a_loop_without_end_is_found_out(loop: VirtualLoop) -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="time stands still"):
        loop.run_until_complete(spin())


def test_a_killed_process_does_nothing_any_more(loop: VirtualLoop) -> None:
    process = Process(loop, "victim")
    did: list[str] = []

    async def live() -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep, 1)
                await anyio.sleep(1)
                did.append("lived")
                await anyio.sleep(9)
        finally:
            did.append("cleaned up")

    async def history() -> None:
        process.spawn(live())
        await asyncio.sleep(2)
        process.kill()
        await asyncio.sleep(100)

    loop.run_until_complete(history())
    assert did == ["lived"]


def test_a_stopped_process_goes_on_later_with_what_came_up(loop: VirtualLoop) -> None:
    process = Process(loop, "sleeper")
    ticks: list[float] = []

    async def live() -> None:
        while len(ticks) < 4:
            await anyio.sleep(1)
            ticks.append(loop.time())

    async def history() -> None:
        living = process.spawn(live())
        await asyncio.sleep(1.5)
        process.pause()
        await asyncio.sleep(60)
        process.resume()
        await living

    loop.run_until_complete(history())
    assert ticks == [1.0, 61.5, 62.5, 63.5]


async def thread() -> None:
    await to_thread.run_sync(int)


async def executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, int)


async def file() -> None:
    Path("/etc/hostname").read_bytes()  # noqa: ASYNC240


async def connection() -> None:
    socket.socket().connect(("127.0.0.1", 1))


async def pause() -> None:
    time.sleep(0)  # noqa: ASYNC251


@pytest.mark.parametrize("reach", [thread, executor, file, connection, pause])
def test_nothing_real_can_be_reached(loop: VirtualLoop, reach) -> None:  # type: ignore[no-untyped-def]
    with sealed(), pytest.raises((Unsealed, AssertionError)):
        loop.run_until_complete(reach())
