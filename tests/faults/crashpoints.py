"""Numbered crash points: a process that dies, as by kill -9, at its n-th durable write or publish.

For the daemon and for the slot helper alike, so only the standard library here. A point lies before
and after each call that is watched, and in the middle of what is written to a log file.
"""

import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn


class CrashPoints:
    """Counts the points this process passes, and ends it at number `at` (from 1).

    The name of that point is appended to the file `report` first; it may be out of sight by then.
    """

    def __init__(self, at: int, report: str) -> None:
        self._at = at
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._report = os.open(report, flags, 0o600)
        self._passed = 0
        self._lock = threading.Lock()

    def reach(self, name: str, last_act: Callable[[], object] | None = None) -> None:
        """This is a point; `last_act` is what still happens if the process dies here."""
        with self._lock:
            self._passed += 1
            if self._passed == self._at:
                if last_act is not None:
                    last_act()
                self._die(name)

    def watch(self, owner: Any, name: str, label: str = "") -> None:
        """Put a point before and one after every call of `owner.name`."""
        original = getattr(owner, name)
        label = label or f"{getattr(owner, '__name__', owner)}.{name}"

        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def watched(*args: Any, **kwargs: Any) -> Any:
                self.reach(f"before {label}")
                result = await original(*args, **kwargs)
                self.reach(f"after {label}")
                return result

        else:

            @functools.wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                self.reach(f"before {label}")
                result = original(*args, **kwargs)
                self.reach(f"after {label}")
                return result

        setattr(owner, name, watched)

    def _die(self, name: str) -> NoReturn:
        os.write(self._report, f"{name}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(137)  # pid 1 of a namespace is not killed by what it sends itself
