"""The names Spell's scripts import, and send_metric."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import spell.api.exceptions
import spell.api.models
import spell.client
import spell.client.runs
import spell.client.workflows
import spell.metrics
from spell.metrics import SpellMetricWarning, send_metric
from spell.shared.projects import NotFoundException
from spellq_sdk import blocking


def test_the_names_of_spell_are_there() -> None:
    assert spell.client.runs.Run is blocking.Run
    assert spell.client.runs.RunsService.FINAL[0] == "complete"
    assert spell.client.workflows.Workflow is blocking.Workflow
    assert issubclass(spell.client.SpellClient, blocking.Client)
    assert issubclass(spell.api.exceptions.WaitError, spell.api.exceptions.ClientException)
    assert str(spell.api.models.LogEntry(status="running", log="hi", timestamp="")) == "hi"


def test_what_is_not_there_yet_can_be_imported() -> None:
    assert spell.client.RangeSpec(0, 1).scaling == "linear"
    assert spell.api.models.ValueSpec([1, 2]).values == [1, 2]
    assert issubclass(NotFoundException, spell.api.exceptions.ClientException)


@pytest.mark.parametrize("name", ["hyper", "models", "resources", "servers"])
def test_services_that_are_not_there_yet_say_so(name: str) -> None:
    with (
        blocking.Client("http://127.0.0.1:1", "token") as client,
        pytest.raises(
            spell.api.exceptions.ClientException,
            match=rf"^client\.{name} is not available in spellq 0\.1 yet\.$",
        ),
    ):
        getattr(client, name)


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SPELLQ_URL", "SPELLQ_TOKEN", "SPELL_BASE_URL", "SPELL_TOKEN", "SPELL_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPELL_DIR", str(tmp_path))
    monkeypatch.setenv("SPELLQ_HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("no_environment")
def test_inside_a_run_a_client_is_not_made_out_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPELL_RUN", "12")
    with pytest.raises(spell.api.exceptions.ClientException, match="configuration not found"):
        spell.client.from_environment()
    with pytest.raises(spell.api.exceptions.ClientException, match="base_url"):
        spell.client.SpellClient("token")


@pytest.mark.usefixtures("no_environment")
def test_a_client_asks_nothing_of_a_named_gateway_when_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(spell.api.exceptions.UnauthorizedClient):
        spell.client.SpellClient("")
    monkeypatch.setenv("SPELL_BASE_URL", "http://127.0.0.1:1")
    with spell.client.SpellClient("token", owner="ada") as client:
        assert (client.active_workflow, client.owner) == (None, "ada")
    monkeypatch.setenv("SPELL_TOKEN", "token")
    with spell.client.from_environment() as client:
        assert type(client) is spell.client.SpellClient


def test_a_client_nobody_closed_neither_hangs_nor_warns_at_exit() -> None:
    code = (
        "import os, spell.client\n"
        "os.environ.update(SPELL_BASE_URL='http://127.0.0.1:1', SPELL_TOKEN='t', SPELL_OWNER='a')\n"
        "client = spell.client.from_environment()\n"
        "run = client.runs\n"
    )
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""


def told(name: Any, value: Any, index: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        send_metric(name, value, index)
    assert all(warning.category is SpellMetricWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_metrics_are_checked_inside_a_run_and_never_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPELL_RUN", raising=False)
    assert told("loss", [1]) == []
    monkeypatch.setenv("SPELL_RUN", "12")
    monkeypatch.setattr(spell.metrics, "_told", False)
    assert "does not collect metrics" in told("loss", 0.5)[0]
    assert told("loss", 0.5, 3) == told("note", "text") == told("done", True) == []
    assert "has to be a str" in told(3, 0.5)[0]
    assert "list: discarded" in told("rate", [0.1])[0]
    assert "not finite" in told("loss", float("nan"))[0]
    assert "ignored" in told("loss", 0.5, 1.5)[0]
