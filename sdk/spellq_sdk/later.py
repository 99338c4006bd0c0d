"""What Spell's clients had and this version has not: named, so that a script learns why."""

from typing import NoReturn

from spellq.version import __version__
from spellq_sdk.exceptions import ClientException

_RELEASE = ".".join(__version__.split(".")[:2])


class LaterServices:
    """The services a client does not have yet. Asking for one raises ClientException."""

    @property
    def hyper(self) -> NoReturn:
        """Hyperparameter searches: not available yet."""
        raise _later("client.hyper")

    @property
    def models(self) -> NoReturn:
        """Models: not available yet."""
        raise _later("client.models")

    @property
    def resources(self) -> NoReturn:
        """Resources: not available yet."""
        raise _later("client.resources")

    @property
    def servers(self) -> NoReturn:
        """Model servers: not available yet."""
        raise _later("client.servers")


def _later(what: str) -> ClientException:
    return ClientException(f"{what} is not available in spellq {_RELEASE} yet.")
