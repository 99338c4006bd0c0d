"""Errors of the command line: one line that says what is wrong and what helps."""

import os
import sys
from typing import Final

import click

from spellq.resources import InvalidResourceError

GENERAL: Final = 1
USAGE: Final = 2
CONFIGURATION: Final = 3


class CliError(Exception):
    """An error the user reads as one line; `code` is the exit code."""

    def __init__(self, text: str, code: int = GENERAL) -> None:
        super().__init__(text)
        self.code = code


def error_text(error: BaseException, program: str) -> tuple[str, int]:
    """What to say about `error`, and the exit code for it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, CliError):
        return str(error), error.code
    if isinstance(error, InvalidResourceError):
        return str(error), CONFIGURATION
    if isinstance(error, click.ClickException):
        text = error.format_message()
        if _has_no_arguments(error):
            text = "Say what to do"
        if isinstance(error, click.UsageError):
            path = error.ctx.command_path if error.ctx else program
            text = f"{text.rstrip('.')}. See '{path} --help'."
        return text, error.exit_code
    if _is_of_the_sdk(error):
        return getattr(error, "message", "") or str(error), GENERAL
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", GENERAL
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno), GENERAL
    return (
        f"Fatal exception: {type(error).__name__}: {error}. "
        "With SPELLQ_DEBUG=1 in the environment its traceback is shown.",
        GENERAL,
    )


def _has_no_arguments(error: click.ClickException) -> bool:
    """Click 8.2 and later raise this one, whose message is the whole help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _is_of_the_sdk(error: BaseException) -> bool:
    """Whether the SDK raised it, told without importing what is not in use."""
    for module, names in _OF_THE_SDK.items():
        loaded = sys.modules.get(module)
        kinds = [getattr(loaded, name) for name in names if hasattr(loaded, name)]
        if any(isinstance(error, kind) for kind in kinds):
            return True
    return False


_OF_THE_SDK: Final = {
    "spellq_sdk.exceptions": ("ClientException",),
    "spellq_sdk.snapshot": ("SnapshotError",),
}
