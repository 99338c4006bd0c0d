"""The HTTP door: REST, the event socket, server-sent events."""

from spellq.gateway.app import Services, create_app

__all__ = ["Services", "create_app"]
