"""A cluster of processes, each of which may die."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from anyio import to_thread

from spellq_sdk.daemon import stop_daemon
from tests.cluster.processes import Cluster
from tests.e2e.conftest import Installation
from tests.services import RabbitServer, RedisServer, rabbit_server, redis_server

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    with rabbit_server() as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
async def cluster(
    tmp_path: Path, redis: RedisServer, rabbit: RabbitServer
) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path, redis, rabbit)
    await cluster.start_gateway()
    await cluster.start_agent("one")
    await cluster.start_agent("two")
    yield cluster
    await cluster.close()


async def test_a_workflow_by_the_commands_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "hello.py").write_text((EXAMPLES / "hello.py").read_text())
    told = await to_thread.run_sync(
        lambda: cluster.spellq("workflow", "python hello.py", cwd=project)
    )
    assert told.returncode == 0, told.stderr
    assert "Run 3 read: Hello from another run!" in told.stdout
    assert "Run 1 complete" in told.stdout


async def test_in_an_agents_home_nobody_waits_for_a_daemon(
    cluster: Cluster, tmp_path: Path
) -> None:
    own = Installation(tmp_path / "one")
    told = await to_thread.run_sync(lambda: own.spellq("ps", cwd=tmp_path))
    assert told.returncode == 1
    assert "An agent of a cluster runs in" in told.stderr
    assert "set SPELLQ_URL" in told.stderr
    await cluster.end("one")
    daemon = await to_thread.run_sync(own.start)
    assert daemon.started
    await to_thread.run_sync(stop_daemon, own.home)


async def test_runs_are_spread_over_agents(cluster: Cluster) -> None:
    async with cluster.client() as client:
        command = "echo $SPELL_RUN > n.txt; sleep 1"
        runs = await asyncio.gather(*(client.runs.new(command=command) for _ in range(4)))
        async with asyncio.timeout(20):
            await asyncio.gather(*(run.wait_status(client.runs.RUNNING) for run in runs))
            await asyncio.gather(*(run.wait_status(*client.runs.FINAL) for run in runs))


async def test_a_killed_agent_finds_its_run_again(cluster: Cluster) -> None:
    await cluster.end("two")
    async with cluster.client() as client:
        run = await client.runs.new(command="echo begins; sleep 4; echo ends; exit 7")
        await run.wait_status(client.runs.RUNNING)
        await cluster.end("one")
        await cluster.start_agent("one")
        await run.wait_status(*client.runs.FINAL)
        await run.refresh()
        assert (run.status, run.user_exit_code) == (client.runs.COMPLETE, 7)
        said = [line.log async for line in run.logs()]
        assert said.index("begins") < said.index("ends")


async def test_who_waits_at_a_gateway_that_is_killed_waits_on(cluster: Cluster) -> None:
    async with cluster.client() as client:
        run = await client.runs.new(command="sleep 3; exit 4")
        waiting = asyncio.create_task(run.wait_status(*client.runs.FINAL))
        await run.wait_status(client.runs.RUNNING)
        await cluster.end("gateway")
        await cluster.start_gateway()
        async with asyncio.timeout(30):
            await waiting
        await run.refresh()
        assert run.user_exit_code == 4


async def test_a_redis_that_is_killed_interrupts_nothing(cluster: Cluster) -> None:
    async with cluster.client() as client:
        run = await client.runs.new(command="echo 1; sleep 3; echo 2 > two.txt; exit 5")
        waiting = asyncio.create_task(run.wait_status(*client.runs.FINAL))
        await run.wait_status(client.runs.RUNNING)
        await to_thread.run_sync(cluster.redis.kill)
        await asyncio.sleep(5)
        await to_thread.run_sync(cluster.redis.start)
        async with asyncio.timeout(30):
            await waiting
        await run.refresh()
        assert (run.status, run.user_exit_code) == (client.runs.COMPLETE, 5)


async def test_a_broker_that_is_killed_interrupts_nothing(cluster: Cluster) -> None:
    async with cluster.client() as client:
        run = await client.runs.new(command="echo 1; sleep 8; echo 2 > two.txt; exit 6")
        waiting = asyncio.create_task(run.wait_status(*client.runs.FINAL))
        await run.wait_status(client.runs.RUNNING)
        await asyncio.sleep(6)  # see test_rabbit_bus: as long as a new queue needs
        await to_thread.run_sync(cluster.rabbit.kill)
        await to_thread.run_sync(cluster.rabbit.start)
        async with asyncio.timeout(40):
            await waiting
        await run.refresh()
        assert (run.status, run.user_exit_code) == (client.runs.COMPLETE, 6)
        another = await client.runs.new(command="true")
        async with asyncio.timeout(40):
            await another.wait_status(*client.runs.FINAL)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SPELLQ_AMQP_URL", "", "SPELLQ_AMQP_URL is missing. Set it, for example to amqp://"),
        ("SPELLQ_AMQP_URL", "http://x", "has to begin with amqp:// or amqps://, for example"),
        ("SPELLQ_REDIS_URL", "redis://127.0.0.1:1", "Redis cannot be used now: "),
        ("SPELLQ_REDIS_URL", "redis://:se/cret@host", "SPELLQ_REDIS_URL is no URL of a Redis."),
        ("SPELLQ_ARTIFACTS_URL", "file://shared", "names no folder of this machine"),
        ("SPELLQ_NAMESPACE", "{x}", "Invalid namespace '{x}': use letters, digits"),
    ],
)
@pytest.mark.parametrize("command", ["server", "agent"])
async def test_what_cannot_be_is_one_sentence(
    tmp_path: Path,
    redis: RedisServer,
    rabbit: RabbitServer,
    command: str,
    name: str,
    value: str,
    words: str,
) -> None:
    cluster = Cluster(tmp_path, redis, rabbit)
    told = await to_thread.run_sync(lambda: cluster.refused(command, **{name: value}))
    assert told.startswith("ERROR: ")
    assert words in told
    assert "'se'" not in told  # what urllib takes for a port
    assert told.count("\n") <= 3


async def test_a_redis_that_would_forget_is_refused_unless_it_is_accepted(
    tmp_path: Path, rabbit: RabbitServer
) -> None:
    with redis_server("--appendonly", "no") as redis:
        cluster = Cluster(tmp_path, redis, rabbit)
        told = await to_thread.run_sync(lambda: cluster.refused("server"))
        assert "This Redis may lose runs: appendonly is no: set it to yes." in told
        await cluster.start_gateway(SPELLQ_UNSAFE_REDIS="1")
        await cluster.close()
