"""`spellq ps`: the latest runs."""

from datetime import UTC, datetime

import click

from spellq.cli.connection import connected, execute, print_json
from spellq.cli.options import output_option
from spellq.cli.runs import HEAD, VERBOSE_HEAD, is_active, row, verbose_row
from spellq.cli.screen import output
from spellq.cli.tables import table
from spellq.wire import RunView


@click.command(epilog="Example: spellq ps -n 10 -l nightly")
@click.option(
    "-n",
    "limit",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="At most so many runs.",
)
@click.option("-l", "--label", "labels", multiple=True, help="Runs with the label; repeatable.")
@click.option("--no-trunc", is_flag=True, help="Cut nothing off.")
@click.option("-v", "--verbose", is_flag=True, help="More columns.")
@output_option
def ps(limit: int, labels: tuple[str, ...], no_trunc: bool, verbose: bool, as_json: bool) -> None:
    """List runs, the newest last."""
    runs = execute(lambda: _latest(limit, labels))[::-1]
    if as_json:
        print_json(runs)
        return
    now = datetime.now(UTC)
    screen = output()
    if verbose:
        rows = [VERBOSE_HEAD, *(verbose_row(run, now, whole=no_trunc) for run in runs)]
    else:
        rows = [HEAD, *(row(run, whole=no_trunc) for run in runs)]
    head, *lines = table(rows, screen.cell)
    screen.line(head)
    for run, line in zip(runs, lines, strict=True):
        screen.line(screen.green(line) if is_active(run) else line)


async def _latest(limit: int, labels: tuple[str, ...]) -> list[RunView]:
    async with connected() as client:
        return await client.gateway.runs(limit, labels=labels, workflow=None, live=False)
