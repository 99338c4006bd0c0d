"""The way to Redis: scripts, gathered into batches, each under the installation's epoch."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from spellq.ports import StoreUnavailable
from spellq_brokers.cluster.keys import Keys

TIMEOUT_SECONDS: Final = 5.0
_CONNECTIONS: Final = 4
_MOST_AT_ONCE: Final = 512
_TRANSIENT: Final = (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
"""Replies of a Redis that cannot serve now. A script is refused at its first write, or never."""
_CANNOT_PERSIST: Final = "MISCONF"

Argument = str | bytes | int | float


class EpochLost(StoreUnavailable):
    """Redis does not hold this installation's state (any more)."""


@dataclass(frozen=True)
class Script:
    """A script and the hash Redis knows it by."""

    source: str
    sha1: str


def script(name: str) -> Script:
    """The script of that name, behind the prelude."""
    folder = resources.files(__package__) / "scripts"
    source = (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True)
class _Call:
    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]
    answer: "asyncio.Future[Any]"

    def words(self, *, whole: bool) -> list[Argument]:
        head = ["EVAL", self.script.source] if whole else ["EVALSHA", self.script.sha1]
        return [*head, len(self.keys), *self.keys, *self.arguments]


class Engine:
    """Calls scripts. While one batch is on its way, the next one gathers.

    A call whose answer is lost may have been carried out: every script can be repeated.
    """

    def __init__(self, redis: "Redis", keys: Keys) -> None:
        self.keys = keys
        self._redis = redis
        self.epoch = ""
        self._waiting: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None

    @classmethod
    def at(cls, url: str, keys: Keys) -> "Engine":
        """Not connected yet.

        Raises:
            ValueError: no URL of a Redis.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            protocol=2,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),  # whoever asks knows best what to repeat
            driver_info=None,  # telling it would read files at each connect
        )
        return cls(Redis.from_pool(pool), keys)

    async def begin(self, epoch: str, key: bytes) -> bytes:
        """Have Redis hold an installation, if it holds none; know its epoch, and return its key.

        `epoch` and `key` are those of one that is made now. Of several who make it at once, or one
        after another that died half-way, the first decides.

        Raises:
            StoreUnavailable: it cannot be reached.
        """
        try:
            if await self._redis.get(self.keys.of_all("epoch")) is None:
                await self._redis.set(self.keys.of_all("key"), key, nx=True)
                await self._redis.set(self.keys.of_all("founded"), epoch, nx=True)
                first = cast(bytes, await self._redis.get(self.keys.of_all("founded")))
                for name in reversed(self.keys.epochs()):
                    await self._redis.set(name, first, nx=True)
            held = cast(bytes, await self._redis.get(self.keys.of_all("epoch")))
            kept = cast(bytes, await self._redis.get(self.keys.of_all("key")))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        self.epoch = held.decode()
        return kept

    async def dangers(self) -> list[str]:
        """By which settings this Redis may lose what it has acknowledged, and what to set instead.

        Raises:
            StoreUnavailable: it cannot be reached.
        """
        try:
            persistence = await self._redis.info("persistence")
            memory = await self._redis.info("memory")
            flushed = await self._configured("appendfsync")
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        found = []
        if not persistence["aof_enabled"]:
            found.append("appendonly is no: set it to yes")
        elif flushed not in (None, "always"):
            found.append(f"appendfsync is {flushed}: set it to always")
        policy = memory["maxmemory_policy"]
        if policy != "noeviction":
            found.append(f"maxmemory-policy is {policy}: set it to noeviction")
        return found

    async def _configured(self, name: str) -> str | None:
        """A setting; None where the server does not let us see it."""
        try:
            settings = await self._redis.config_get(name)
        except ResponseError:
            return None
        return str(settings.get(name))

    async def close(self) -> None:
        """Let go of the connections."""
        if self._sending is not None:
            await asyncio.wait([self._sending])
        await self._redis.aclose()

    async def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Any:
        """What the script returns. Its first key, the epoch, lies with the others.

        Raises:
            StoreUnavailable: Redis is away, or cannot serve now.
        """
        return await self._ask(script, keys, arguments)

    def tell(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> None:
        """Call the script before all that is called from now on, and do not wait for it.

        What comes of it is nobody's concern: it may fail.
        """
        self._ask(script, keys, arguments).add_done_callback(
            lambda answer: None if answer.cancelled() else answer.exception()
        )

    def _ask(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]
    ) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        head = keys[0][: keys[0].index("}") + 1]
        answer: asyncio.Future[Any] = loop.create_future()
        known = [self.epoch, *arguments]
        self._waiting.append(_Call(script, [f"{head}:epoch", *keys], known, answer))
        if self._sending is None:
            self._sending = loop.create_task(self._send())
        return answer

    async def _send(self) -> None:
        try:
            while self._waiting:
                batch = self._waiting[:_MOST_AT_ONCE]
                del self._waiting[:_MOST_AT_ONCE]
                unknown = await self._send_batch(batch, whole=False)
                if unknown:
                    await self._send_batch(unknown, whole=True)
        finally:
            self._sending = None

    async def _send_batch(self, batch: Sequence[_Call], *, whole: bool) -> list[_Call]:
        """Answer the calls; returns those whose script Redis does not know yet."""
        pipeline = self._redis.pipeline(transaction=False)
        for call in batch:
            pipeline.execute_command(*call.words(whole=whole))
        answers: Sequence[Any]
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            answers = [error] * len(batch)
        unknown = []
        for call, answer in zip(batch, answers, strict=True):
            if isinstance(answer, NoScriptError):
                unknown.append(call)
            elif call.answer.done():
                continue
            elif isinstance(answer, Exception):
                call.answer.set_exception(_unavailable(answer))
            else:
                call.answer.set_result(answer)
        return unknown


def _unavailable(error: Exception) -> Exception:
    """What callers are told; an error of a script of ours is a fault, and stays one."""
    words = str(error)
    if words.startswith("EPOCH"):
        return EpochLost(
            "Redis does not hold this installation's state. See: spellq doctor --rebuild"
        )
    transient = isinstance(error, _TRANSIENT) or words.startswith(_CANNOT_PERSIST)
    if isinstance(error, ResponseError) and not transient:
        return error
    return StoreUnavailable(f"Redis cannot be used now: {words or type(error).__name__}")
