"""Spell's Python API: `client = spell.client.from_environment()`."""

import os

from spellq_sdk.blocking import Client
from spellq_sdk.doors import Door, LocalDoor, RemoteDoor
from spellq_sdk.exceptions import ClientException, UnauthorizedClient
from spellq_sdk.models import RangeSpec, ValueSpec
from spellq_sdk.settings import spellq_home

__all__ = ["RangeSpec", "SpellClient", "ValueSpec", "from_environment"]


class SpellClient(Client):
    """A blocking client, made the way Spell's scripts make it."""

    def __init__(
        self,
        token: str,
        spell_admin_token: str | None = None,
        base_url: str | None = None,
        version_str: str = "v1",
        owner: str | None = None,
        workflow_id: int | None = None,
    ) -> None:
        """A client of the gateway at `base_url`, else $SPELL_BASE_URL, else $SPELLQ_URL.

        Without any of them it is a client of the local daemon, which has a token of its own; the
        one given is of no use there. `spell_admin_token` and `version_str` are accepted and have
        no effect.

        Raises:
            UnauthorizedClient: an empty token.
            ClientException: the daemon cannot be started, or the workflow cannot be loaded.
        """
        if not token:
            raise UnauthorizedClient("SpellClient needs a token.")
        self._set_up(_door(base_url, token), owner, workflow_id)


def from_environment() -> SpellClient:
    """The client of this environment: of the gateway it names, else of the local daemon.

    SPELLQ_URL and SPELLQ_TOKEN come first, then SPELL_BASE_URL and SPELL_TOKEN. SPELL_OWNER names
    the owner; SPELL_WORKFLOW_ID, set in a master run, makes `active_workflow`.

    Raises:
        ClientException: no gateway is named inside a run, the environment contradicts itself, or
            the daemon cannot be started.
    """
    return SpellClient.from_environment()


def _door(base_url: str | None, token: str) -> Door:
    url = base_url or os.environ.get("SPELL_BASE_URL") or os.environ.get("SPELLQ_URL")
    if url:
        return RemoteDoor(url, token)
    if os.environ.get("SPELL_RUN"):
        raise ClientException(
            "Spell configuration not found: inside a run, give base_url or set SPELLQ_URL."
        )
    return LocalDoor(spellq_home())
