"""What runs out: disk space, memory, processes, file descriptors, inotify watches."""

import asyncio
import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spellq.gateway.crowd import REFUSED_AT_ONCE
from spellq_sdk import AsyncClient, ClientException
from spellq_sdk.daemon import LocalDaemon, find_daemon, stop_daemon
from spellq_sdk.runs import Run
from tests.e2e.conftest import SPELLQ, Installation
from tests.e2e.test_restart import Meeting, end
from tests.e2e.test_runs import final, launch
from tests.e2e.test_stops import said, saved

MIB = 1 << 20
DISK_MIB = 96
RESERVE_MIB = 16


class Disk:
    """A small file system of its own, for an installation's home; what fills it is `ballast`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave_bytes: int) -> None:
        """Take all of it but `leave_bytes`."""
        with self._ballast.open("ab") as file:
            while (more := self.free_bytes() - leave_bytes) >= 4096:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(
                        file.fileno(), file.seek(0, os.SEEK_END), more // 4096 * 4096
                    )

    def clear(self) -> None:
        self._ballast.unlink()

    def free_bytes(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    options = f"size={DISK_MIB}m,mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", path], check=True)
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def small(disk: Disk) -> Iterator[Installation]:
    """An installation on the small disk; nothing is started yet."""
    small = Installation(disk.path / "home", ["--machine-types", "cpu=4", "--port", "0"])
    small.home.mkdir(mode=0o700)
    (small.home / "config.toml").write_text(f'min_free_bytes = "{RESERVE_MIB}MiB"\n')
    yield small
    with contextlib.suppress(FileNotFoundError):
        disk.clear()
    stop_daemon(small.home)


@contextlib.asynccontextmanager
async def using(installation: Installation):  # type: ignore[no-untyped-def]
    daemon = await asyncio.to_thread(installation.start)
    async with AsyncClient(daemon.url, daemon.token) as client:
        yield client


async def kill_daemon(installation: Installation) -> None:
    daemon = await asyncio.to_thread(find_daemon, installation.home)
    assert daemon is not None
    await asyncio.to_thread(end, daemon, signal.SIGKILL)


@contextlib.contextmanager
def limited(installation: Installation, kind: str, limits: dict[str, int]) -> Iterator[None]:
    """Start it in a control group of its own, of version 1 or 2; set those limits that exist."""
    groups = Path("/sys/fs/cgroup")
    parent = groups / kind if (groups / kind).is_dir() else groups
    group = parent / f"spellq-test-{os.urandom(4).hex()}"
    group.mkdir()
    try:
        for name, value in limits.items():
            if (group / name).exists():
                (group / name).write_text(str(value))
        (group / "cgroup.procs").write_text(str(installation.start().pid))
        yield
        stop_daemon(installation.home)
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (parent / "cgroup.procs").write_text(pid)
        group.rmdir()


# Disk space


@pytest.mark.root
async def test_without_disk_space_nothing_is_claimed(
    small: Installation, disk: Disk, project: Path
) -> None:
    disk.fill(RESERVE_MIB * MIB // 2)
    async with using(small) as client:
        run = await launch(client, "exit 3")
        stopped = await launch(client, "exit 3")
        assert run.status == "machine_requested"
        lack = rf"disk space: [78](\.\d)? MiB free, 16 MiB wanted on {small.home}\."
        assert re.fullmatch(f"Waiting for {lack}", run.reason)
        told = await asyncio.to_thread(small.spellq, "info", str(run.id))
        assert re.search(f"Waiting for +{lack}", told.stdout)
        told = await asyncio.to_thread(small.spellq, "run", "-b", "exit 3", cwd=project)
        assert re.search(f"✨ Waiting for {lack}", told.stdout)
        assert await stopped.stop()
        await final(client, stopped)
        assert stopped.status == "killed"
        disk.clear()
        await final(client, run)
        assert (run.status, run.user_exit_code, run.reason) == ("complete", 3, "")


@pytest.mark.root
async def test_saving_waits_for_disk_space_over_a_restart(small: Installation, disk: Disk) -> None:
    with Meeting() as meeting:
        async with using(small) as client:
            waiting = "echo x > x; echo y > y; chmod +x y; exit 3"
            runs = [await launch(client, f"{meeting.words}; {waiting}") for _ in range(2)]
            guests = [await asyncio.to_thread(meeting.arrival) for _ in runs]
            disk.fill(RESERVE_MIB * MIB // 2)
            for guest in guests:
                guest.send(b"go on\n")
            kept, killed = runs
            for run in runs:
                await waits_for_space(run)
            queued = await launch(client, "exit 4")
            assert not await kept.stop()
            told = await asyncio.to_thread(small.spellq, "stop", str(kept.id))
            assert (
                told.stdout == f"Run {kept.id} has ended its command and is saving its outputs.\n"
            )
            assert await killed.kill()
            await final(client, killed)
            assert (killed.status, killed.user_exit_code) == ("killed", None)
        await kill_daemon(small)
    async with using(small) as client:
        kept, queued = [await client.runs.get(run.id) for run in (kept, queued)]
        await kept.refresh()
        assert (kept.status, queued.status) == ("saving", "machine_requested")
        disk.clear()
        await final(client, kept, queued)
        assert (kept.status, kept.user_exit_code) == ("complete", 3)
        assert sorted(await saved(client, kept)) == ["x", "y"]
        assert (queued.status, queued.user_exit_code) == ("complete", 4)


@pytest.mark.root
async def test_what_a_run_left_in_its_tmp_makes_room_for_its_outputs(
    small: Installation, disk: Disk
) -> None:
    async with using(small) as client:
        size = disk.free_bytes() - RESERVE_MIB * MIB // 2
        ballast = f"head -c {size} /dev/zero > /tmp/ballast; echo x > x; chmod +x x; exit 3"
        run = await launch(client, ballast)
        await final(client, run)
        assert (run.status, run.user_exit_code) == ("complete", 3)
        assert await saved(client, run) == ["x"]


async def waits_for_space(run: Run) -> None:
    async with contextlib.aclosing(run.logs(follow=True)) as lines:
        async for entry in lines:
            if entry.log.startswith("Waiting for disk space: "):
                return
    raise AssertionError("it did not wait")


@pytest.mark.root
async def test_what_is_sent_leaves_the_reserve_alone(
    small: Installation, disk: Disk, project: Path
) -> None:
    disk.fill((RESERVE_MIB + 8) * MIB)
    (project / "large").write_bytes(os.urandom(20 * MIB))
    async with using(small) as client:
        told = await asyncio.to_thread(small.spellq, "run", "true", cwd=project)
        assert told.returncode == 1
        assert "The disk is full" in told.stderr
        assert "Free some space" in told.stderr
        assert disk.free_bytes() > RESERVE_MIB * MIB
        run = await launch(client, "exit 3")
        await final(client, run)
        assert run.user_exit_code == 3


@pytest.mark.root
async def test_a_full_disk_costs_no_exit_code(small: Installation, disk: Disk) -> None:
    """Not a byte is left for a while: commands end, are stopped, are lost sight of by a crash."""
    with Meeting() as meeting:
        async with using(small) as client:
            command = f"{meeting.words}; echo x > x || exit 8; exit 9"
            runs = [await launch(client, command) for _ in range(3)]
            guests = [await asyncio.to_thread(meeting.arrival) for _ in runs]
            disk.fill(0)
            guests[0].send(b"go on\n")
            assert await asyncio.to_thread(guests[0].recv, 1) == b""
            wanted = await wants(runs[1])
        await kill_daemon(small)
        for guest in guests[1:]:
            with contextlib.suppress(ConnectionError):
                guest.send(b"go on\n")
        told = await asyncio.to_thread(small.spellq, "ps")
        assert told.returncode == 1
        assert re.search(
            r"No space is left where .*/home lies\. Free some|disk is full", told.stderr
        )
        disk.clear()
        async with using(small) as client:
            runs = [await client.runs.get(run.id) for run in runs]
            await final(client, *runs)
            codes = [run.user_exit_code for run in runs]
            assert [run.status for run in runs] == ["complete", wanted, "complete"]
            assert codes[0] == codes[2] == 8
            assert codes[1] in (8, 143)


@pytest.mark.root
def test_a_daemon_that_a_full_disk_keeps_from_starting_says_so(
    small: Installation, disk: Disk
) -> None:
    disk.fill(0)
    told = small.spellq("up")
    assert told.returncode == 1
    assert f"No space is left where {small.home} lies. Free some" in told.stderr
    disk.clear()
    assert small.spellq("up").returncode == 0


async def wants(run: Run) -> str:
    """How a run ends that is stopped on a full disk: it was stored, or refused with a remedy."""
    refused: list[ClientException] = []
    try:
        await run.stop()
    except ClientException as error:
        refused.append(error)
    for each in refused:
        assert each.response is not None
        assert each.response.status_code == 507
        assert "Free some space" in str(each)
    return "complete" if refused else "stopped"


# Memory


@pytest.fixture
def little_memory(own: Installation) -> Iterator[None]:
    """The installation is started, with little memory for its daemon, helpers and commands."""
    with limited(own, "memory", {"memory.limit_in_bytes": 400 * MIB, "memory.max": 400 * MIB}):
        yield


HOG = "python3 -c 'x = bytearray(2 << 30)'"


@pytest.mark.root
@pytest.mark.usefixtures("little_memory")
async def test_a_command_that_the_kernel_kills_for_its_memory_says_so(own: Installation) -> None:
    async with using(own) as client:
        itself = await launch(client, f"echo x > x; exec {HOG}")
        below = await launch(client, f"{HOG}; exit $?")
        await final(client, itself, below)
        for run in (itself, below):
            assert (run.status, run.user_exit_code) == ("complete", 137)
            assert run.cause == "likely_out_of_memory"
            assert "lack of memory" in run.reason
        assert await saved(client, itself) == ["x"]
        told = await asyncio.to_thread(own.spellq, "info", str(below.id))
        assert re.search("Cause +likely_out_of_memory: The kernel killed a process", told.stdout)
    with Meeting() as meeting:
        async with using(own) as client:
            unseen = await launch(client, f"{meeting.words}; {HOG}; exit $?")
            guest = await asyncio.to_thread(meeting.arrival)
        await kill_daemon(own)
        guest.send(b"go on\n")
        assert await asyncio.to_thread(guest.recv, 1) == b""
    async with using(own) as client:
        unseen = await client.runs.get(unseen.id)
        await final(client, unseen)
        assert (unseen.user_exit_code, unseen.cause) == (137, "likely_out_of_memory")
        for command, code in (("kill -9 $$", 137), (f"{HOG}; exit 3", 3)):
            run = await launch(client, command)
            await final(client, run)
            assert (run.status, run.user_exit_code, run.cause) == ("complete", code, None)


SEVERAL = """
import os, time
children = []
for _ in range(16):
    child = os.fork()
    if not child:
        x = bytes(range(256)) * (40 << 12)
        time.sleep(60)
    children.append(child)
_, status = os.wait()
raise SystemExit(128 + os.WTERMSIG(status))
"""


@pytest.mark.root
@pytest.mark.usefixtures("little_memory")
async def test_where_memory_is_short_commands_go_first(own: Installation) -> None:
    """However small its processes are: neither the daemon nor the parent of the command."""
    daemon = await asyncio.to_thread(find_daemon, own.home)
    async with using(own) as client:
        run = await launch(client, f"exec python3 -c '{SEVERAL}'")
        await final(client, run)
        assert (run.status, run.user_exit_code) == ("complete", 137)
        assert run.cause == "likely_out_of_memory"
    assert await asyncio.to_thread(find_daemon, own.home) == daemon


# Processes


@pytest.fixture
def few_processes(own: Installation) -> Iterator[None]:
    """The installation is started, with at most 100 processes and threads in all."""
    with limited(own, "pids", {"pids.max": 100}):
        yield


BOMB = """
import os, time
while True:
    try:
        os.fork()
    except BlockingIOError:
        print("full", flush=True)
        time.sleep(0.1)
"""


@pytest.mark.root
@pytest.mark.usefixtures("few_processes")
@pytest.mark.parametrize("verb", ["stop", "kill"])
async def test_a_fork_bomb_is_ended_like_anything_else(own: Installation, verb: str) -> None:
    async with using(own) as client:
        run = await launch(client, f"echo x > x; exec python3 -c '{BOMB}'", grace_seconds=0)
        await said(run, "full")
        refused = [await launch(client, "exit 3") for _ in range(3)]
        await final(client, *refused)
        assert {each.status for each in refused} == {"failed"}
        assert all("No more processes can be started" in each.reason for each in refused)
        await (run.stop() if verb == "stop" else run.kill())
        await final(client, run)
        if verb == "stop":
            assert (run.status, run.user_exit_code is None) == ("stopped", False)
            assert await saved(client, run) == ["x"]
        else:
            assert run.status == "killed"
        after = [await launch(client, "exit 3") for _ in range(4)]
        await final(client, *after)
        assert {run.user_exit_code for run in after} == {3}


# File descriptors


def start_with_descriptors(installation: Installation, limits: str) -> LocalDaemon:
    """`limits` is SOFT:HARD."""
    up = ["prlimit", f"--nofile={limits}", str(SPELLQ), "up", *installation.arguments]
    subprocess.run(up, env=installation.environment(), check=True, capture_output=True)
    daemon = find_daemon(installation.home)
    assert daemon is not None
    return daemon


def test_the_daemon_takes_all_descriptors_it_may_have(own: Installation) -> None:
    daemon = start_with_descriptors(own, "256:4096")
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (4096, 4096)


async def test_too_many_clients_are_told_so_and_runs_go_on(own: Installation) -> None:
    own.arguments = ["--machine-types", "cpu=4", "--port", "0"]
    daemon = await asyncio.to_thread(start_with_descriptors, own, "300:300")
    with Meeting() as meeting:
        async with (
            AsyncClient(daemon.url, daemon.token) as client,
            contextlib.AsyncExitStack() as open_,
        ):
            run = await launch(client, f"{meeting.words}; echo x > x; exit 3")
            guest = await asyncio.to_thread(meeting.arrival)
            path = f"/api/runs/{run.id}/logs?follow=true"
            followers, answers = [], []
            for _ in range(400):
                followers.append(await get(open_, daemon, path))
                answers.append(await followers[-1].readline())
            assert set(answers) == {b"HTTP/1.1 200 OK\r\n", SERVICE_UNAVAILABLE}
            assert answers.count(SERVICE_UNAVAILABLE) > 100
            refused = followers[answers.index(SERVICE_UNAVAILABLE)]
            assert b"ulimit -Hn" in await refused.read()
            guest.send(b"go on\n")
            served = followers[answers.index(b"HTTP/1.1 200 OK\r\n")]
            assert b"Run 1 complete" in await served.read()
        async with AsyncClient(daemon.url, daemon.token) as client:
            again = await launch(client, "exit 4")
            await final(client, again)
            run = await client.runs.get(run.id)
            assert (run.status, run.user_exit_code) == ("complete", 3)
            assert (again.status, again.user_exit_code) == ("complete", 4)
            assert await saved(client, run) == ["x"]
    assert (await asyncio.to_thread(find_daemon, own.home)) == daemon


async def test_those_who_say_nothing_take_no_descriptors_either(own: Installation) -> None:
    daemon = await asyncio.to_thread(start_with_descriptors, own, "300:300")
    async with contextlib.AsyncExitStack() as open_:
        silent = []
        for _ in range(400):
            silent.append(await asyncio.open_connection("127.0.0.1", port_of(daemon)))
            open_.callback(silent[-1][1].close)
        answers = []
        for reader, writer in silent:
            writer.write(b"GET /api/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                answers.append(await reader.readline())
        assert answers.count(SERVICE_UNAVAILABLE) <= 2 * REFUSED_AT_ONCE


SERVICE_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\n"


def port_of(daemon: LocalDaemon) -> int:
    return int(daemon.url.rpartition(":")[2])


async def get(
    stack: contextlib.AsyncExitStack, daemon: LocalDaemon, path: str
) -> asyncio.StreamReader:
    """Ask on a connection of its own, and leave the answer to be read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(daemon))
    stack.callback(writer.close)
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.token}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode())
    return reader
