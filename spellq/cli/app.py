"""The root of the command line: which commands there are, and what errors look like."""

import importlib
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import PurePath
from typing import Final

import click

from spellq.cli.errors import CliError, error_text
from spellq.cli.screen import errors
from spellq.version import __version__

COMMANDS: Final = {
    "run": "launch",
    "workflow": "workflow",
    "logs": "logs",
    "ps": "ps",
    "info": "info",
    "stop": "control",
    "kill": "control",
    "label": "control",
    "ls": "files",
    "cp": "files",
    "events": "events",
    "up": "daemon",
    "down": "daemon",
    "daemon": "daemon",
    "token": "daemon",
    "doctor": "doctor",
    "server": "cluster",
    "agent": "cluster",
}
"""The commands in the order of the help, and the module each is in (imported when needed)."""

_INTERRUPTED_CODE: Final = 130


class Commands(click.Group):
    """The commands of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise click.UsageError(f"There is no command {args[0]!r}{hint}.", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"spellq.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    epilog='Start with: spellq run "echo hello > greeting.txt"',
)
@click.version_option(__version__, "--version", message="%(prog)s %(version)s")
@click.help_option("-h", "--help")
@click.option("--debug", is_flag=True, hidden=True)
def root(debug: bool) -> None:
    """Launch runs and workflows, and look at what they do."""


def run(arguments: Sequence[str], program: str) -> int:
    """Execute one command line; gives its exit code. `program` is how it was called.

    Raises:
        SystemExit: nobody reads the output any more (click sees to it, silently).
    """
    name = PurePath(program).name
    name = "spellq" if name.endswith(".py") or not name else name
    debug = "--debug" in arguments or bool(os.environ.get("SPELLQ_DEBUG"))
    if not arguments:
        arguments = ["--help"]
    try:
        result = root.main(list(arguments), prog_name=name, standalone_mode=False)
    except click.Abort as abort:
        if isinstance(abort.__cause__, KeyboardInterrupt):  # click ended the line already
            return _INTERRUPTED_CODE
        errors().line("Aborted!")
        return 1
    except Exception as error:
        if debug and not isinstance(error, (click.ClickException, CliError)):
            raise
        text, code = error_text(error, name)
        errors().error(text)
        return code
    return result if isinstance(result, int) else 0
