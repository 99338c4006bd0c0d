"""The keywords of runs.new, the status words, exceptions, and how a run looks."""

import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from spellq.runs import FINAL, Status
from spellq.wire import RunRequest, RunView
from spellq_sdk import blocking, client, exceptions, runs, workflows
from spellq_sdk.exceptions import BadRequest, ClientException, exception_for
from spellq_sdk.models import RunFields
from spellq_sdk.options import run_request
from spellq_sdk.statuses import Constants, parse_statuses


def test_every_supported_keyword_reaches_the_request() -> None:
    request = run_request(
        {
            "command": "python train.py",
            "machine_type": "t4",
            "description": "a try",
            "envvars": {"EPOCHS": "3"},
            "attached_resources": {"runs/1/data": "/mnt/data"},
            "labels": ["nightly"],
            "cwd": "models",
            "timeout": 5,
            "grace_seconds": 1,
            "workflow_id": 3,
            "snapshot": "ab",
            "git_commit_hash": "cd",
            "repository": "here",
        },
        workflow_id=14,
    )
    assert request == RunRequest(
        command="python train.py",
        machine_type="t4",
        description="a try",
        environment_vars={"EPOCHS": "3"},
        attached_resources={"runs/1/data": "/mnt/data"},
        labels=("nightly",),
        cwd="models",
        timeout_minutes=5,
        grace_seconds=1,
        workflow_id=3,
        snapshot="ab",
        git_commit_hash="cd",
        repository="here",
    )


def test_none_means_not_given_and_the_active_workflow_is_the_default() -> None:
    request = run_request({"command": "x", "machine_type": None, "cwd": None}, workflow_id=14)
    assert request == RunRequest(command="x", workflow_id=14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comand": "x"}, r"runs.new\(\) got an unexpected .*'comand'. Did you mean 'command'\?"),
        ({"command": "x", "framework": "y"}, r"unexpected keyword argument 'framework'\.$"),
        ({}, r"runs.new\(\) missing 1 required keyword argument: 'command'"),
        ({"command": 3}, "expected `str`, got `int` - at `command`"),
        ({"command": "x", "envvars": {"A": 1}}, "at `envvars"),
        ({"command": "x", "labels": "nightly"}, "at `labels`"),
    ],
)
def test_what_is_no_keyword_or_of_a_wrong_type_is_a_type_error(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        run_request(options)


def test_keywords_of_spell_that_are_not_there_yet_say_so_unless_they_ask_for_nothing() -> None:
    nothing = {"pip_packages": [], "github_ref": "master", "idempotent": False, "params": None}
    run_request({"command": "x", **nothing})
    for name, value in (("pip_packages", ["numpy"]), ("github_ref", "main"), ("distributed", 2)):
        with pytest.raises(BadRequest, match=f"{name} is not available in spellq .* yet") as caught:
            run_request({"command": "x", name: value})
        assert caught.value.response is not None
        assert caught.value.response.status_code == 400


def test_the_status_words_are_plain_strings_in_spells_order() -> None:
    assert tuple(status.value for status in FINAL) == Constants.FINAL
    assert type(Constants.COMPLETE) is str
    for status in Status:
        assert getattr(blocking.RunsService, status.name) == status.value


def test_waiting_for_nothing_or_for_an_unknown_status_is_refused() -> None:
    assert parse_statuses(("running", Status.COMPLETE)) == (Status.RUNNING, Status.COMPLETE)
    with pytest.raises(BadRequest, match="wait_status needs at least one status"):
        parse_statuses(())
    with pytest.raises(BadRequest, match=r"Unknown status 'done'.*user_requested, .*stopped"):
        parse_statuses(("done",))
    with pytest.raises(BadRequest, match=r"\*client\.runs\.FINAL"):
        parse_statuses((Constants.FINAL,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, exceptions.BadRequest),
        (401, exceptions.UnauthorizedRequest),
        (404, ClientException),
        (409, exceptions.ConflictRequest),
        (500, exceptions.ServerError),
        (503, exceptions.ServerError),
    ],
)
def test_answers_become_spells_exceptions(status: int, kind: type[ClientException]) -> None:
    error = exception_for(status, "why")
    assert type(error) is kind
    assert (str(error), error.message, error.exception) == ("why", "why", None)
    assert error.response is not None
    assert error.response.status_code == status


def test_the_exception_tree_is_spells() -> None:
    for name in ("ServerError", "BadRequest", "ConflictRequest", "JsonDecodeError", "WaitError"):
        assert issubclass(getattr(exceptions, name), ClientException)
    assert exceptions.UnauthorizedClient.__bases__ == (Exception,)
    assert ClientException("why", None, OSError()).response is None


def test_a_run_shows_only_what_it_has() -> None:
    run = RunFields(
        RunView(
            id=12,
            status=Status.COMPLETE,
            version=7,
            attempt=1,
            command="true",
            machine_type="CPU",
            owner="ada",
            created_at=datetime(2024, 5, 6, tzinfo=UTC),
            started_at=None,
            ended_at=None,
            user_exit_code=0,
            cause=None,
            reason="",
            description="",
            git_commit_hash="",
            repository="",
            cwd="",
            attached_resources={},
            environment_names=["A"],
            labels=[],
            workflow=None,
            master=False,
            agent=None,
            outputs_files=0,
            outputs_bytes=0,
            timeout_minutes=None,
        )
    )
    assert repr(run).startswith("RunFields(id=12, status='complete', command='true', creator=")
    assert "exit_code" not in repr(run)
    assert "labels" not in repr(run)
    assert (run.user_exit_code, run.gpu, run.environment_vars) == (0, "CPU", {"A": ""})
    assert type(run.status) is str
    with pytest.raises(AttributeError, match="'RunFields' object has no attribute 'nonsense'"):
        _ = run.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("blocking_kind", "async_kind", "renamed"),
    [
        (blocking.Run, runs.Run, {}),
        (blocking.RunsService, runs.RunsService, {}),
        (blocking.Workflow, workflows.Workflow, {}),
        (blocking.WorkflowsService, workflows.WorkflowsService, {}),
        (blocking.Client, client.AsyncClient, {"aclose": "close", "at": "owner"}),
    ],
)
def test_the_blocking_client_is_the_async_ones_twin(
    blocking_kind: type, async_kind: type, renamed: dict[str, str]
) -> None:
    expected = {renamed.get(name, name) for name in dir(async_kind) if name[0] != "_"}
    assert {name for name in dir(blocking_kind) if name[0] != "_"} == expected


def test_importing_the_client_loads_no_network_library() -> None:
    code = (
        "import sys, spellq, spellq_sdk\n"
        "assert 'msgspec' not in sys.modules\n"
        "import spell.client, spell.metrics, spell.api.models\n"
        "heavy = {'aiohttp', 'anyio', 'yaml', 'numpy', 'requests', 'litestar'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["timeout", "grace_seconds"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_times_are_finite(name: str, value: float) -> None:
    with pytest.raises(BadRequest, match=f"{name} has to be a finite number"):
        run_request({"command": "true", name: value})


def test_labels_may_be_a_set_and_are_no_single_text() -> None:
    assert run_request({"command": "true", "labels": {"nightly"}}).labels == ("nightly",)
    with pytest.raises(TypeError, match="labels"):
        run_request({"command": "true", "labels": "nightly"})


def test_what_is_not_utf8_is_named() -> None:
    with pytest.raises(BadRequest, match="envvars is not valid UTF-8"):
        run_request({"command": "true", "envvars": {"A": "\udce9"}})
