"""How long to wait before trying again."""

import random
from collections.abc import Iterator
from typing import Final

FIRST_SECONDS: Final = 0.05
LONGEST_SECONDS: Final = 2.0


def backoff() -> Iterator[float]:
    """Seconds to wait before each try: they double up to 2 s, each jittered down by up to half."""
    ceiling = FIRST_SECONDS
    while True:
        yield ceiling * random.uniform(0.5, 1.0)  # noqa: S311
        ceiling = min(ceiling * 2, LONGEST_SECONDS)
