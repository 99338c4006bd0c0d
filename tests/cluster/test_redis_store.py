"""What is Redis's own: several processes at once, a server that dies, one that forgets."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from spellq.clock import SystemClock
from spellq.events import fold
from spellq.lifecycle import Advance, Claim, Kill, Label, Refused
from spellq.ports import NewRun, StoreUnavailable
from spellq.runs import Run, RunSpec, Status
from spellq_brokers.cluster import RedisStore
from spellq_brokers.cluster.engine import Engine, EpochLost
from spellq_brokers.cluster.keys import SHARDS, Keys
from tests.services import RedisServer

CLAIM = Claim(1, "agent", "cpu-0", "claim")


async def new_run(store: RedisStore) -> Run:
    (number,) = await store.allot("run", 1, "it")
    (committed,) = await store.create([NewRun(number, "ada", RunSpec("true"))])
    return committed.run


async def test_a_step_is_made_for_the_run_as_others_left_it(
    store: RedisStore, other: RedisStore
) -> None:
    run = await new_run(store)
    await other.apply(run.id, [CLAIM])
    committed = await store.apply(run.id, [Kill()])
    assert committed.run.status is Status.KILLING
    with pytest.raises(Refused):
        await other.apply(run.id, [Advance(1, Status.RUNNING)])
    assert fold(await other.history(run.id)) == await store.get(run.id) == committed.run


async def test_what_would_be_refused_by_what_was_true_once_is_not(
    store: RedisStore, other: RedisStore
) -> None:
    run = await new_run(store)
    await other.apply(run.id, [CLAIM])
    advanced = await store.apply(run.id, [Advance(1, Status.RUNNING)])
    assert advanced.run.status is Status.RUNNING


async def test_two_processes_that_change_a_run_at_once_lose_nothing(
    store: RedisStore, other: RedisStore
) -> None:
    run = await new_run(store)
    await asyncio.gather(
        *(
            each.apply(run.id, [Label(add=(f"{name}{place}",))])
            for name, each in (("a", store), ("b", other))
            for place in range(20)
        )
    )
    after = await store.get(run.id)
    assert after is not None
    assert len(after.labels) == 40
    assert fold(await store.history(run.id)) == after


async def test_a_server_that_knows_no_script_is_told(store: RedisStore, redis: RedisServer) -> None:
    async with Redis.from_url(redis.url) as client:
        run = await new_run(store)
        await client.script_flush()
        assert (await store.apply(run.id, [CLAIM])).run.status is Status.BUILDING


async def test_a_killed_server_has_everything_when_it_is_back(
    store: RedisStore, redis: RedisServer
) -> None:
    run = await new_run(store)
    claimed = (await store.apply(run.id, [CLAIM])).run
    redis.kill()
    with pytest.raises(StoreUnavailable, match="Redis cannot be used now"):
        await store.get(run.id)
    redis.start()
    assert await store.get(run.id) == claimed
    assert len(await store.unpublished(0)) == 2


async def test_a_server_that_forgot_everything_is_not_believed(
    store: RedisStore, redis: RedisServer
) -> None:
    run = await new_run(store)
    async with Redis.from_url(redis.url) as client:
        await client.flushall()
    for asked in (store.get(run.id), store.apply(run.id, [CLAIM]), store.agents()):
        with pytest.raises(EpochLost, match="spellq doctor --rebuild"):
            await asked


async def test_a_server_without_memory_writes_nothing_by_halves(
    store: RedisStore, redis: RedisServer
) -> None:
    run = await new_run(store)
    async with Redis.from_url(redis.url) as client:
        await client.config_set("maxmemory", "1")
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            await store.apply(run.id, [CLAIM])
        await client.config_set("maxmemory", "0")
    assert await store.get(run.id) == run
    assert (await store.apply(run.id, [CLAIM])).run.version == run.version + 1


async def test_a_server_that_would_forget_is_found_out(redis: RedisServer) -> None:
    engine = Engine.at(redis.url, Keys("spellq"))
    assert await engine.dangers() == []
    async with Redis.from_url(redis.url) as client:
        await client.config_set("appendfsync", "everysec")
        await client.config_set("maxmemory-policy", "allkeys-lru")
        assert await engine.dangers() == [
            "appendfsync is everysec: set it to always",
            "maxmemory-policy is allkeys-lru: set it to noeviction",
        ]
        await client.config_set("appendonly", "no")
        assert (await engine.dangers())[0] == "appendonly is no: set it to yes"
    await engine.close()


async def test_an_installation_that_was_made_by_halves_is_made_whole(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes it dies in between; all shards have one epoch in the end."""
    dying = Engine.at(redis.url, Keys("spellq"))
    really = Redis.set
    written = 0

    async def write(client: "Redis", *arguments: Any, **named: Any) -> Any:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError("it died")
        return await really(client, *arguments, **named)

    monkeypatch.setattr(Redis, "set", write)
    with pytest.raises(StoreUnavailable):
        await dying.begin("first", bytes(32))
    monkeypatch.undo()
    await dying.close()
    engine = Engine.at(redis.url, Keys("spellq"))
    await engine.begin("second", bytes(32))
    store = RedisStore(engine, SystemClock())
    assert await asyncio.gather(*(store.get(number) for number in range(SHARDS))) == [None] * SHARDS
    await store.close()
