"""While a history runs, the real world is out of reach: no file, socket, thread or process."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn
from unittest.mock import patch

from anyio._backends import _asyncio

_FORBIDDEN: Final = (
    "open", "os.", "socket.", "subprocess.", "shutil.", "tempfile.",
)  # fmt: skip
_SOURCES: Final = (".py", ".pyc")

_sealed = False
_installed = False


class Unsealed(BaseException):
    """Something of the real world was reached for."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    is_database = event == "sqlite3.connect" and arguments[0] != ":memory:"
    if not _sealed or not (is_database or event.startswith(_FORBIDDEN)):
        return
    if event in ("open", "os.listdir", "os.scandir") and _is_of_an_import(arguments[0]):
        return
    raise Unsealed(f"{event} {arguments!r}")


def _is_of_an_import(path: object) -> bool:
    return isinstance(path, str) and (path.endswith(_SOURCES) or path in sys.path)


def _number(scope: _asyncio.CancelScope) -> int:
    return hash(scope._host_task)


def _refuse_call(*arguments: object) -> NoReturn:
    raise Unsealed(f"a thread or a pause: {arguments!r}")


@contextmanager
def sealed() -> Iterator[None]:
    """Forbid the real world; order what anyio cancels by its tasks' numbers.

    anyio keeps scopes in sets, whose order would change from one process to the next.
    """
    global _installed, _sealed
    if not _installed:
        sys.addaudithook(_refuse)
        _installed = True
    _sealed = True
    try:
        with (
            patch.object(_asyncio.CancelScope, "__hash__", _number),
            patch.object(threading.Thread, "start", _refuse_call),
            patch.object(time, "sleep", _refuse_call),
        ):
            yield
    finally:
        _sealed = False
