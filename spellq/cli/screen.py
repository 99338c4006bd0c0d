"""What the command writes on: stdout and stderr, terminals or not, with or without emoji."""

import os
import re
import shutil
import sys
import unicodedata
from typing import Final, TextIO

GLYPHS: Final = ("✨", "💫", "🎉", "💥", "✋", "💀", "⭐", "🌟", "✖", "✔", "ℹ️ ", "•")

_SPELLINGS: Final = {"…": "...", "→": "->", "·": "|"}
_SGR = re.compile(r"\x1b\[[0-9;:]*m")
_ESCAPE = re.compile(
    r"(?P<sgr>\x1b\[[0-9;:]*m)"
    r"|\x1b\[[0-?]*[ -/]*(?:[@-~]|$)"  # other control sequences: cursor, screen, modes
    r"|\x1b\].*?(?:\x07|\x1b\\|$)"  # commands to the system: title, clipboard, links
    r"|\x1b[PX^_].*?(?:\x1b\\|$)"  # strings for the device
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0a-\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]",
    re.DOTALL,
)


class Screen:
    """One stream, written to in spellq's voice.

    `terminal`: somebody is there; `live`: what is written can be written over; `colour`: wanted.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        terminal: bool,
        unicode: bool,
        width: int = 80,
        live: bool = True,
        colour: bool = True,
    ) -> None:
        self.stream = stream
        self.terminal = terminal
        self.live = terminal and live
        self.colour = terminal and live and colour
        self.unicode = unicode
        self.width = width

    def line(self, text: str = "") -> None:
        """Write a line of spellq's own words."""
        self.write(self.fit(text) + "\n")

    def write(self, text: str) -> None:
        """Write text as it is. It is on the stream at once: somebody may be following."""
        self.stream.write(text)
        self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()

    def error(self, text: str) -> None:
        """`ERROR: …`, its mark in red on a terminal."""
        mark = "\x1b[31mERROR:\x1b[0m" if self.colour else "ERROR:"
        self.line(f"{mark} {text.strip()}")

    def fit(self, text: str) -> str:
        """The words in the spelling the stream can show.

        Without UTF-8 there is no glyph in front, `...` for `…`, and `?` for what is not there.
        """
        if not self.unicode:
            glyph = next((glyph for glyph in GLYPHS if text.startswith(glyph)), "")
            text = text.removeprefix(glyph).removeprefix(" ") if glyph else text
        return self._spelled(text)

    def cell(self, text: str) -> str:
        """A user's own words as the stream can show them, nothing in them commanding it."""
        return self._spelled(harmless(text))

    def _spelled(self, text: str) -> str:
        if self.unicode:
            return text
        for sign, spelling in _SPELLINGS.items():
            text = text.replace(sign, spelling)
        encoding = getattr(self.stream, "encoding", None) or "ascii"
        return text.encode(encoding, "replace").decode(encoding)

    def green(self, text: str) -> str:
        return f"\x1b[32m{text}\x1b[0m" if self.colour else text


def output() -> Screen:
    """Stdout, as it is now."""
    return screen(sys.stdout)


def errors() -> Screen:
    """Stderr, as it is now."""
    return screen(sys.stderr)


def screen(stream: TextIO) -> Screen:
    """The screen on a stream. What its encoding lacks is written as `?`, never an error."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    unicode = encoding == "utf8"
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    columns = shutil.get_terminal_size().columns
    return Screen(
        stream,
        terminal=stream.isatty(),
        unicode=unicode,
        width=columns,
        live=os.environ.get("TERM") != "dumb",
        colour=not os.environ.get("NO_COLOR"),
    )


def harmless(text: str) -> str:
    """`text` without what commands a terminal: only colours, tabs and carriage returns stay."""
    return _ESCAPE.sub(lambda found: found["sgr"] or "", text)


def cells(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    return sum(_cell(character) for character in _SGR.sub("", text))


def cut(text: str, width: int) -> str:
    """As much of one line as fits into `width` columns; the end is marked with `…`."""
    if cells(text) <= width:
        return text
    kept, used = "", 1
    for character in text:
        used += _cell(character)
        if used > width:
            break
        kept += character
    return kept + "…"


def _cell(character: str) -> int:
    if unicodedata.combining(character) or character in "\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
