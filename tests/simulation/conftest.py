"""Simulated worlds have guards of their own (`tests.simulation.sealed`)."""

import pytest


@pytest.fixture(autouse=True)
def _unblocked() -> None:
    """In place of the guard of every other test: no simulated loop can be blocked."""
