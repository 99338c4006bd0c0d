"""What the handlers work with."""

from dataclasses import dataclass, field
from typing import Any

from litestar import Request
from litestar.di import NamedDependency

from spellq.control.feed import Feed
from spellq.control.launch import Launcher
from spellq.control.outputs import SavedOutputs
from spellq.control.runs import Runs
from spellq.gateway.activity import Activity
from spellq.gateway.auth import Authenticator, Caller
from spellq.gateway.closing import Closing
from spellq.ports import ArtifactStore, Store


@dataclass(frozen=True)
class Services:
    """The control plane as the gateway sees it."""

    store: Store
    artifacts: ArtifactStore
    feed: Feed
    launcher: Launcher
    runs: Runs
    outputs: SavedOutputs
    authenticator: Authenticator
    activity: Activity = field(default_factory=Activity)
    closing: Closing = field(default_factory=Closing)


Provided = NamedDependency[Services]
"""How a handler asks for the services (its parameter is called `services`)."""

ApiRequest = Request[Caller, Any, Any]
"""A request whose `user` is known."""
