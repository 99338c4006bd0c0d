"""A run's folder on the host, as the slot helper keeps it. Only the standard library.

`files` is what the command makes below /spell, `work` belongs to the overlay, `tmp` and `home` are
the run's own, `output` is what it wrote to stdout and stderr; `started` is there once the command
may have been executed, `exit.json` once it and all it started are dead. Where no overlay can be had
`files` begins as a copy of the code, and `copied.json` tells of what (see copies.py).

The same few folders are used again for the next run where nothing was left in them: file systems
grow slow where thousands are made and removed in a minute. `output` is a new file each time:
whoever still holds the last run's has nothing of the next one's.
"""

import json
import os
import stat
from contextlib import suppress
from typing import Any

from spellq_workers import folders

FOLDERS = {"files": 0o755, "work": 0o700, "tmp": 0o1777, "home": 0o700}
MAX_TRACED = 64

Message = dict[str, Any]


class Host:
    """The host's file system, by a descriptor of its root. Paths are absolute, without links."""

    def __init__(self, root: str) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def at(self, path: str) -> str:
        """The path by which this process reaches a path of the host."""
        return f"/proc/self/fd/{self._root}{path}"

    def open(self, path: str) -> int:
        """A descriptor that only names the place (O_PATH)."""
        return os.open(self.at(path), os.O_PATH | os.O_CLOEXEC)

    def identity(self, path: str) -> tuple[int, int] | None:
        """What is at the path now, as (device, inode)."""
        try:
            found = os.stat(self.at(path))
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def close(self) -> None:
        os.close(self._root)


JOURNAL_BYTES = 512
"""A journal is written into a room of this size, padded with spaces."""


class RunFolder:
    """Made new at `path`."""

    def __init__(self, host: Host, path: str) -> None:
        self.path = path
        self._host = host
        self._traced: object = None
        os.mkdir(host.at(path), 0o700)
        self._folder = host.open(path)
        for name, mode in FOLDERS.items():
            os.mkdir(self._at(name), mode & 0o755)
            if mode & ~0o755:
                os.chmod(self._at(name), mode)
        self._take_room_for_the_journal()

    def open_output(self) -> int:
        """The output, for appending."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open("output", flags, 0o600, dir_fd=self._folder)

    def mark_started(self) -> None:
        os.link("output", "started", src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def write_journal(self, journal: Message) -> None:
        """The journal is there whole, and on disk, or not at all.

        Its room was taken when the folder was made, so that a full disk does not keep an exit code
        from being written; and what only replaces bytes in place is the cheapest to sync.
        """
        data = json.dumps(journal).encode().ljust(JOURNAL_BYTES - 1) + b"\n"
        file = os.open("exit.json.new", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600,
                       dir_fd=self._folder)  # fmt: skip
        try:
            os.write(file, data)
            os.fdatasync(file)
        finally:
            os.close(file)
        self._rename("exit.json.new", "exit.json")

    def _take_room_for_the_journal(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        file = os.open("exit.json.new", flags, 0o600, dir_fd=self._folder)
        try:
            os.write(file, b" " * JOURNAL_BYTES)
        finally:
            os.close(file)

    def note(self) -> None:
        """Remember what is in it now, before the command."""
        self._traced = self._trace()

    def is_untouched(self) -> bool:
        """Whether nobody changed anything in it since `note`. False also where that is unsure."""
        return self._traced is not None and self._traced == self._trace()

    def move(self, path: str) -> None:
        os.rename(self._host.at(self.path), self._host.at(path))
        self.path = path

    def clear(self) -> None:
        """Make an untouched one a folder no run has been in."""
        for name in ("output", "started"):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._folder)
        with suppress(FileNotFoundError):
            self._rename("exit.json", "exit.json.new")

    def remove(self) -> None:
        """With everything in it; for one whose trace is known to be short."""
        folders.remove(self._host.at(self.path))
        self.close()

    def close(self) -> None:
        os.close(self._folder)

    def _at(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder}/{name}"

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _trace(self) -> object:
        """A value that is the same as long as nobody changed anything; None: cannot be told."""
        found: list[tuple[str, int, int, int, int]] = []
        pending = list(FOLDERS)
        try:
            while pending:
                name = pending.pop()
                state = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                found.append((name, state.st_mode, state.st_uid, state.st_gid, state.st_ctime_ns))
                if stat.S_ISDIR(state.st_mode):
                    pending += [f"{name}/{entry}" for entry in os.listdir(self._at(name))]
                if len(found) + len(pending) > MAX_TRACED:
                    return None
        except OSError:
            return None
        return found


def may_be_held(folder: str) -> bool:
    """Whether somebody may still write to the files of an ended run, going by its journal."""
    try:
        with open(f"{folder}/exit.json", "rb") as file:
            return json.load(file).get("held") is not False
    except (OSError, ValueError, AttributeError):
        return True
