"""The agent's end of a slot helper's socket, and the start of helpers that are missing."""

import asyncio
import errno
import json
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from spellq.ports import WorldError
from spellq_workers import folders

HELPER: Final = Path(__file__).with_name("helper.py")
ANSWER_SECONDS: Final = 30.0
"""A helper that takes longer to answer, other than to `prepare`, counts as silent."""

Message = dict[str, Any]

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(type=Message)


class HelperSilent(ConnectionError):
    """The helper lives and does not answer; what it was asked for it may do later, or never."""


class Link(asyncio.Protocol):
    """One connection. Answers come in the order of the requests; `ended` goes to `on_ended`."""

    def __init__(self) -> None:
        self.on_ended: Callable[[Message | None], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._answers: deque[asyncio.Future[Message]] = deque()
        self._received = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: Message, seconds: float | None = None) -> Message:
        """Send a request and wait for its answer. A cancelled wait leaves the request sent.

        `seconds` is how long to wait, ANSWER_SECONDS by itself; making a world takes as long as
        it takes.

        Raises:
            ConnectionError: the helper is gone, or silent (HelperSilent), and the link closed; it
                may or may not have done what was asked.
        """
        if self._transport is None or not self.is_open:
            raise ConnectionResetError("the slot helper is gone")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Message] = loop.create_future()
        self._answers.append(answer)
        self._transport.write(_encoder.encode(request) + b"\n")
        if request["do"] == "prepare":
            return await answer
        timer = loop.call_later(seconds or ANSWER_SECONDS, self._give_up, answer)
        try:
            return await answer
        finally:
            timer.cancel()

    def tell(self, request: Message) -> None:
        """Send a request and do not wait."""
        if self._transport is not None and self.is_open:
            self._answers.append(asyncio.get_running_loop().create_future())
            self._transport.write(_encoder.encode(request) + b"\n")

    def close(self) -> None:
        """Let go of the helper; whatever runs there goes on."""
        self.on_ended = None
        if self._transport is not None:
            self._transport.close()

    def _give_up(self, answer: "asyncio.Future[Message]") -> None:
        if not answer.done():
            answer.set_exception(HelperSilent("the slot helper does not answer"))
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message = _decoder.decode(line)
            if message["is"] == "ended":
                if self.on_ended is not None:
                    self.on_ended(message)
            else:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_exception(ConnectionResetError("the slot helper is gone"))
                answer.exception()
        if self.on_ended is not None:
            self.on_ended(None)


async def connect(slot: Path) -> Link | None:
    """A link to the slot's helper, or None where none lives."""
    try:
        folder = os.open(slot, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        # Through the folder's descriptor: a socket's own path is limited to 107 bytes.
        path = f"/proc/self/fd/{folder}/socket"
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(Link, path)
    except (FileNotFoundError, ConnectionError):
        return None
    finally:
        os.close(folder)
    return link


def start_helper(slot: Path, cover: Path, visible: list[str]) -> None:
    """Start the slot's helper and return when it listens. Blocks for some ten milliseconds.

    Raises:
        WorldError: its namespaces cannot be made, or its folder.
    """
    log = slot / "helper.log"
    try:
        slot.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_folder(slot / "spare")
        config = {"slot": str(slot), "cover": str(cover), "visible": visible}
        with log.open("wb") as stderr:
            if run_helper(config, stderr.fileno()) == 0:
                return
        error = log.read_text(errors="replace").strip()
    except OSError as fault:
        error = str(fault)
    raise WorldError(f"The slot helper cannot start: {error}. {_remedy(error)}")


def _remedy(error: str) -> str:
    if os.strerror(errno.EAGAIN) in error:
        return (
            "No more processes can be started: end some, or raise the limit (`ulimit -u`, or "
            "pids.max of the control group)."
        )
    return "`spellq doctor` says what this machine lacks."


def remove_folder(folder: Path) -> None:
    """Remove what a run or a helper has left, if it is there; what resists is logged and stays."""
    try:
        folders.remove(str(folder))
    except OSError as error:
        _log.warning("%s cannot be removed: %s", folder, error)


def run_helper(config: Message, stderr: int) -> int:
    """Run the helper's program until its first process ends; returns that one's exit status."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-X", "utf8", str(HELPER), json.dumps(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        check=False,
    ).returncode
