"""`spellq logs`: the log of a run."""

import click

from spellq.cli.connection import connected, execute, program
from spellq.cli.following import say_logs_again, show_log
from spellq.cli.options import RUN_NUMBER
from spellq.cli.screen import output


@click.command(epilog="Example: spellq logs -f 12")
@click.argument("number", metavar="RUN", type=RUN_NUMBER)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option(
    "-n", "--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines."
)
@click.option("-v", "--verbose", is_flag=True, help="Every line, also the runtime's.")
def logs(number: int, follow: bool, tail: int | None, verbose: bool) -> None:
    """Show the log of a run."""
    name = program()

    async def show() -> None:
        async with connected() as client:
            run = await client.runs.get(number)
            if tail == 0 and not follow:
                return
            await show_log(run, name, follow=follow, offset=-(tail or 0), verbose=verbose)

    try:
        execute(show)
    except KeyboardInterrupt:
        output().line()
        say_logs_again(output(), number, name)
