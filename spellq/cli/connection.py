"""How a command reaches the gateway: the one in the environment, or the daemon of this machine."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spellq.cli.screen import Screen, errors, output

if TYPE_CHECKING:
    from spellq_sdk import AsyncClient

_Result = TypeVar("_Result")


def execute(command: Callable[[], Awaitable[_Result]]) -> _Result:
    """Run async code to its end; what a task group raised alone is raised as itself."""
    import anyio

    try:
        return anyio.run(command)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


@asynccontextmanager
async def connected() -> "AsyncIterator[AsyncClient]":
    """A client. With no server configured the local daemon is found, or started.

    That, and a gateway that cannot be reached, is told of on stderr.
    """
    from spellq_sdk import AsyncClient

    client = AsyncClient.from_environment(
        announce=lambda: errors().line("✨ Starting spellq on this machine…")
    )
    client.gateway.transport.on_away = lambda url: errors().line(f"✨ Trying to reach {url}…")
    async with client:
        yield client


async def address_of(client: "AsyncClient") -> str:
    """The URL of the gateway."""
    return (await client.gateway.transport.address()).url


def words_screen(quiet: bool) -> Screen:
    """Where to say what is going on: not on stdout when that is for programs."""
    return errors() if quiet else output()


def program() -> str:
    """What the command was called as: `spellq`, or `spell`."""
    return click.get_current_context().find_root().info_name or "spellq"


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout."""
    import msgspec

    output().write(msgspec.json.encode(value).decode() + "\n")
