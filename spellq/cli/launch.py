"""`spellq run`: launch a worker run with the code of the current folder."""

from typing import TYPE_CHECKING, Any

import click

from spellq.cli.connection import address_of, connected, execute, print_json, program
from spellq.cli.following import DETACHED_CODE, follow_to_the_end, say_still_running, say_what_lacks
from spellq.cli.options import launch_options, run_options, shell_command
from spellq.cli.screen import output
from spellq.cli.shipping import code_here, ship

if TYPE_CHECKING:
    from spellq_sdk.snapshot import Snapshot


@click.command(epilog='Example: spellq run -t t4 -m runs/12/data:/mnt/data "python train.py"')
@launch_options
@run_options
@click.pass_context
def run(
    context: click.Context,
    command: tuple[str, ...],
    environment: dict[str, str],
    description: str | None,
    machine_type: str,
    mounts: dict[str, str],
    labels: tuple[str, ...],
    timeout: float | None,
    grace: float | None,
    background: bool,
    verbose: bool,
    no_untracked: bool,
    as_json: bool,
) -> None:
    """Run COMMAND on a machine, with the code of this folder or repository.

    Its log is followed to the end and its exit code handed on. Quote the command, or write -- in
    front of it, when it has options of its own.
    """
    check_json(as_json, background)
    name = program()
    options: dict[str, Any] = {
        "command": shell_command(command),
        "machine_type": machine_type,
        "attached_resources": mounts,
        "envvars": environment,
        "labels": labels,
        "timeout": timeout,
        "grace_seconds": grace,
    }
    launched: list[int] = []

    async def launch() -> int:
        async with connected() as client:
            options.update(code_options(snapshot, description))
            options["snapshot"] = await ship(client, snapshot, quiet=as_json)
            new = await client.runs.new(**options)
            launched.append(new.id)
            if as_json:
                print_json(await client.gateway.run(new.id))
                return 0
            screen = output()
            screen.line(f"💫 Casting spell #{new.id}…")
            say_what_lacks(screen, new.reason)
            if background:
                screen.line(f"View logs with `{name} logs {new.id}`")
                return 0
            screen.line("✨ Stop viewing logs with ^C")
            code = await follow_to_the_end(client, new.id, name, verbose=verbose)
            screen.line()
            address = f"{await address_of(client)}/api/runs/{new.id}"
            screen.line(f"✨ {address} · {name} info {new.id} · {name} ls runs/{new.id}")
            return code

    snapshot = code_here(untracked=not no_untracked, quiet=as_json)
    try:
        context.exit(execute(launch))
    except KeyboardInterrupt:
        if not launched:
            raise
        say_still_running(output(), launched[0], name)
        context.exit(DETACHED_CODE)


def check_json(as_json: bool, background: bool) -> None:
    """Only a launch that is not followed has something to tell programs."""
    if as_json and not background:
        raise click.UsageError("-o json needs -b: a log that is followed is text")


def code_options(snapshot: "Snapshot", description: str | None) -> dict[str, Any]:
    """What a launch says about the code that goes with it."""
    return {
        "cwd": snapshot.subfolder,
        "git_commit_hash": snapshot.commit_hash,
        "repository": snapshot.repository,
        "description": snapshot.description if description is None else description,
    }
