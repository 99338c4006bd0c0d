"""The keywords of `runs.new`, and the request they make."""

import difflib
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, Final, Required, TypedDict

import msgspec

from spellq.version import __version__
from spellq.wire import RunRequest
from spellq_sdk.exceptions import bad_request


class RunOptions(TypedDict, total=False):
    """The keywords of `runs.new`. Only `command` has to be given.

    `attached_resources` maps resources to where they are mounted; `timeout` is in minutes;
    `grace_seconds` lies between the signals TERM and KILL of a stop. Those after `repository` are
    Spell's, and raise BadRequest until a version of spellq has them.
    """

    command: Required[str]
    machine_type: str | None
    description: str | None
    envvars: Mapping[str, str] | None
    attached_resources: Mapping[str, str] | None
    labels: Collection[str] | None
    cwd: str | None
    timeout: float | None
    grace_seconds: float | None
    workflow_id: int | None
    snapshot: str | None
    git_commit_hash: str | None
    repository: str | None

    project: Any
    github_url: Any
    github_ref: Any
    pip_packages: Any
    requirements_file: Any
    apt_packages: Any
    conda_file: Any
    docker_image: Any
    tensorboard_directory: Any
    distributed: Any
    idempotent: Any
    params: Any
    auto_resume: Any
    commit_label: Any
    workspace_id: Any
    commit_hash: Any
    uncommitted_hash: Any
    workspace_remote_url: Any
    root_directory: Any
    pip_env_packages: Any
    node_group: Any
    stop_conditions: Any
    project_id: Any
    provider: Any
    local_root: Any


_FIELDS: Final = {
    "command": "command",
    "machine_type": "machine_type",
    "description": "description",
    "envvars": "environment_vars",
    "attached_resources": "attached_resources",
    "labels": "labels",
    "cwd": "cwd",
    "timeout": "timeout_minutes",
    "grace_seconds": "grace_seconds",
    "workflow_id": "workflow_id",
    "snapshot": "snapshot",
    "git_commit_hash": "git_commit_hash",
    "repository": "repository",
}
_NAMES: Final = frozenset(RunOptions.__annotations__)
_HARMLESS: Final[Mapping[str, Any]] = {"github_ref": "master"}


def run_request(
    options: Mapping[str, Any], *, workflow_id: int | None = None, caller: str = "runs.new"
) -> RunRequest:
    """The request that `options` describe; `workflow_id` is used where they name no workflow.

    Raises:
        TypeError: an unknown keyword (the nearest one is suggested), no command, a wrong type.
        BadRequest: a keyword of Spell's that this version cannot serve yet, a number that is not
            finite, a text that is not UTF-8.
    """
    for name, value in options.items():
        if name not in _NAMES:
            raise TypeError(_unexpected(name, caller))
        if name not in _FIELDS and value and value != _HARMLESS.get(name):
            raise bad_request(f"{name} is not available in spellq {__version__} yet.")
    if options.get("command") is None:
        raise TypeError(f"{caller}() missing 1 required keyword argument: 'command'")
    given = {
        field: value for name, field in _FIELDS.items() if (value := options.get(name)) is not None
    }
    if workflow_id is not None:
        given.setdefault("workflow_id", workflow_id)
    try:
        request = msgspec.convert(given, RunRequest)
    except msgspec.ValidationError as error:
        raise TypeError(f"{caller}(): {_in_our_words(str(error))}") from None
    _check_values(request)
    return request


def whole_number(value: object, what: str) -> int:
    """`value` as the int it is, NumPy's whole numbers included; `what` names it in the error.

    Raises:
        TypeError: not a whole number; True and False are none.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} has to be a whole number, not {value!r}.")
    return operator.index(value)


def label_names(labels: Collection[str], what: str) -> Collection[str]:
    """`labels`, unless they are a single text: its letters are not what is meant.

    Raises:
        TypeError: a text.
    """
    if isinstance(labels, str | bytes):
        raise TypeError(f"{what}: labels has to be a list of texts, such as [{labels!r}].")
    return labels


def _check_values(request: RunRequest) -> None:
    for name, field in _FIELDS.items():
        value = getattr(request, field)
        if isinstance(value, float) and not math.isfinite(value):
            raise bad_request(f"{name} has to be a finite number, not {value}.")
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError as error:
            raise bad_request(f"{name} is not valid UTF-8: {error.object!a}.") from None


def _unexpected(name: str, caller: str) -> str:
    message = f"{caller}() got an unexpected keyword argument {name!r}."
    near = difflib.get_close_matches(name, sorted(_NAMES), n=1)
    return f"{message} Did you mean {near[0]!r}?" if near else message


def _in_our_words(message: str) -> str:
    for name, field in _FIELDS.items():
        message = message.replace(f"`$.{field}", f"`{name}")
    return message[:1].lower() + message[1:]
