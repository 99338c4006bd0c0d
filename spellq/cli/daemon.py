"""`spellq up`, `down`, `token`, and the daemon itself."""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from spellq.cli.connection import execute, print_json, program
from spellq.cli.errors import CliError
from spellq.cli.options import output_option
from spellq.cli.screen import output

if TYPE_CHECKING:
    from spellq.wire import Me, RunView
    from spellq_sdk import AsyncClient
    from spellq_sdk.daemon import LocalDaemon

_ports = click.IntRange(0, 65535)
_MANY: int = 1_000_000


def _checked(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    from spellq.settings import InvalidSetting, parse_machine_types

    if value is not None:
        try:
            parse_machine_types(value)
        except InvalidSetting as error:
            raise click.UsageError(str(error)) from error
    return value


@click.command(epilog="Example: spellq up --machine-types cpu=8,t4=1")
@click.option(
    "--machine-types",
    metavar="NAME[=SLOTS],...",
    callback=_checked,
    help="What this machine offers, and how many runs of each at once; holds until 'down'.",
)
@click.option("--port", type=_ports, help="Where to serve.  [default: 7735, or a free one]")
@click.option("--foreground", is_flag=True, help="Stay in this terminal until ^C.")
def up(machine_types: str | None, port: int | None, foreground: bool) -> None:
    """Start spellq on this machine, unless it is running."""
    from spellq_sdk.daemon import ensure_daemon, find_daemon
    from spellq_sdk.settings import spellq_home

    home = spellq_home()
    found = find_daemon(home)
    if found:
        _check_same(found, machine_types, port)
        if foreground:
            raise CliError(
                f"spellq is already running at {found.url}. End it first with '{program()} down'."
            )
    else:
        _check_worlds(home)
    if foreground:
        _serve_here(home, machine_types, port)
        return
    arguments = ["--machine-types", machine_types] if machine_types else []
    arguments += ["--port", str(port)] if port is not None else []
    running = ensure_daemon(home, arguments=arguments)
    already = "" if running.started else "already "
    output().line(f"✨ spellq is {already}running at {running.url}")


@click.command(epilog="Example: spellq down --stop")
@click.option("--stop", is_flag=True, help="Stop runs first; outputs are saved.")
@click.option("--kill", is_flag=True, help="Kill runs first; outputs are lost.")
def down(stop: bool, kill: bool) -> None:
    """End spellq on this machine. While runs are under way it needs --stop or --kill."""
    from spellq_sdk.daemon import find_daemon, stop_daemon
    from spellq_sdk.settings import spellq_home

    if stop and kill:
        raise click.UsageError("--stop and --kill exclude each other")
    how = "stop" if stop else "kill" if kill else None
    home = spellq_home()
    found = find_daemon(home)
    if found is not None:
        name = program()
        execute(lambda: _end_runs(found, how, name))
    left = stop_daemon(home)
    output().line(f"✨ spellq {'has stopped' if left else 'is not running'}.")


@click.command(epilog='Example: curl -H "Authorization: Bearer $(spellq token)" …')
@output_option
def token(as_json: bool) -> None:
    """Print the token of spellq on this machine. Whoever has it can do all that you can."""
    from spellq_sdk.daemon import find_daemon
    from spellq_sdk.settings import spellq_home

    home = spellq_home()
    try:
        secret = (home / "token").read_text().strip()
    except FileNotFoundError:
        raise CliError(f"There is no token in {home} yet. '{program()} up' makes it.") from None
    if as_json:
        found = find_daemon(home)
        print_json({"token": secret, "url": found.url if found else None})
    else:
        output().line(secret)


@click.command(hidden=True)
@click.option("--ready-fd", type=click.IntRange(min=0))
@click.option("--port", type=_ports)
@click.option("--machine-types", callback=_checked)
def daemon(ready_fd: int | None, port: int | None, machine_types: str | None) -> None:
    """Be the local daemon (started by the other commands)."""
    from spellq_sdk.settings import spellq_home

    _serve(spellq_home(), machine_types, port, ready_fd)


def _serve(home: Path, machine_types: str | None, port: int | None, ready_fd: int | None) -> None:
    from spellq.compose.embedded import DaemonSettings, serve

    serve(DaemonSettings(home=home, port=port, machine_types=machine_types, ready_fd=ready_fd))


def _serve_here(home: Path, machine_types: str | None, port: int | None) -> None:
    """Serve in this process, and say where once the daemon says so itself."""
    reading, writing = os.pipe()

    def tell() -> None:
        import msgspec

        with open(reading, "rb") as pipe:
            line = pipe.readline()
        ready: dict[str, Any] = msgspec.json.decode(line) if line else {}
        if url := ready.get("url"):
            output().line(f"✨ spellq is running at {url}")

    threading.Thread(target=tell, daemon=True).start()
    _serve(home, machine_types, port, writing)


def _check_worlds(home: Path) -> None:
    """Whether runs can have worlds here is found out now, not by the first run.

    What else is wrong with the home or the packages, the start itself says.
    """
    from spellq.cli.doctor import CannotTry, try_world

    try:
        problem: str = try_world(home).problem
    except CannotTry:
        return
    if problem:
        raise CliError(problem)


def _check_same(found: "LocalDaemon", machine_types: str | None, port: int | None) -> None:
    """Asked for something else than what runs: that needs a new daemon, by the user's own hand."""
    remedy = f"End it first with '{program()} down'."
    if port and port != urlsplit(found.url).port:
        raise CliError(f"spellq is already running at {found.url}, not at port {port}. {remedy}")
    if machine_types:
        from spellq.settings import parse_machine_types

        offered = without_masters(execute(lambda: _me(found)).machine_types)
        if parse_machine_types(machine_types) != offered:
            there = ",".join(f"{name}={count}" for name, count in sorted(offered.items()))
            raise CliError(
                f"spellq is already running with the machine types {there}, not {machine_types}. "
                f"{remedy}"
            )


def without_masters(slots: dict[str, int]) -> dict[str, int]:
    """The slots of machine types alone: those for masters come by themselves."""
    from spellq.runs import MASTER_QUEUE

    return {name: count for name, count in slots.items() if name != MASTER_QUEUE}


async def _me(found: "LocalDaemon") -> "Me":
    from spellq_sdk import AsyncClient

    async with AsyncClient(found.url, found.token) as client:
        return await client.me()


async def _end_runs(found: "LocalDaemon", how: str | None, name: str) -> None:
    """Have no run under way: by ending them, or (without `how`) by refusing."""
    import anyio

    from spellq_sdk import AsyncClient

    async with (
        AsyncClient(found.url, found.token) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_refuse_when_gone, found.pid, name)
        while live := await client.gateway.runs(_MANY, workflow=None, live=True):
            if how is None:
                raise CliError(_under_way(live, name))
            await _end_all(client, live, how)
        tasks.cancel_scope.cancel()


async def _refuse_when_gone(pid: int, name: str) -> None:
    """Nobody starts again a daemon that ends meanwhile: there is nothing to wait for then."""
    import anyio

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pidfd = None
    if pidfd is not None:
        try:
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
    raise CliError(f"spellq ended meanwhile; commands under way run on. Find them: {name} up")


def _under_way(live: "list[RunView]", name: str) -> str:
    numbers = [str(run.id) for run in reversed(live)]
    them, their = ("it", "its") if len(numbers) == 1 else ("them", "their")
    some = "1 run is" if len(numbers) == 1 else f"{len(numbers)} runs are"
    shown = ", ".join(numbers[:20]) + (", …" if len(numbers) > 20 else "")
    return (
        f"{some} under way: {shown}. "
        f"'{name} down --stop' stops {them} and keeps {their} outputs, "
        f"'{name} down --kill' does not."
    )


async def _end_all(client: "AsyncClient", live: "list[RunView]", how: str) -> None:
    import anyio

    from spellq.runs import FINAL

    doing = "Stopping" if how == "stop" else "Killing"
    output().line(f"✨ {doing} {len(live)} run{'' if len(live) == 1 else 's'}…")

    async def end(number: int) -> None:
        run = await client.runs.get(number)
        await run.wait_status(*FINAL)
        await run.refresh()
        output().line(f"✨ Run {number} is {run.status.replace('_', ' ')}")

    async with anyio.create_task_group() as tasks:
        for run in sorted(live, key=lambda run: not run.master):  # masters launch more
            await client.gateway.end(run.id, how)
            tasks.start_soon(end, run.id)
