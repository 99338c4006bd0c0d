"""How a run's log looks: every line, or (on a terminal) with a spinner for what takes a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from spellq.cli.screen import Screen, cells, cut, harmless
from spellq.runs import Status

GLYPHS: Final = {
    Status.STOPPING: "💫",
    Status.KILLING: "💫",
    Status.COMPLETE: "🎉",
    Status.FAILED: "💥",
    Status.INTERRUPTED: "✋",
    Status.KILLED: "💀",
    Status.STOPPED: "✋",
}
"""The glyph before a status event's text; every other status has ✨."""

SPINNING: Final = frozenset(
    {
        Status.USER_REQUESTED,
        Status.MACHINE_REQUESTED,
        Status.BUILDING,
        Status.MOUNTING,
        Status.SAVING,
        Status.PUSHING,
        Status.BUILD_FAILED,
        Status.MOUNT_FAILED,
    }
)
"""The statuses whose lines go by in a spinner on a terminal."""

_UNFINISHED: Final = frozenset({Status.BUILD_FAILED, Status.MOUNT_FAILED})
_FRAMES: Final = ("⭐", "🌟")
_ASCII_FRAMES: Final = ("|", "/", "-", "\\")
_FRAME_SECONDS: Final = 0.25
_CLEAR_LINE: Final = "\r\x1b[2K"


class Entry(Protocol):
    """A log entry, as the SDK gives it."""

    @property
    def status(self) -> str: ...
    @property
    def log(self) -> str: ...
    @property
    def status_event(self) -> bool | None: ...
    @property
    def level(self) -> str | None: ...
    @property
    def important(self) -> bool | None: ...


class LogView:
    """Every line as it comes; status events begin with a glyph. Used where nobody looks live."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def show(self, entry: Entry) -> None:
        """Write one entry."""
        if entry.status_event:
            self.screen.line(f"{_glyph(entry)} {entry.log}")
        else:
            self._user_line(entry)

    def over(self) -> None:
        """The log is at its end (or nobody wants more of it)."""

    async def spin(self) -> None:
        """Keep moving what moves, until cancelled."""

    def _user_line(self, entry: Entry) -> None:
        end = "" if getattr(entry, "continued", False) else "\n"
        text = harmless(entry.log) if self.screen.terminal else entry.log
        self.screen.write(text + end)


class LiveLogView(LogView):
    """For a terminal: a spinner while a machine is found, the code built, outputs saved."""

    def __init__(self, screen: Screen, hint: str) -> None:
        super().__init__(screen)
        self._hint = hint
        self._status: str | None = None
        self._latest = ""
        self._frame = 0
        self._drawn = False
        self._coloured = False
        self._error = False

    def show(self, entry: Entry) -> None:
        if self._status is not None and entry.status != self._status:
            self._finish()
        error = entry.level == "error"
        self._error |= error
        if entry.status not in SPINNING:
            with self._above(own=bool(entry.status_event)):
                super().show(entry)
            return
        self._status = entry.status
        if error or entry.important:
            with self._above():
                self.screen.line(f"{'✖' if error else '💫'} {harmless(entry.log)}")
        else:
            self._latest = harmless(entry.log).strip().rpartition("\r")[2]
            self._draw()

    def over(self) -> None:
        if self._status is not None:
            self._erase()
            if self._status not in _UNFINISHED:
                self.screen.line(f"✨ {_title(self._status)}… {self._latest}".rstrip())
            self._status = None
        self._reset_colour()
        if self._error:
            self.screen.line(self._hint)

    async def spin(self) -> None:
        import anyio

        while True:
            await anyio.sleep(_FRAME_SECONDS)
            self._frame += 1
            if self._status is not None:
                self._draw()

    def _user_line(self, entry: Entry) -> None:
        super()._user_line(entry)
        self._coloured |= "\x1b" in entry.log

    def _finish(self) -> None:
        self._erase()
        if self._status is not None and self._status not in _UNFINISHED:
            self.screen.line(f"✨ {_title(self._status)}… done")
        self._status, self._latest = None, ""

    @contextmanager
    def _above(self, *, own: bool = True) -> Iterator[None]:
        self._erase()
        if own:
            self._reset_colour()
        yield
        if self._status is not None:
            self._draw()

    def _reset_colour(self) -> None:
        if self._coloured:
            self.screen.write("\x1b[0m")
            self._coloured = False

    def _draw(self) -> None:
        assert self._status is not None
        frames = _FRAMES if self.screen.unicode else _ASCII_FRAMES
        frame = frames[self._frame % len(frames)]
        words = cut(f"{_title(self._status)}… {self._latest}", self.screen.width - cells(frame) - 4)
        self.screen.write(f"{_CLEAR_LINE}{frame} {self.screen.fit(words)}")
        self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            self.screen.write(_CLEAR_LINE)
            self._drawn = False


def log_view(screen: Screen, run: int, program: str, *, verbose: bool = False) -> LogView:
    """The view that suits the screen. `program` is named in the hint after an error."""
    if verbose or not screen.live:
        return LogView(screen)
    hint = f"ℹ️  Use '{program} logs {run} --verbose' to examine cause of error."
    return LiveLogView(screen, hint)


def _glyph(entry: Entry) -> str:
    return GLYPHS.get(Status(entry.status), "✨")


def _title(status: str) -> str:
    return status.title()
