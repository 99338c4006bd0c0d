"""`send_metric`, for commands of runs. This version checks its arguments and collects nothing."""

import math
import numbers
import os
import warnings
from typing import Any

__all__ = ["SpellMetricWarning", "send_metric"]


class SpellMetricWarning(Warning):
    """A metric was discarded, or its index was ignored."""


_told = False


def send_metric(name: str, value: Any, index: int | None = None) -> None:
    """Report a value (a whole or a real number, NumPy's too, or a text) under a name.

    Does nothing outside a run (SPELL_RUN not set). Never raises: what cannot be taken is discarded
    with a SpellMetricWarning; an index that is no int is ignored with one.
    """
    if not os.environ.get("SPELL_RUN"):
        return
    if not isinstance(name, str):
        _warn(f"the name of a metric has to be a str, not {type(name).__name__}: discarded")
    elif not isinstance(value, numbers.Real | str):
        _warn(f"metric {name!r} cannot be a {type(value).__name__}: discarded")
    elif isinstance(value, numbers.Real) and not math.isfinite(value):
        _warn(f"metric {name!r} is not finite: discarded")
    else:
        if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
            _warn(f"the index of metric {name!r} has to be an int: ignored")
        _tell_once()


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        _warn("this version of spellq does not collect metrics yet")


def _warn(message: str) -> None:
    warnings.warn(message, SpellMetricWarning, stacklevel=3)
