"""A simulated world in which only what is told goes wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tests.simulation.loop import VirtualLoop
from tests.simulation.sealed import sealed
from tests.simulation.world import World

T = TypeVar("T")

_LONG_ENOUGH_SECONDS: Final = 3600.0


def in_a_calm_world(story: Callable[[World], Awaitable[T]]) -> T:
    """What a story comes to. The world has no faults but its own."""
    with sealed():
        loop = VirtualLoop()
        world = World(1, loop)
        world.faults_are_over = True

        async def tell() -> T:
            async with asyncio.timeout(_LONG_ENOUGH_SECONDS):
                return await story(world)

        try:
            return loop.run_until_complete(tell())
        finally:
            world.told_to_the_end = True
            loop.bury(world.processes)
            loop.close()
