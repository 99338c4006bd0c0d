"""Sending the code of the current folder along, and saying what goes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spellq.cli.connection import words_screen
from spellq.cli.errors import CliError
from spellq.cli.screen import Screen

if TYPE_CHECKING:
    from spellq_sdk import AsyncClient
    from spellq_sdk.snapshot import Snapshot

_SHOWN_WARNINGS: Final = 5
_SLOW_SECONDS: Final = 1.0
_BETWEEN_SECONDS: Final = 0.2


def code_here(*, untracked: bool, quiet: bool) -> "Snapshot":
    """The snapshot of the code around the current folder; tells what people may not expect."""
    from spellq_sdk.settings import spellq_home
    from spellq_sdk.snapshot import take_snapshot

    screen = words_screen(quiet)
    snapshot = take_snapshot(_current_folder(), untracked=untracked, home=spellq_home())
    for line in told(snapshot):
        screen.line(line)
    if not has_start(snapshot):
        raise CliError(
            f"No file of the folder {snapshot.subfolder} goes along, so nothing can start in it. "
            "Start from a folder that has some, or without --no-untracked."
        )
    return snapshot


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise CliError("The current folder has been deleted. Go to another one.") from None


def has_start(snapshot: "Snapshot") -> bool:
    """Whether the folder the command is to start in will be there."""
    return not snapshot.subfolder or any(snapshot.tree.below(snapshot.subfolder))


def told(snapshot: "Snapshot") -> list[str]:
    """The lines about a snapshot: left-out files, untracked ones, uncommitted changes."""
    lines = [f"✨ {warning}" for warning in snapshot.warnings[:_SHOWN_WARNINGS]]
    if more := len(snapshot.warnings) - len(lines):
        lines.append(f"✨ {more} more {'is' if more == 1 else 'are'} left out.")
    if snapshot.plain:
        count = len(snapshot.tree.entries)
        some = "1 file of this folder is" if count == 1 else f"{count} files of this folder are"
        lines.append(f"✨ {some} included.")
    if count := snapshot.untracked:
        some = "1 untracked file is" if count == 1 else f"{count} untracked files are"
        lines.append(f"✨ {some} included (--no-untracked leaves them out).")
    if snapshot.dirty:
        lines.append("✨ Preparing uncommitted changes…")
    return lines


async def ship(client: "AsyncClient", snapshot: "Snapshot", *, quiet: bool) -> str:
    """Send what the gateway lacks of a snapshot; gives the tree's id."""
    from spellq_sdk.sending import upload

    progress = _Progress(words_screen(quiet))
    tree = await upload(snapshot, client.gateway, progress.show)
    progress.over()
    return tree


class _Progress:
    """`✨ Sending code… 120 of 500 files`, once sending takes long enough to wonder."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._due = time.monotonic() + _SLOW_SECONDS
        self._said = False

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        words = self._screen.fit(f"✨ Sending code… {done} of {total} files")
        if self._screen.live:
            self._screen.write(f"\r\x1b[2K{words}")
            self._due = now + _BETWEEN_SECONDS
        elif not self._said:
            self._screen.line(words)
        self._said = True

    def over(self) -> None:
        if self._said and self._screen.live:
            self._screen.write("\r\x1b[2K")
            self._screen.line("✨ Sending code… done")
