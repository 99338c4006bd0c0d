"""Where a client finds its gateway: environment first, then the local daemon."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from spellq.runs import parse_number
from spellq_sdk.exceptions import ClientException

_PAIRS: Final = (("SPELLQ_URL", "SPELLQ_TOKEN"), ("SPELL_BASE_URL", "SPELL_TOKEN"))


class Settings(Struct, frozen=True):
    """What the environment says. Without `url` it is the local daemon that lives in `home`."""

    home: Path
    url: str | None = None
    token: str | None = None
    owner: str | None = None
    workflow_id: int | None = None


def settings_from(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in `environ` (the process's own by default); starts and asks nothing.

    SPELLQ_URL and SPELLQ_TOKEN come first, then SPELL_BASE_URL and SPELL_TOKEN, then the local
    daemon of SPELLQ_HOME (`~/.spellq`). Of Spell's own left-over configuration file only the
    owner's name is read.

    Raises:
        ClientException: half of a pair, a workflow id that is no number, or a process inside a
            run that was given no gateway: there, no daemon may be started.
    """
    env = os.environ if environ is None else environ
    url, token = _gateway(env)
    if url is None and env.get("SPELL_RUN"):
        raise ClientException(
            "Spell configuration not found: this is run "
            f"{env['SPELL_RUN']}, and only the master run of a workflow is given a gateway. "
            "Set SPELLQ_URL and SPELLQ_TOKEN in its environment to launch runs from it."
        )
    return Settings(
        home=spellq_home(env),
        url=url,
        token=token,
        owner=env.get("SPELL_OWNER") or _left_over_owner(env),
        workflow_id=_workflow_id(env),
    )


def spellq_home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of the local daemon: $SPELLQ_HOME, or `~/.spellq`."""
    env = os.environ if environ is None else environ
    return Path(env.get("SPELLQ_HOME") or "~/.spellq").expanduser().absolute()


def _gateway(env: Mapping[str, str]) -> tuple[str | None, str | None]:
    for url_name, token_name in _PAIRS:
        url, token = env.get(url_name), env.get(token_name)
        if url and token:
            return url, token
        # A SPELL_TOKEN alone is left over from Spell, whose address was built in.
        if url or (token and token_name != "SPELL_TOKEN"):  # noqa: S105
            there, missing = (url_name, token_name) if url else (token_name, url_name)
            raise ClientException(
                f"{there} is set and {missing} is not. Set both to use a server, "
                "or neither to use the local daemon."
            )
    return None, None


def _workflow_id(env: Mapping[str, str]) -> int | None:
    text = env.get("SPELL_WORKFLOW_ID")
    if not text:
        return None
    number = parse_number(text)
    if not number:
        raise ClientException(f"Invalid environment workflow ID: {text}")
    return number


def _left_over_owner(env: Mapping[str, str]) -> str | None:
    folder = Path(env.get("SPELL_DIR") or "~/.spell").expanduser()
    try:
        lines = (folder / "config").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    values = {
        name.strip(): value.strip().strip("'\"")
        for name, colon, value in (line.partition(":") for line in lines)
        if colon and not name.startswith((" ", "#"))
    }
    return values.get("owner") or values.get("user_name") or None
