"""What the commands that launch something have in common on their command line."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import click

from spellq.resources import mount_target, parse_mount, parse_resource
from spellq.runs import parse_number

_Function = TypeVar("_Function", bound=Callable[..., Any])
Decorator = Callable[[_Function], _Function]

STOP_GRACE: Final = "From SIGTERM to SIGKILL, in place of the runs' own; stop again to shorten it."

_LATER_VALUES: Final = (
    ("--pip",),
    ("--pip-req",),
    ("--apt",),
    ("--conda-file",),
    ("--docker-image", "--docker_image", "--from"),
    ("--github-url",),
    ("--github-ref",),
    ("--from-file",),
    ("--save-command",),
)
_LATER_FLAGS: Final = (("--deps-from-env",),)
_LATER_RUN_VALUES: Final = (
    ("-p", "--project"),
    ("--tensorboard-dir",),
    ("--distributed",),
    ("--stop-condition",),
    ("--param",),
)
_LATER_RUN_FLAGS: Final = (("--auto-resume",), ("--disable-auto-resume",), ("--idempotent",))
_LATER_WORKFLOW_VALUES: Final = (("-r", "--repo"), ("--github-repo",))
_LATER_WORKFLOW_FLAGS: Final = (("--local",),)


def launch_options(function: _Function) -> _Function:
    """What run and workflow both take."""
    for option in reversed(
        (
            click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED),
            click.option("-e", "--env", "environment", multiple=True, metavar="KEY=VALUE",
                         callback=_environment, help="An environment variable; repeatable."),
            click.option("-d", "--description", help="Words of your own; else the commit's."),
            click.option("-b", "--background", is_flag=True, help="Launch, and do not follow."),
            click.option("-f", "--force", is_flag=True, expose_value=False,
                         help="Ask nothing."),
            click.option("-v", "--verbose", is_flag=True, help="Every line of the log."),
            click.option("--no-untracked", is_flag=True,
                         help="Leave out files that git does not track."),
            click.option("-c", "--commit-ref", default="HEAD", hidden=True, expose_value=False,
                         callback=_only_head),
            grace_option("From SIGTERM to SIGKILL when it is stopped.  [default: 30]"),
            output_option,
            *_later(_LATER_VALUES, _LATER_FLAGS),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def run_options(function: _Function) -> _Function:
    """What only a worker run takes."""
    for option in reversed(
        (
            click.option("-t", "--machine-type", default="CPU", show_default=True,
                         help="The kind of machine to run on."),
            click.option("-m", "--mount", "mounts", multiple=True, metavar="RESOURCE[:PATH]",
                         callback=_mounts,
                         help="What an earlier run saved, read-only at PATH; repeatable."),
            click.option("--label", "labels", multiple=True, help="A label; repeatable."),
            click.option("--timeout", type=_AtLeastZero(min_open=True),
                         callback=_finite, metavar="MINUTES",
                         help="Stop the run after that long; its outputs are saved."),
            *_later(_LATER_RUN_VALUES, _LATER_RUN_FLAGS),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def later_workflow_options(function: _Function) -> _Function:
    """What Spell's workflow takes and this one does not yet."""
    for option in _later(_LATER_WORKFLOW_VALUES, _LATER_WORKFLOW_FLAGS):
        function = option(function)
    return function


class _AtLeastZero(click.FloatRange):
    """A number of seconds or minutes, called a number in messages."""

    name = "number"

    def __init__(self, *, min_open: bool = False) -> None:
        super().__init__(min=0, min_open=min_open)


def grace_option(words: str) -> Callable[[_Function], _Function]:
    """`--grace SECONDS`; gives the parameter `grace`, None where it is not given."""
    return click.option(
        "--grace",
        type=_AtLeastZero(),
        callback=_finite,
        metavar="SECONDS",
        help=words,
    )


def output_option(function: _Function) -> _Function:
    """`-o json`: for programs; gives the parameter `as_json`."""
    return click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["text", "json"]),
        default="text",
        callback=lambda _context, _option, value: value == "json",
        help="How to print it: text for people, json for programs.",
    )(function)


def shell_command(words: Sequence[str]) -> str:
    """The command line a run executes: the words as they are, joined by spaces.

    Raises:
        click.UsageError: there is nothing but white space.
    """
    command = " ".join(words)
    if not command.strip():
        raise click.UsageError("The command is empty.")
    return command


class _Number(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """The number of a run or a workflow."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = value if isinstance(value, int) else parse_number(value)
        if not number:
            what = param.opts[0] if isinstance(param, click.Option) else self.name.upper()
            raise click.UsageError(
                f"{what} is {value!r}; it has to be a {self.name}'s number, for example 12", ctx
            )
        return number


RUN_NUMBER: Final = _Number("run")
WORKFLOW_NUMBER: Final = _Number("workflow")


def _mounts(
    _context: click.Context, _option: click.Parameter, value: Sequence[str]
) -> dict[str, str]:
    mounts = dict(parse_mount(text) for text in value)
    for resource, point in mounts.items():
        parse_resource(resource)
        mount_target(resource, point)
    return mounts


def _environment(
    _context: click.Context, _option: click.Parameter, value: Sequence[str]
) -> dict[str, str]:
    variables = {}
    for text in value:
        name, _, content = text.partition("=")
        if not name or "\0" in text:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE")
        variables[name] = content
    return variables


def _finite(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def _only_head(_context: click.Context, _option: click.Parameter, value: str) -> None:
    if value != "HEAD":
        raise click.UsageError("--commit-ref: only HEAD (the files as they are) is there yet")


def _later(
    values: Sequence[Sequence[str]], flags: Sequence[Sequence[str]]
) -> list[Callable[[Any], Any]]:
    def refuse(_context: click.Context, option: click.Parameter, value: object) -> None:
        if value:
            raise click.UsageError(f"{option.opts[-1]} is not there yet")

    shared: dict[str, Any] = {"hidden": True, "expose_value": False, "callback": refuse}
    return [
        *(click.option(*names, multiple=True, **shared) for names in values),
        *(click.option(*names, is_flag=True, **shared) for names in flags),
    ]
