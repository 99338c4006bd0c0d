"""Projects: only the error that Spell's scripts catch. Projects are not available yet."""

from spellq_sdk.exceptions import ClientException

__all__ = ["NotFoundException"]


class NotFoundException(ClientException):
    """There is no project of that name."""
