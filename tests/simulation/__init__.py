"""A simulated world: the real control plane, agents and adapters, and nothing else that is real.

`run_seeds` lives through many histories, each told by its seed; `make simulate SEED=n` replays one.
"""

from tests.simulation.runner import Summary, run_seeds

__all__ = ["Summary", "run_seeds"]
