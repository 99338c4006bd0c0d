"""Settings, the key, and the home folder of a daemon: what cannot be is told clearly."""

import os
import stat
from pathlib import Path

import pytest

from spellq.daemon import DaemonFiles, UnusableHome, local_owner
from spellq.resources import InvalidResourceError, parse_resource
from spellq.runs import MAX_NUMBER, parse_number
from spellq.seal import Sealer, UnusableKey, load_or_create_key
from spellq.settings import (
    InvalidSetting,
    parse_machine_types,
    parse_master_slots,
    parse_min_free,
    read_config,
    setting,
)
from spellq.tokens import MasterToken, parse_master_token

DIGITS = "9" * 5000


def test_machine_types() -> None:
    assert parse_machine_types("CPU=2, t4=1") == {"cpu": 2, "t4": 1}
    assert parse_machine_types("cpu")["cpu"] >= 4


@pytest.mark.parametrize(
    "text", ["", "c p u", "cpu=0", "cpu=-1", "cpu=1025", f"cpu={DIGITS}", "cpu,CPU", "Masters=2"]
)
def test_machine_types_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidSetting):
        parse_machine_types(text)


def test_free_space_that_is_kept() -> None:
    assert parse_min_free(None) == 256 << 20
    assert parse_min_free("1GiB") == 1 << 30
    assert parse_min_free("0") == 0
    with pytest.raises(InvalidSetting, match="SPELLQ_MIN_FREE_BYTES"):
        parse_min_free("much")


def test_slots_for_masters() -> None:
    assert parse_master_slots(None, {"cpu": 4}) == 16
    assert parse_master_slots(None, {"t4": 1}) == 0
    assert parse_master_slots("3", {"t4": 1}) == 3
    assert parse_master_slots("0", {"cpu": 4}) == 0
    for text in ("", "many", "-1", "1025", DIGITS):
        with pytest.raises(InvalidSetting, match="SPELLQ_MASTER_SLOTS"):
            parse_master_slots(text, {"cpu": 4})


def test_a_setting_comes_from_the_first_place_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPELLQ_PORT", "2")
    assert setting("SPELLQ_PORT", "1", {"port": 3}) == "1"
    assert setting("SPELLQ_PORT", None, {"port": 3}) == "2"
    monkeypatch.delenv("SPELLQ_PORT")
    assert setting("SPELLQ_PORT", None, {"port": 3}) == "3"
    assert setting("SPELLQ_PORT", None, {}) is None


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(InvalidSetting, match=r"config\.toml cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("0012", 12),
        (str(MAX_NUMBER), MAX_NUMBER),
        (str(MAX_NUMBER + 1), None),
        (DIGITS, None),
        ("", None),
        ("-1", None),
        ("١", None),
        ("1_0", None),
    ],
)
def test_numbers(text: str, number: int | None) -> None:
    assert parse_number(text) == number


def test_resources_beyond_all_runs() -> None:
    assert parse_resource(f"runs/{MAX_NUMBER}/x").run == MAX_NUMBER
    for number in (str(MAX_NUMBER + 1), DIGITS, "0"):
        with pytest.raises(InvalidResourceError) as caught:
            parse_resource(f"runs/{number}/x")
        assert len(str(caught.value)) < 400


def test_tokens_of_masters() -> None:
    assert parse_master_token("sqr_12_3_abc") == MasterToken(12, 3)
    for token in ("sq_12_3_abc", "sqr_12_3", "sqr_a_3_x", f"sqr_{DIGITS}_1_x", f"sqr_1_{DIGITS}_x"):
        assert parse_master_token(token) is None


def test_a_key_is_made_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    (tmp_path / "key.new").write_bytes(b"half of a k")  # a crash left it
    key = load_or_create_key(path)
    assert load_or_create_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
    assert Sealer(key).open(Sealer(key).seal({"A": "b"})) == {"A": "b"}


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_key_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UnusableKey, match=rf"{path} is damaged.*this file {len(content)}"):
        load_or_create_key(path)
    assert path.read_bytes() == content


def test_a_home_is_made_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o755)
    files = DaemonFiles(home)
    files.lock()
    files.unlock()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_home_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnusableHome, match="Set SPELLQ_HOME"):
        DaemonFiles(tmp_path / "file" / "home").lock()


def test_a_token_that_is_no_text_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    assert DaemonFiles(tmp_path).read_token() is None


def test_the_owner_is_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = local_owner()
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory")
    assert local_owner() == owner
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert local_owner() == "uid4000000000"
