"""What every test lives under: the loop must not be blocked, warnings are errors."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def _unblocked() -> Iterator[BlockBuster]:
    """A call that blocks the event loop in spellq's own code fails the test."""
    with blockbuster_ctx(
        scanned_modules=["spellq.control", "spellq.gateway", "spellq_brokers", "spellq_sdk"],
        # The blocking client blocks whoever calls it, even in a notebook's running loop.
        excluded_modules=["spellq_sdk.portal", "spellq_sdk.blocking"],
    ) as guard:
        # The store of a simulated world executes its steps where they are submitted.
        for name, function in guard.functions.items():
            if name.startswith("sqlite3."):
                function.can_block_in("embedded/writer.py", {"submit", "read", "close"})
                function.can_block_in("embedded/store.py", {"in_memory"})
        yield guard


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only root can set up (file systems, control groups) is not asked of others."""
    if os.geteuid() != 0:
        config.hook.pytest_deselected(items=[item for item in items if _needs_root(item)])
        items[:] = [item for item in items if not _needs_root(item)]


def _needs_root(item: pytest.Item) -> bool:
    return item.get_closest_marker("root") is not None
