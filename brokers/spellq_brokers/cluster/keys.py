"""The names of everything in Redis."""

import re
from typing import Final

SHARDS: Final = 16
"""Fixed when an installation is made: a run's shard is its number mod this."""

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Keys:
    """Names below one namespace. What is in braces decides where a cluster of Redis keeps a key,
    so that all keys of a shard lie together.

    Raises:
        ValueError: no namespace.
    """

    def __init__(self, namespace: str) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ValueError(
                f"Invalid namespace {namespace!r}: use letters, digits, '.', '_' and '-'."
            )
        self._namespace = namespace

    def of_shard(self, shard: int, name: str) -> str:
        """A key of a shard: `spellq:{7}:due`."""
        return f"{self._namespace}:{{{shard}}}:{name}"

    def of_run(self, number: int, name: str) -> str:
        """A key of a run's, in its shard: `spellq:{7}:run:39`."""
        return self.of_shard(number % SHARDS, f"{name}:{number}")

    def of_all(self, name: str) -> str:
        """A key of the installation: `spellq:{all}:agents`."""
        return f"{self._namespace}:{{all}}:{name}"

    def epochs(self) -> list[str]:
        """Where the installation's epoch stands, once for all and once in every shard."""
        return [self.of_all("epoch"), *(self.of_shard(n, "epoch") for n in range(SHARDS))]
