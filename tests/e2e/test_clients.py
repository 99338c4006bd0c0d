"""The blocking client where it is really used: scripts, threads, notebooks."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import spell.api.exceptions
import spell.client
import spellq
from spellq_sdk.daemon import LocalDaemon
from tests.e2e.conftest import Installation


@pytest.fixture
def client(daemon: LocalDaemon) -> spellq.Client:
    return spellq.Client(daemon.url, daemon.token)


def test_a_script_of_spells(daemon: LocalDaemon, tmp_path: Path) -> None:
    client = spell.client.SpellClient(daemon.token, base_url=daemon.url)
    assert client.active_workflow is None
    run = client.runs.new(command="echo $WHO > hello.txt; exit 3", envvars={"WHO": "world"})
    run.wait_status(*client.runs.FINAL)
    run.refresh()
    assert run.status == client.runs.COMPLETE
    assert run.user_exit_code == 3
    assert repr(run).startswith(f"Run(id={run.id}, status='complete', ")
    run.cp("hello.txt", str(tmp_path))
    assert (tmp_path / "hello.txt").read_text() == "world\n"
    with pytest.raises(spell.api.exceptions.WaitError):
        run.wait_status(client.runs.KILLED)
    assert [one.id for one in client.runs.list(1)] == [run.id]


def test_several_threads_share_a_client(client: spellq.Client) -> None:
    def one(n: int) -> int | None:
        run = client.runs.new(command=f"exit {n}")
        run.wait_status(*client.runs.FINAL)
        run.refresh()
        return run.user_exit_code

    with client, ThreadPoolExecutor(10) as threads:
        assert list(threads.map(one, range(10))) == list(range(10))


async def test_it_works_inside_a_running_loop(client: spellq.Client) -> None:
    """As in a notebook, where a loop runs in the very thread."""
    assert asyncio.get_running_loop()

    def cell() -> list[str]:
        run = client.runs.new(command="echo from a cell")
        return [entry.log for entry in run.logs(follow=True) if not entry.status_event]

    with client:
        assert cell()[0] == "from a cell"


def test_the_front_door_of_an_async_script(own: Installation, project: Path) -> None:
    (project / "flow.py").write_text(
        "import asyncio, spellq\n"
        "async def main():\n"
        "    async with spellq.AsyncClient.from_environment() as client:\n"
        "        runs = await asyncio.gather(\n"
        "            *(client.runs.new(command=f'echo {i} > n.txt') for i in range(60)))\n"
        "        await asyncio.gather(*(run.wait_status(*client.runs.FINAL) for run in runs))\n"
        "        await asyncio.gather(*(run.refresh() for run in runs))\n"
        "        print(len({run.id for run in runs if run.user_exit_code == 0}))\n"
        "asyncio.run(main())\n"
    )
    told = own.python("flow.py", project)
    assert (told.stdout, told.stderr) == ("60\n", "")


def test_a_daemon_asked_for_from_python_is_there_for_the_command_line(
    own: Installation, project: Path
) -> None:
    (project / "one.py").write_text(
        "import spell.client\n"
        "client = spell.client.from_environment()\n"
        "print(client.runs.new(command='true').id)\n"
    )
    assert own.python("one.py", project).stdout == "1\n"
    assert own.spellq("info", "1").returncode == 0


async def test_a_forgotten_client_does_not_hold_up_the_loop(daemon: LocalDaemon) -> None:
    """One that is never closed is closed when it is collected, wherever that happens."""
    client = spellq.Client(daemon.url, daemon.token)
    assert client.runs.new(command="true").id
    thread = next(each for each in threading.enumerate() if each.name == "spellq-client")
    del client
    gc.collect()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
