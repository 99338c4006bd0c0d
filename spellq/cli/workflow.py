"""`spellq workflow`: launch a master run, and look at or end whole workflows."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from spellq.cli.connection import address_of, connected, execute, print_json, program
from spellq.cli.following import DETACHED_CODE, follow_to_the_end, say_logs_again, say_what_lacks
from spellq.cli.launch import check_json, code_options
from spellq.cli.options import (
    STOP_GRACE,
    WORKFLOW_NUMBER,
    grace_option,
    later_workflow_options,
    launch_options,
    output_option,
    shell_command,
)
from spellq.cli.runs import status_words
from spellq.cli.screen import output
from spellq.cli.shipping import code_here, ship
from spellq.cli.tables import one_line, table
from spellq.cli.times import ago, stamp
from spellq.runs import FINAL
from spellq.wire import RunPage, RunView, WorkflowView

if TYPE_CHECKING:
    from spellq_sdk import AsyncClient

_PAGE: Final = 500


class CommandByDefault(click.Group):
    """A group in which everything that is no subcommand is a command to `create`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in ("-h", "--help") and args[0] not in self.commands:
            args = ["create", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=CommandByDefault,
    subcommand_metavar="COMMAND | SUBCOMMAND [ARGS]...",
    epilog='Example: spellq workflow "python simple.py"',
)
@click.help_option("-h", "--help")
def workflow() -> None:
    """Run a workflow script, and look at workflows.

    What is no subcommand is the command of the master run: it is launched with the code of this
    folder, and launches the worker runs.
    """


@workflow.command(epilog='Example: spellq workflow create "python simple.py"')
@launch_options
@later_workflow_options
@click.pass_context
def create(
    context: click.Context,
    command: tuple[str, ...],
    environment: dict[str, str],
    description: str | None,
    grace: float | None,
    background: bool,
    verbose: bool,
    no_untracked: bool,
    as_json: bool,
) -> None:
    """Launch COMMAND as the master run of a new workflow, and follow its log."""
    check_json(as_json, background)
    name = program()
    options: dict[str, Any] = {
        "command": shell_command(command),
        "envvars": environment,
        "grace_seconds": grace,
    }
    launched: list[int] = []

    async def launch() -> int:
        async with connected() as client:
            options.update(code_options(snapshot, description))
            options["snapshot"] = await ship(client, snapshot, quiet=as_json)
            new = await client.workflows.new(**options)
            master = new.managing_run.id
            launched.append(master)
            if as_json:
                print_json(await client.gateway.workflow(new.id))
                return 0
            screen = output()
            screen.line(f"💫 Casting workflow #{new.id}…")
            say_what_lacks(screen, new.managing_run.reason)
            if background:
                screen.line(f"View logs with `{name} logs {master}`")
                return 0
            screen.line(f"✨ Following workflow at run {master}.")
            screen.line("✨ Stop viewing logs with ^C")
            code = await follow_to_the_end(client, master, name, verbose=verbose)
            screen.line()
            address = f"{await address_of(client)}/api/workflows/{new.id}"
            screen.line(f"✨ {address} · {name} workflow info {new.id} · {name} info {master}")
            return code

    snapshot = code_here(untracked=not no_untracked, quiet=as_json)
    try:
        context.exit(execute(launch))
    except KeyboardInterrupt:
        if not launched:
            raise
        output().line()
        say_logs_again(output(), launched[0], name)
        context.exit(DETACHED_CODE)


@workflow.command(epilog="Example: spellq workflow stop 14")
@click.argument("number", metavar="WORKFLOW", type=WORKFLOW_NUMBER)
@grace_option(STOP_GRACE)
def stop(number: int, grace: float | None) -> None:
    """Stop a workflow's runs: what runs saves its outputs, what waits is cancelled."""
    name = program()

    async def send() -> None:
        async with connected() as client:
            if await _has_ended(client, number):
                return
            found = await client.gateway.end_workflow(number, "stop", grace)
        output().line(
            f"Stopping workflow {number}. Use '{name} logs -f {found.managing_run.id}' "
            "to view logs while the job finishes."
        )

    execute(send)


@workflow.command(epilog="Example: spellq workflow kill 14")
@click.argument("number", metavar="WORKFLOW", type=WORKFLOW_NUMBER)
def kill(number: int) -> None:
    """Kill a workflow's runs at once; outputs are lost."""

    async def send() -> None:
        async with connected() as client:
            if await _has_ended(client, number):
                return
            await client.gateway.end_workflow(number, "kill")
        output().line(f"Successfully killed workflow {number}.")

    execute(send)


async def _has_ended(client: "AsyncClient", number: int) -> bool:
    """Whether there is nothing left to end; says so."""
    found = await client.gateway.workflow(number)
    if any(run.status not in FINAL for run in (found.managing_run, *found.runs)):
        return False
    output().line(f"Workflow {number} has already finished: {found.managing_run.status}.")
    return True


@workflow.command(epilog="Example: spellq workflow ls -n 5")
@click.option("-n", "limit", default=20, show_default=True, type=click.IntRange(min=1))
@output_option
def ls(limit: int, as_json: bool) -> None:
    """List the latest workflows, the newest last."""

    async def latest() -> tuple[list[RunView], list[WorkflowView]]:
        found: list[RunView] = []
        before: int | None = None
        async with connected() as client:
            while len(found) < limit:
                query = [("limit", str(_PAGE))]
                query += [("before", str(before))] if before else []
                page = await client.gateway.transport.request(
                    "GET", "/api/runs", reply=RunPage, query=query
                )
                found += (run for run in page.runs if run.master)
                before = page.next
                if before is None:
                    break
            masters = found[:limit][::-1]
            if not as_json:
                return masters, []
            numbers = [run.workflow for run in masters if run.workflow is not None]
            return masters, [await client.gateway.workflow(number) for number in numbers]

    runs, workflows = execute(latest)
    if as_json:
        print_json(workflows)
        return
    now = datetime.now(UTC)
    rows = [("ID", "RUN", "COMMAND", "STATUS", "CREATED", "CREATOR")]
    rows += [
        (str(run.workflow), str(run.id), one_line(run.command), status_words(run),
         ago(run.created_at, now), run.owner)
        for run in runs
    ]  # fmt: skip
    for line in table(rows, output().cell):
        output().line(line)


@workflow.command(epilog="Example: spellq workflow info 14")
@click.argument("number", metavar="WORKFLOW", type=WORKFLOW_NUMBER)
@output_option
def info(number: int, as_json: bool) -> None:
    """Show a workflow and its runs."""

    async def fetch() -> WorkflowView:
        async with connected() as client:
            return await client.gateway.workflow(number)

    found = execute(fetch)
    if as_json:
        print_json(found)
        return
    master = found.managing_run
    facts = [
        ("Workflow", str(found.id)),
        ("Master Run", str(master.id)),
        ("Status", status_words(master)),
        ("Command", one_line(master.command)),
        ("Creator", found.owner),
        ("Created", stamp(found.created_at)),
    ]
    runs = [("RUN", "STATUS", "MACHINE", "COMMAND")]
    runs += [
        (str(run.id), status_words(run), run.machine_type, one_line(run.command))
        for run in sorted(found.runs, key=lambda run: run.id)
    ]
    for line in [*table(facts, output().cell), "", *table(runs, output().cell)]:
        output().line(line)
