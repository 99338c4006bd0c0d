"""`spellq stop`, `kill` and `label`: what is done to runs."""

from typing import Final, Literal

import click

from spellq.cli.connection import connected, execute, program
from spellq.cli.errors import CliError
from spellq.cli.options import RUN_NUMBER, STOP_GRACE, grace_option
from spellq.cli.screen import output
from spellq.runs import FINAL, Status
from spellq.wire import RunReply

Verb = Literal["stop", "kill"]

_numbers = click.argument("numbers", metavar="RUN...", nargs=-1, required=True, type=RUN_NUMBER)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing.")
_NOT_FOUND: Final = 404


@click.command(epilog="Example: spellq stop 12 13")
@_numbers
@grace_option(STOP_GRACE)
@_quiet
def stop(numbers: tuple[int, ...], grace: float | None, quiet: bool) -> None:
    """Stop runs: their commands end, and outputs are saved."""
    _end("stop", numbers, grace=grace, quiet=quiet)


@click.command(epilog="Example: spellq kill 12")
@_numbers
@_quiet
def kill(numbers: tuple[int, ...], quiet: bool) -> None:
    """Kill runs at once; outputs are lost."""
    _end("kill", numbers, quiet=quiet)


@click.command(epilog="Example: spellq label 12 nightly")
@click.argument("number", metavar="RUN", type=RUN_NUMBER)
@click.argument("name", metavar="LABEL")
@click.option("--remove", is_flag=True, help="Take the label off.")
def label(number: int, name: str, remove: bool) -> None:
    """Put a label on a run, or take it off."""

    async def change() -> None:
        async with connected() as client:
            run = await client.runs.get(number)
            await (run.remove_label(name) if remove else run.add_label(name))

    execute(change)
    done = f"removed label {name} from" if remove else f"added label {name} to"
    output().line(f"Successfully {done} run {number}.")


def _end(verb: Verb, numbers: tuple[int, ...], *, grace: float | None = None, quiet: bool) -> None:
    replies = execute(lambda: _send(verb, numbers, grace))
    if not quiet:
        lines = (
            one_line(verb, replies[numbers[0]], program())
            if len(replies) == 1
            else batch_lines(verb, replies)
        )
        for line in lines:
            output().line(line)
    missing = [str(number) for number, reply in replies.items() if reply is None]
    if missing:
        raise CliError(f"There is no run {', '.join(missing)}.")


async def _send(
    verb: Verb, numbers: tuple[int, ...], grace: float | None
) -> dict[int, RunReply | None]:
    from spellq_sdk.exceptions import ClientException

    replies: dict[int, RunReply | None] = {}
    async with connected() as client:
        for number in dict.fromkeys(numbers):
            try:
                replies[number] = await client.gateway.end(number, verb, grace)
            except ClientException as error:
                if error.response is None or error.response.status_code != _NOT_FOUND:
                    raise
                replies[number] = None
    return replies


def one_line(verb: Verb, reply: RunReply | None, name: str) -> list[str]:
    """What is said about a single run."""
    if reply is None:
        return []
    run = reply.run
    if not reply.changed and run.status in FINAL:
        return [f"Run {run.id} has already finished: {run.status}."]
    if verb == "kill":
        return [str(run.id)]
    if run.status in (Status.SAVING, Status.PUSHING):
        return [f"Run {run.id} has ended its command and is saving its outputs."]
    if run.status is Status.KILLING:
        return [f"Run {run.id} is being killed."]
    return [
        f"Stopping run {run.id}. Use '{name} logs -f {run.id}' to view logs while the job finishes."
    ]


def batch_lines(verb: Verb, replies: dict[int, RunReply | None]) -> list[str]:
    """What is said about several runs."""
    finished, missing, done = [], [], []
    for number, reply in replies.items():
        if reply is None:
            missing.append(str(number))
        elif not reply.changed and reply.run.status in FINAL:
            finished.append(str(number))
        else:
            done.append(str(number))
    lines = ["Executing batch stop…" if verb == "stop" else "Executing batch kill..."]
    if finished:
        lines.append(f"| Already finished: {', '.join(finished)}")
    if missing:
        lines.append(f"| Run ID does not exist: {', '.join(missing)}")
    if done and len(lines) > 1:
        lines.append("-" * 20)
    if done and verb == "stop":
        lines.append(
            f"| Successfully stopping: {', '.join(done)}. Any outputs will be pushed and saved."
        )
    elif done:
        lines.append(f"| Successfully killed: {', '.join(done)}")
    return lines
