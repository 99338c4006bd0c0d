"""`spellq events`: what happens, as it happens."""

from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from spellq.cli.connection import connected, execute, print_json
from spellq.cli.options import RUN_NUMBER, WORKFLOW_NUMBER, output_option
from spellq.cli.screen import harmless, output
from spellq.cli.tables import one_line
from spellq.events import EventType
from spellq.runs import Status

if TYPE_CHECKING:
    from spellq_sdk.models import RunEvent


@click.command(epilog="Example: spellq events --workflow 14 --status complete -o json")
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=RUN_NUMBER,
    metavar="RUN",
    help="Only of the run; repeatable.",
)
@click.option(
    "--workflow",
    type=WORKFLOW_NUMBER,
    metavar="WORKFLOW",
    help="Only of the workflow's runs.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice([kind.value for kind in EventType]),
    metavar="TYPE",
    help="Only of the type, such as run.status; repeatable.",
)
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([s.value for s in Status]),
    metavar="STATUS",
    help="Only when the run has the status; repeatable.",
)
@click.option("--after", metavar="CURSOR", help="What came after that place in the log.")
@output_option
def events(
    runs: tuple[int, ...],
    workflow: int | None,
    types: tuple[str, ...],
    statuses: tuple[str, ...],
    after: str | None,
    as_json: bool,
) -> None:
    """Follow the events of runs, one a line, until ^C. With JSON each has its cursor."""

    async def follow() -> None:
        async with connected() as client:
            for run in runs:
                await client.gateway.run(run)
            if workflow is not None:
                await client.gateway.workflow(workflow)
            matching = client.events(
                runs=runs or None,
                workflow=workflow,
                types=types or None,
                statuses=statuses or None,
                after=after,
            )
            async with aclosing(matching):
                async for event in matching:
                    if as_json:
                        print_json(event)
                    else:
                        output().line(event_line(event))

    execute(follow)


def event_line(event: "RunEvent") -> str:
    """`17:00:59.123  run 12  run.status  complete (66)`, and what is worth adding."""
    time = event.at.astimezone().strftime("%H:%M:%S.%f")[:-3]
    code = event.data.get("user_exit_code")
    parts = [
        time,
        f"run {event.run}",
        event.type,
        event.status if code is None else f"{event.status} ({code})",
        ", ".join(event.data.get("labels") or ()) if event.type == EventType.RUN_LABEL else "",
        (event.cause or "") if event.type == EventType.RUN_STATUS else "",
        str(event.data.get("reason") or ""),
        str(event.data.get("command") or ""),
    ]
    return "  ".join(harmless(one_line(part)) for part in parts if part)
