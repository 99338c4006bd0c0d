"""What a command finds in its environment: made from nothing, never the agent's own."""

import os
import pwd
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from spellq.resources import RUN_DIRECTORY
from spellq.runs import Run

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class User(NamedTuple):
    """Who the agent and its commands are."""

    name: str
    home: str


@cache
def this_user() -> User:
    """As the machine lists them, whatever HOME says.

    One who is not listed, as it happens in a container, is called by their number, and HOME holds.
    """
    try:
        listed = pwd.getpwuid(os.geteuid())
    except KeyError:
        return User(f"uid{os.geteuid()}", os.environ.get("HOME") or "/")
    return User(listed.pw_name, listed.pw_dir)


def run_environment(
    run: Run, user_values: Mapping[str, str], gateway_url: str, master_token: str | None
) -> dict[str, str]:
    """The whole environment of a run's command.

    Only a master run's holds a secret of ours: the token it launches worker runs with.
    """
    user = this_user()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{_SYSTEM_PATH}",
        "HOME": user.home,
        "USER": user.name,
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "PYTHONUNBUFFERED": "1",
        **user_values,
        "PWD": f"{RUN_DIRECTORY}/{run.spec.cwd}".rstrip("/"),
        "SPELL_RUN": str(run.id),
    }
    if master_token is not None:
        environment |= {
            "SPELLQ_URL": gateway_url,
            "SPELLQ_TOKEN": master_token,
            "SPELL_BASE_URL": gateway_url,
            "SPELL_API_URL": gateway_url,
            "SPELL_TOKEN": master_token,
            "SPELL_OWNER": run.owner,
            "SPELL_WORKFLOW_ID": str(run.workflow),
        }
    return environment
