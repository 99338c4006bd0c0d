"""A run's folder on the host, as the slot helper keeps it. Only the standard library.

`files` is what the command makes below /spell, `work` belongs to the overlay, `tmp` and `home` are
the run's own, `output` is what it wrote to stdout and stderr; `started` is there once the command
may have been executed, `exit.json` once it and all it started are dead.

The same few files are used again for the next run where nothing was left in them: file systems
grow slow where thousands are made and removed in a minute.
"""

import json
import os
import stat
from contextlib import suppress
from typing import Any

FOLDERS = {"files": 0o755, "work": 0o700, "tmp": 0o1777, "home": 0o700}
MAX_TRACED = 64

Message = dict[str, Any]


class Host:
    """The host's file system, by a descriptor of its root. Paths are absolute, without links."""

    def __init__(self, root: int) -> None:
        self._root = root

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


class RunFolder:
    """Made new at `path`."""

    def __init__(self, host: Host, path: str) -> None:
        self.path = path
        self._host = host
        os.mkdir(host.at(path), 0o700)
        self._folder = host.open(path)
        for name, mode in FOLDERS.items():
            os.mkdir(self.at(name), mode & 0o755)
            if mode & ~0o755:
                os.chmod(self.at(name), mode)

    def at(self, name: str) -> str:
        """The path by which this process reaches an entry."""
        return f"/proc/self/fd/{self._folder}/{name}"

    def open(self, name: str) -> int:
        return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._folder)

    def open_output(self) -> int:
        """The output, for appending."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open("output", flags, 0o600, dir_fd=self._folder)

    def mark_started(self) -> None:
        os.link("output", "started", src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def write_journal(self, journal: Message) -> None:
        """The journal is there whole, and on disk, or not at all."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open("exit.json.new", flags, 0o600, dir_fd=self._folder)
        try:
            os.write(file, json.dumps(journal).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        self._rename("exit.json.new", "exit.json")

    def trace(self) -> object:
        """A value that is the same as long as nobody changed anything in FOLDERS.

        None: too much is in them to tell cheaply.
        """
        found: list[tuple[str, int, int, int, int]] = []
        pending = list(FOLDERS)
        while pending:
            name = pending.pop()
            state = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
            found.append((name, state.st_mode, state.st_uid, state.st_gid, state.st_ctime_ns))
            if stat.S_ISDIR(state.st_mode):
                pending += [f"{name}/{entry}" for entry in os.listdir(self.at(name))]
            if len(found) + len(pending) > MAX_TRACED:
                return None
        return found

    def move(self, path: str) -> None:
        os.rename(self._host.at(self.path), self._host.at(path))
        self.path = path

    def clear(self) -> None:
        """Make it a folder no run has been in, apart from what FOLDERS hold."""
        with suppress(FileNotFoundError):
            os.truncate(self.at("output"), 0)
            os.unlink("started", dir_fd=self._folder)
            self._rename("exit.json", "exit.json.new")

    def remove(self) -> None:
        """With everything in it; for one whose trace is known to be short."""
        for parent, folders, files in os.walk(self._host.at(self.path), topdown=False):
            for name in files:
                os.unlink(f"{parent}/{name}")
            for name in folders:
                path = f"{parent}/{name}"
                (os.unlink if os.path.islink(path) else os.rmdir)(path)
        os.rmdir(self._host.at(self.path))
        self.close()

    def close(self) -> None:
        os.close(self._folder)

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._folder, dst_dir_fd=self._folder)
