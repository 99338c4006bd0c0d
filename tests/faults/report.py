"""What the campaigns found, as the file that is kept of it and as the README's table."""

from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from msgspec import Struct

from tests.faults.evidence import Tally
from tests.simulation import Summary

REPOSITORY: Final = Path(__file__).parents[2]
KEPT: Final = REPOSITORY / "docs" / "reliability.json"
README: Final = REPOSITORY / "README.md"
BEGIN: Final = "<!-- made by `make test-faults RECORD=1` -->"
END: Final = "<!-- end of what was made -->"

NOT_VERIFIED: Final = (
    "a power cut (only processes were killed: what the disk itself forgets was not tried)",
    "a disk that damages what it stores",
    "a restart of a real machine (its boot id was changed under everything that was killed)",
    "a wall clock that jumps, anywhere but in the simulation",
)


class Report(Struct, frozen=True, kw_only=True):
    """The figures of one `make test-faults`; times are in seconds."""

    lost: int
    started_twice: int
    finals_changed: int
    waits_missed: int
    other_faults: int
    histories: int
    points: dict[str, int]
    kills: int
    runs: int
    recoveries: int
    recovery_p50: float
    recovery_max: float

    @property
    def is_clean(self) -> bool:
        """Whether everything that must be nought is."""
        wrong = self.lost + self.started_twice + self.finals_changed + self.waits_missed
        return wrong + self.other_faults == 0


def report_of(tally: Tally, simulated: Summary, points: dict[str, int], kills: int) -> Report:
    """The report of everything that was done: `tally` is what came of real processes."""
    named = tally.lost + tally.started_twice + tally.finals_changed + tally.waits_missed
    return Report(
        lost=tally.lost + simulated.lost,
        started_twice=tally.started_twice + simulated.started_twice,
        finals_changed=tally.finals_changed + simulated.finals_changed,
        waits_missed=tally.waits_missed + simulated.waits_missed,
        other_faults=max(0, len(tally.faults) - named) + simulated.faults,
        histories=simulated.histories,
        points=points,
        kills=kills,
        runs=tally.runs,
        recoveries=len(tally.recoveries),
        recovery_p50=round(median(tally.recoveries or [0]), 2),
        recovery_max=round(max(tally.recoveries, default=0), 2),
    )


def table(report: Report) -> str:
    """The report in Markdown."""
    points = ", ".join(f"{count} of {what}" for what, count in report.points.items())
    rows = {
        "runs lost": report.lost,
        "commands started twice": report.started_twice,
        "final statuses changed": report.finals_changed,
        "waits that missed": report.waits_missed,
        "anything else that was not as it had to be": report.other_faults,
        "simulated histories": f"{report.histories:,}",
        f"crash points, {sum(report.points.values())} in all": points,
        "kills at random, `kill -9`": report.kills,
        "real runs looked at afterwards": f"{report.runs:,}",
        f"from the daemon's death to the next one's first answer ({report.recoveries} times), "
        "p50 / max": f"{report.recovery_p50:.2f} / {report.recovery_max:.2f} s",
    }
    lines = ["| | |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())]
    return "\n".join([*lines, "", "Not verified: " + "; ".join(NOT_VERIFIED) + "."])


def load() -> Report:
    """The report that is kept."""
    return msgspec.json.decode(KEPT.read_bytes(), type=Report)


def record(report: Report) -> None:
    """Keep the report, and bring the README to it."""
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}")


def table_in_readme() -> str:
    """The table as the README has it."""
    _, _, rest = README.read_text().partition(BEGIN)
    return rest.partition(END)[0].strip()
