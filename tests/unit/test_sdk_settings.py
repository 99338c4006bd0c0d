"""Where a client looks for its gateway, and how it tells a living daemon from what one left."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import spellq
from spellq.daemon import DaemonFiles
from spellq_sdk.daemon import ensure_daemon, find_daemon, stop_daemon
from spellq_sdk.exceptions import ClientException, UnauthorizedClient
from spellq_sdk.settings import Settings, settings_from

OURS = {"SPELLQ_URL": "http://ours", "SPELLQ_TOKEN": "t1"}
SPELLS = {"SPELL_BASE_URL": "http://spells", "SPELL_TOKEN": "t2"}


def found(tmp_path: Path, **environ: str) -> Settings:
    return settings_from({"SPELL_DIR": str(tmp_path), **environ})


def test_our_names_come_first_then_spells_then_the_local_daemon(tmp_path: Path) -> None:
    assert found(tmp_path, **OURS, **SPELLS).url == "http://ours"
    settings = found(tmp_path, **SPELLS, SPELL_RUN="3", SPELL_WORKFLOW_ID="14", SPELL_OWNER="ada")
    assert (settings.url, settings.token) == ("http://spells", "t2")
    assert (settings.owner, settings.workflow_id) == ("ada", 14)
    local = found(tmp_path, SPELLQ_HOME="/srv/sq", SPELL_TOKEN="left over")
    assert local == Settings(home=Path("/srv/sq"))


def test_half_a_pair_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ClientException, match="SPELLQ_URL is set and SPELLQ_TOKEN is not"):
        found(tmp_path, SPELLQ_URL="http://ours", **SPELLS)
    with pytest.raises(ClientException, match="SPELLQ_TOKEN is set and SPELLQ_URL is not"):
        found(tmp_path, SPELLQ_TOKEN="t")
    with pytest.raises(ClientException, match="SPELL_BASE_URL is set and SPELL_TOKEN is not"):
        found(tmp_path, SPELL_BASE_URL="http://spells")


def test_inside_a_run_no_daemon_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ClientException, match="Spell configuration not found"):
        found(tmp_path, SPELL_RUN="12")


@pytest.mark.parametrize("number", ["-3", "0", "1.5"])
def test_a_workflow_id_is_above_zero(tmp_path: Path, number: str) -> None:
    with pytest.raises(ClientException, match=f"Invalid environment workflow ID: {number}"):
        settings_from({"SPELLQ_HOME": str(tmp_path), "SPELL_WORKFLOW_ID": number})


def test_a_workflow_id_has_to_be_a_number(tmp_path: Path) -> None:
    with pytest.raises(ClientException, match="Invalid environment workflow ID: one"):
        found(tmp_path, **OURS, SPELL_WORKFLOW_ID="one")


def test_of_spells_own_configuration_only_the_owner_is_read(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("type: global\nuser_name: 'ada'\ntoken: secret\n")
    settings = found(tmp_path)
    assert (settings.owner, settings.url, settings.token) == ("ada", None, None)
    config.write_text("user_name: ada\nowner: lovelace\n")
    assert found(tmp_path).owner == "lovelace"
    assert found(tmp_path, SPELL_OWNER="grace").owner == "grace"
    config.write_bytes(b"\xff\xfe")
    assert found(tmp_path).owner is None


def leave(home: Path, pid: int, version: str = spellq.__version__) -> None:
    """What a daemon leaves in its home while it lives, and if it is killed."""
    record = {"url": "http://127.0.0.1:7735", "pid": pid, "version": version}
    (home / "daemon.json").write_bytes(msgspec.json.encode(record))
    (home / "token").write_text("sq_ada_local_secret\n")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A home whose lock is held, as by a living daemon (this process)."""
    leave(tmp_path, os.getpid())
    files = DaemonFiles(tmp_path)
    files.lock()
    yield tmp_path
    files.unlock()


def test_a_living_daemon_is_found_and_none_is_started(locked: Path) -> None:
    daemon = find_daemon(locked)
    assert daemon is not None
    assert (daemon.url, daemon.token) == ("http://127.0.0.1:7735", "sq_ada_local_secret")
    assert ensure_daemon(locked, announce=lambda: pytest.fail("started one")) == daemon
    leave(locked, os.getpid(), version="0.0.1")
    other = ensure_daemon(locked, any_version=True)
    assert (other.version, other.started) == ("0.0.1", False)


def test_what_a_killed_daemon_left_is_not_taken_for_one(tmp_path: Path) -> None:
    assert find_daemon(tmp_path / "nothing") is None
    leave(tmp_path, os.getpid())  # the number is another process's now: nobody holds the lock
    assert find_daemon(tmp_path) is None
    assert stop_daemon(tmp_path) is False
    (tmp_path / "daemon.json").write_text("{half")
    assert find_daemon(tmp_path) is None


def test_a_daemon_whose_process_is_gone_is_not_found(locked: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leave(locked, process.pid)
    assert find_daemon(locked) is None


def test_a_home_that_cannot_be_is_named_with_its_remedy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    with pytest.raises(ClientException, match=rf"{home} cannot be used.*SPELLQ_HOME"):
        ensure_daemon(home)


def test_a_client_needs_a_token() -> None:
    from spellq_sdk import AsyncClient

    with pytest.raises(UnauthorizedClient):
        AsyncClient("http://127.0.0.1:1", "")


def test_a_daemon_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    announced: list[bool] = []
    with pytest.raises(ClientException, match=r"nonsense"):
        ensure_daemon(home, arguments=["--nonsense"], announce=lambda: announced.append(True))
    assert announced == [True]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "log").stat().st_mode) == 0o600


def test_a_daemon_on_its_way_out_is_let_go_before_another_is_started(tmp_path: Path) -> None:
    leave(tmp_path, os.getpid())
    (tmp_path / "daemon.json").unlink()  # no longer announced, still locked
    files = DaemonFiles(tmp_path)
    files.lock()
    leaving = threading.Thread(target=files.unlock)
    with pytest.raises(ClientException, match="nonsense"):
        ensure_daemon(tmp_path, arguments=["--nonsense"], announce=leaving.start)
    leaving.join()
