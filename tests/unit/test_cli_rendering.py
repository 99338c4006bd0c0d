"""How logs look: for programs line by line, on a terminal with a spinner."""

import io
import re
from collections.abc import Iterable

import pytest

from spellq.cli.rendering import LogView, log_view
from spellq.cli.screen import Screen, cells, cut, harmless, screen
from spellq_sdk.models import LogEntry


def event(status: str, log: str, level: str | None = "info", important: bool = False) -> LogEntry:
    return LogEntry(
        status=status,
        log=log,
        timestamp="2020-05-06T15:56:07+00:00",
        status_event=True,
        level=level,
        important=important,
    )


def line(status: str, log: str) -> LogEntry:
    return LogEntry(status=status, log=log, timestamp="2020-05-06T15:56:07+00:00")


FINISHED = [
    event("machine_requested", "Run created -- waiting for a CPU machine."),
    event("building", "Run is building"),
    event("building", "Machine acquired -- commencing run"),
    event("mounting", "Run is mounting"),
    event("running", "Run is running"),
    line("running", "Hello World!"),
    event("saving", "Run is saving"),
    event("saving", "No modified or new files found"),
    event("pushing", "Run is pushing"),
    event("complete", "Total run time: 11.525986s"),
    event("complete", "Run 352 complete"),
]


class Shown:
    """A screen that can be read: what stays after the spinner was erased."""

    def __init__(self, *, terminal: bool, unicode: bool = True, verbose: bool = False) -> None:
        self.stream = io.StringIO()
        self.screen = Screen(self.stream, terminal=terminal, unicode=unicode, width=60)
        self.view: LogView = log_view(self.screen, 352, "spellq", verbose=verbose)

    def show(self, entries: Iterable[LogEntry]) -> "Shown":
        for entry in entries:
            self.view.show(entry)
        return self

    def over(self) -> list[str]:
        self.view.over()
        return self.lines()

    def lines(self) -> list[str]:
        """The screen's lines; where a line was cleared, what was written after that."""
        text = self.stream.getvalue().removesuffix("\n")
        return [re.split(r"\r\x1b\[2K", line)[-1] for line in text.split("\n")]


def test_a_finished_run_on_a_terminal() -> None:
    assert Shown(terminal=True).show(FINISHED).over() == [
        "✨ Machine_Requested… done",
        "✨ Building… done",
        "✨ Mounting… done",
        "✨ Run is running",
        "Hello World!",
        "✨ Saving… done",
        "✨ Pushing… done",
        "🎉 Total run time: 11.525986s",
        "🎉 Run 352 complete",
    ]


EVERY_LINE = [
    "✨ Run created -- waiting for a CPU machine.",
    "✨ Run is building",
    "✨ Machine acquired -- commencing run",
    "✨ Run is mounting",
    "✨ Run is running",
    "Hello World!",
    "✨ Run is saving",
    "✨ No modified or new files found",
    "✨ Run is pushing",
    "🎉 Total run time: 11.525986s",
    "🎉 Run 352 complete",
]


def test_elsewhere_every_line() -> None:
    shown = Shown(terminal=False).show(FINISHED)
    assert shown.over() == EVERY_LINE
    assert "\x1b" not in shown.stream.getvalue()


def test_verbose_every_line_on_a_terminal_too() -> None:
    assert Shown(terminal=True, verbose=True).show(FINISHED).over() == EVERY_LINE


def test_without_utf8_no_emoji() -> None:
    assert Shown(terminal=True, unicode=False).show(FINISHED).over() == [
        "Machine_Requested... done",
        "Building... done",
        "Mounting... done",
        "Run is running",
        "Hello World!",
        "Saving... done",
        "Pushing... done",
        "Total run time: 11.525986s",
        "Run 352 complete",
    ]
    assert Shown(terminal=False, unicode=False).show(FINISHED).over()[-1] == "Run 352 complete"


def test_the_spinner_shows_the_latest_line() -> None:
    shown = Shown(terminal=True).show(FINISHED[:3])
    assert shown.lines()[-1] == "⭐ Building… Machine acquired -- commencing run"
    ascii_shown = Shown(terminal=True, unicode=False).show(FINISHED[:1])
    assert (
        ascii_shown.lines()[-1] == "| Machine_Requested... Run created -- waiting for a CPU ma..."
    )


def test_a_log_that_is_not_over_says_where_it_is() -> None:
    assert Shown(terminal=True).show(FINISHED[:2]).over() == [
        "✨ Machine_Requested… done",
        "✨ Building… Run is building",
    ]


@pytest.mark.parametrize(
    ("status", "glyph"),
    [
        ("stopping", "💫"),
        ("killing", "💫"),
        ("stopped", "✋"),
        ("interrupted", "✋"),
        ("killed", "💀"),
        ("complete", "🎉"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_glyphs(status: str, glyph: str, terminal: bool) -> None:
    assert Shown(terminal=terminal).show([event(status, "words")]).over() == [f"{glyph} words"]


def test_errors_stay_and_add_the_hint() -> None:
    entries = [
        event("building", "Run is building"),
        event("building", "no such package", level="error"),
        event("build_failed", "Run 352 build failed: no such package", level="error"),
    ]
    assert Shown(terminal=True).show(entries).over() == [
        "✖ no such package",
        "✨ Building… done",
        "✖ Run 352 build failed: no such package",
        "ℹ️  Use 'spellq logs 352 --verbose' to examine cause of error.",
    ]
    assert Shown(terminal=False).show(entries).over() == [
        "✨ Run is building",
        "✨ no such package",
        "✨ Run 352 build failed: no such package",
    ]


def test_a_failed_run() -> None:
    entries = [event("failed", "Run 352 failed: no space", level="error")]
    assert Shown(terminal=True).show(entries).over() == [
        "💥 Run 352 failed: no space",
        "ℹ️  Use 'spellq logs 352 --verbose' to examine cause of error.",
    ]


def test_important_lines_stay() -> None:
    entries = [event("saving", "Run is saving"), event("saving", "Half is saved", important=True)]
    shown = Shown(terminal=True).show(entries)
    assert shown.over()[0] == "💫 Half is saved"


def test_saving_lines_after_the_end() -> None:
    entries = [event("complete", "Run 1 complete"), line("saving", "Saving '/spell/a'")]
    assert Shown(terminal=True).show(entries).over() == [
        "🎉 Run 1 complete",
        "✨ Saving… Saving '/spell/a'",
    ]


HOSTILE = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J\x1b[?1049hb\x07\x9b1mc\x1bPx\x1b\\d\t50%\r60%"


def test_a_terminal_gets_colours_and_no_commands() -> None:
    shown = Shown(terminal=True).show([line("running", HOSTILE)])
    assert shown.stream.getvalue() == "a\x1b[31mred\x1b[0mb1mcd\t50%\r60%\n"
    shown.view.over()
    assert shown.stream.getvalue().endswith("\n\x1b[0m")


def test_a_pipe_gets_everything() -> None:
    shown = Shown(terminal=False).show([line("running", HOSTILE)])
    assert shown.stream.getvalue() == HOSTILE + "\n"


def test_a_cut_escape_sequence_is_harmless() -> None:
    assert harmless("x\x1b") == "x"
    assert harmless("x\x1b[1;") == "x"
    assert harmless("x\x1b]52;c;aGk=") == "x"


def test_cells_and_cut() -> None:
    assert cells("✨ a\x1b[1mb\x1b[0m") == 5
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdef", 5) == "abcd…"
    assert cut("ab✨✨", 5) == "ab✨…"


def test_a_stream_in_ascii_never_fails() -> None:
    raw = io.BytesIO()
    ascii_screen = screen(io.TextIOWrapper(raw, encoding="ascii"))
    ascii_screen.line("✨ Casting… → · é")
    assert raw.getvalue() == b"Casting... -> | ?\n"


async def test_the_spinner_moves() -> None:
    import asyncio

    shown = Shown(terminal=True).show(FINISHED[:1])
    moved = asyncio.Event()
    write = shown.stream.write

    def heard(text: str) -> int:
        moved.set()
        return write(text)

    shown.stream.write = heard  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        spinning = asyncio.ensure_future(shown.view.spin())
        await moved.wait()
    spinning.cancel()
    assert shown.lines()[-1].startswith("🌟 Machine_Requested…")
