"""Tables of plain text: columns aligned with spaces, no rules."""

from collections.abc import Callable, Sequence

from spellq.cli.screen import cells, harmless


def table(rows: Sequence[Sequence[str]], shown: Callable[[str], str] = harmless) -> list[str]:
    """The lines of a table. The first row may be its head.

    `shown` says how a cell looks where it is shown (`Screen.cell`).
    """
    if not rows:
        return []
    rows = [[shown(one_line(cell)) for cell in row] for row in rows]
    widths = [max(cells(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def one_line(text: str) -> str:
    """`text` on one line: every run of white space is one space."""
    return " ".join(text.split())
