"""The slot helper with crash points in it; started by an armed daemon as the helper itself is."""

import json
import os
import sys

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path += [_REPOSITORY, f"{_REPOSITORY}/workers"]

from spellq_workers import helper  # noqa: E402
from spellq_workers.runfolder import RunFolder  # noqa: E402
from spellq_workers.world import World  # noqa: E402
from tests.faults.crashpoints import CrashPoints  # noqa: E402


def arm(points: CrashPoints) -> None:
    """Put the points where it writes, executes, or answers."""
    for name in ("link", "rename", "fdatasync", "posix_spawn"):
        points.watch(os, name)
    for name in ("prepare", "leave", "discard"):
        points.watch(World, name)
    points.watch(RunFolder, "open_output")
    points.watch(helper.Helper, "_send", "an answer")


def main() -> None:
    victim, at, report = os.environ["ARMED_HELPER"].split(" ", 2)
    slot = json.loads(sys.argv[1]).get("slot", "")
    is_first = not os.path.exists(report) or not os.path.getsize(report)
    if os.path.basename(slot) == victim and is_first:
        arm(CrashPoints(int(at), report))
    helper.main()


if __name__ == "__main__":
    main()
