"""`spellq info`: everything about one run."""

from datetime import UTC, datetime

import click

from spellq.cli.connection import connected, execute, print_json
from spellq.cli.options import RUN_NUMBER, output_option
from spellq.cli.screen import harmless, output
from spellq.cli.tables import one_line, table
from spellq.cli.times import duration, stamp
from spellq.runs import FINAL, WAITING
from spellq.wire import RunView


@click.command(epilog="Example: spellq info 12")
@click.argument("number", metavar="RUN", type=RUN_NUMBER)
@output_option
def info(number: int, as_json: bool) -> None:
    """Show a run: what was asked for, where it is, and how it ended."""

    async def fetch() -> RunView:
        async with connected() as client:
            return await client.gateway.run(number)

    run = execute(fetch)
    if as_json:
        print_json(run)
        return
    for line in table(facts(run, datetime.now(UTC)), output().cell):
        output().line(line)


def facts(run: RunView, now: datetime) -> list[tuple[str, str]]:
    """The rows about a run; what it does not have has no row."""
    code = "" if run.user_exit_code is None else f" ({run.user_exit_code})"
    waiting = run.reason if run.status in WAITING else ""
    reason = run.reason if run.status in FINAL and run.reason else ""
    cause = ": ".join(part for part in (run.cause or "", reason) if part)
    rows = [
        ("Run", str(run.id)),
        ("Workflow", "" if run.workflow is None else str(run.workflow)),
        ("Repository", run.repository),
        ("Git Commit", run.git_commit_hash),
        ("Status", f"{run.status}{code}"),
        ("Cause", cause),
        ("Waiting for", waiting.removeprefix("Waiting for ")),
        ("Command", harmless(one_line(run.command))),
        ("Description", harmless(one_line(run.description))),
        ("Creator", run.owner),
        ("Machine Type", run.machine_type),
        ("Created", stamp(run.created_at)),
        ("Start Time", stamp(run.started_at) if run.started_at else ""),
        ("End Time", stamp(run.ended_at) if run.ended_at else ""),
        ("Duration", duration((run.ended_at or now) - run.started_at) if run.started_at else ""),
        ("Timeout", f"{run.timeout_minutes:g} minutes" if run.timeout_minutes else ""),
        ("Labels", ", ".join(run.labels)),
        ("Mounts", ", ".join(f"{what} at {at}" for what, at in run.attached_resources.items())),
        ("Environment Vars", ", ".join(run.environment_names)),
        ("Outputs", _outputs(run)),
    ]
    return [(name, value) for name, value in rows if value]


def _outputs(run: RunView) -> str:
    if not run.outputs_files:
        return ""
    from spellq.sizes import human_size

    files = "1 file" if run.outputs_files == 1 else f"{run.outputs_files} files"
    return f"{files}, {human_size(run.outputs_bytes)} in runs/{run.id}"
