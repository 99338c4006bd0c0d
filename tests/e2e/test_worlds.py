"""Commands in real worlds: what they see, what they cannot do, and how their ends are told.

Where none can be made, `test_worlds_can_be_made_here` says what is missing.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from spellq.ports import ExecutionLost, WorldError
from spellq.trees import TreeEntry, make_tree
from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers import link
from spellq_workers.outputs import is_untouched, scan
from spellq_workers.process import ProcessExecution
from spellq_workers.worldcheck import WorldReport, check_world
from tests.e2e.conftest import WORKERS
from tests.e2e.machine import ENVIRONMENT, Machine, hear, saved_contents

Faulty = Callable[[str, str], None]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """Gives helpers a fault: the function of that name, in that module, fails once or always."""

    def fault(function: str, how_often: str) -> None:
        happened = tmp_path / f"{function} failed"
        program = tmp_path / "faulty_helper.py"
        program.write_text(
            f"""if True:
            import os, sys
            sys.path.append({WORKERS!r})
            from spellq_workers import helper, runfolder, world
            *owners, name = {function!r}.split(".")
            owner = {{"helper": helper, "runfolder": runfolder, "world": world}}[owners[0]]
            for each in owners[1:]:
                owner = getattr(owner, each)
            real = getattr(owner, name)
            def faulty(*args):
                host = "/proc/self/fd/" + str(root)
                if {how_often!r} == "always" or not os.path.exists(host + {str(happened)!r}):
                    os.close(os.open(host + {str(happened)!r}, os.O_CREAT | os.O_WRONLY))
                    raise OSError(28, name + ": No space left on device")
                return real(*args)
            root = os.open("/", os.O_PATH)
            setattr(owner, name, faulty)
            helper.main()
            """
        )
        monkeypatch.setattr(link, "HELPER", program)

    return fault


def test_worlds_can_be_made_here() -> None:
    assert check_world() == WorldReport()


@pytest.fixture
def without_setpcap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers that lack the capability to give up capabilities, as in some containers."""
    program = tmp_path / "weak_helper.py"
    program.write_text(
        f"""if True:
        import ctypes, sys
        sys.path.append({WORKERS!r})
        from spellq_workers import helper
        really = helper.enter_namespaces
        def enter_namespaces():
            really()
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            held = (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None)
            libc.capget(header, held)
            held[0] &= ~(1 << 8)  # CAP_SETPCAP, of the effective ones
            held[1] &= ~(1 << 8)
            libc.capset(header, held)
        helper.enter_namespaces = enter_namespaces
        helper.main()
        """
    )
    monkeypatch.setattr(link, "HELPER", program)


@pytest.mark.usefixtures("without_setpcap")
def test_what_keeps_a_world_from_being_made_has_a_remedy() -> None:
    problem = check_world().problem
    assert "giving up capabilities (securebits): Operation not permitted" in problem
    assert "add the capability SETPCAP" in problem


# What a command sees


async def test_a_command_starts_in_its_code_with_its_environment(
    machine: Machine, code: Path
) -> None:
    end, output = await machine.run(
        "pwd; cat train.py; echo; env | sort", code=code, cwd="src", environment={"GREETING": "a b"}
    )
    assert end.code == 0
    assert output.startswith("/spell/src\noriginal\n")
    assert "GREETING=a b\n" in output
    assert set(ENVIRONMENT) <= {line.partition("=")[0] for line in output.splitlines()}


async def test_two_worlds_see_their_own_files_under_one_path(
    machine: Machine, tmp_path: Path
) -> None:
    executions = []
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        command = "mkfifo gate; echo ready; read < gate; cat /data/file"
        mounts = {"/data": tmp_path / name}
        executions.append(await machine.start(command, slot=name, mounts=mounts))
    for execution in executions:
        await hear(execution, "ready")
    for execution in executions:
        await anyio.to_thread.run_sync((execution.files / "gate").write_text, "\n")
    for execution, name in zip(executions, ("left", "right"), strict=True):
        assert (await execution.ended()).code == 0
        assert execution.output.read_text() == f"ready\n{name}"
        await execution.discard()


async def test_the_home_of_spellq_is_hidden(folder_outside_tmp: Path) -> None:
    home = folder_outside_tmp / "home"
    home.mkdir()
    (home / "token").write_text("secret")
    (folder_outside_tmp / "beside").write_text("seen")
    machine = Machine(home)
    try:
        _, output = await machine.run(
            f"cat {folder_outside_tmp}/beside; ls -A {home} /.host; cat {home}/token"
        )
    finally:
        await machine.close()
    assert output.startswith("seen")
    assert "agent" not in output
    assert "etc" not in output
    assert "secret" not in output


async def test_home_is_the_runs_own_folder_whatever_its_variable_says(machine: Machine) -> None:
    own = ENVIRONMENT["HOME"]
    for value in ("/proc/self/fd/7/x", "/dev/shm/x", "/spell", "//", "nonsense"):
        command = f'echo "$HOME"; touch {own}/x && ls -A {own}'
        end, output = await machine.run(command, environment={"HOME": value})
        assert end.code == 0
        assert output.startswith(value + "\n")
        assert "x" in output.split()


async def test_only_harmless_devices_are_there(machine: Machine) -> None:
    _, output = await machine.run(
        "find /dev -type b; ls /dev; echo x > /dev/null; head -c 1 /dev/zero | wc -c; "
        "python3 -c 'import os; os.openpty()' && echo terminal",
        environment={"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"},
    )
    there = set(output.split())
    assert {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm"} <= there
    assert {"fd", "stdin", "stdout", "stderr", "1", "terminal"} <= there
    assert not {"loop-control", "kmsg", "console", "tty1", "mem"} & there
    assert "/dev/" not in output


async def test_the_interpreter_and_its_packages_are_there(machine: Machine) -> None:
    end, output = await machine.run(f"{sys.executable} -c 'import spellq; print(\"fine\")'")
    assert (end.code, output) == (0, "fine\n")


async def test_names_are_resolved_as_on_the_host(machine: Machine) -> None:
    """Its file is a link into /run, where most hosts have it made; of /run little is there."""
    see = "cat /etc/resolv.conf"
    there = await anyio.run_process(["sh", "-c", see], check=False, stderr=subprocess.STDOUT)
    _, output = await machine.run(f"{see}; touch /run/x")
    assert output.startswith(there.stdout.decode())
    assert output.endswith("touch: cannot touch '/run/x': Read-only file system\n")


@pytest.mark.parametrize("place", ["/spell", "/tmp", "~", "/dev/shm"])
async def test_what_one_run_writes_the_next_does_not_see(machine: Machine, place: str) -> None:
    end, _ = await machine.run(f"echo x > {place}/left && mkdir {place}/folder")
    assert end.code == 0
    _, output = await machine.run(f"ls -A {place}")
    assert not {"left", "folder"} & set(output.split())


async def test_changed_modes_do_not_reach_the_next_run(machine: Machine) -> None:
    await machine.run("chmod 700 /tmp; chmod 711 /spell ~")
    _, output = await machine.run("stat -c %a /tmp /spell ~")
    assert output.split() == ["1777", "755", "700"]


async def test_shared_memory_of_a_run_is_gone_with_it(machine: Machine) -> None:
    await machine.run("ipcmk -M 100 -M 100")
    _, output = await machine.run("tail -n +2 /proc/sysvipc/shm")
    assert output == ""


# What a command cannot do


@pytest.mark.parametrize(
    "attempt",
    ["/usr/x", "/etc/hostname", "/mnt/data/new", "/new", "/dev/x", "/proc/sys/kernel/core_pattern"],
)
async def test_the_host_and_mounts_are_read_only(
    machine: Machine, tmp_path: Path, attempt: str
) -> None:
    (tmp_path / "data").mkdir()
    end, output = await machine.run(f"touch {attempt}", mounts={"/mnt/data": tmp_path / "data"})
    assert end.code == 1
    others = os.geteuid() != 0 and attempt.startswith(("/etc/", "/proc/"))
    assert ("Permission denied" if others else "Read-only file system") in output
    assert list((tmp_path / "data").iterdir()) == []


async def test_what_is_the_users_own_on_the_host_is_read_only_too(
    machine: Machine, folder_outside_tmp: Path
) -> None:
    (folder_outside_tmp / "own").write_text("mine")
    end, output = await machine.run(
        f"cat {folder_outside_tmp}/own; echo > {folder_outside_tmp}/own"
    )
    assert end.code == 1
    assert output.startswith("mine")
    assert "Read-only file system" in output


async def test_a_command_has_no_capability_and_cannot_unmount(machine: Machine) -> None:
    _, output = await machine.run("grep -E '^(Uid|CapEff|CapPrm|NoNewPrivs)' /proc/self/status")
    fields = dict(line.split(":\t", 1) for line in output.splitlines())
    assert fields["Uid"].startswith(f"{os.getuid()}\t")
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    for target in ("/spell", "/tmp", "/.host"):
        end, _ = await machine.run(f"umount -l {target}")
        assert end.code != 0


@pytest.mark.usefixtures("without_setpcap")
async def test_without_giving_up_capabilities_nothing_is_executed(machine: Machine) -> None:
    for _ in range(2):
        with pytest.raises(WorldError, match="giving up capabilities"):
            await machine.run("true")


async def test_after_a_failure_to_give_up_capabilities_none_is_left(
    machine: Machine, faulty: Faulty
) -> None:
    faulty("helper.give_up_privileges", "once")
    _, output = await machine.run("grep CapEff /proc/self/status")
    assert int(output.split()[1], 16) == 0


@pytest.mark.parametrize("secret", ["environ", "root/etc", "fd/3", "fd/4/", "cwd/etc", "maps"])
async def test_a_command_cannot_look_into_the_helper(machine: Machine, secret: str) -> None:
    end, _ = await machine.run(f"cat /proc/1/{secret} || ls /proc/1/{secret}")
    assert end.code != 0


async def test_a_command_does_not_inherit_the_helpers_files(machine: Machine) -> None:
    _, output = await machine.run("for f in /proc/$$/fd/*; do readlink $f; done | sort -u")
    null, pipe = output.splitlines()
    assert null == "/dev/null"
    assert pipe.startswith("pipe:")


# Mounts


async def test_a_mount_may_be_where_the_host_has_nothing(machine: Machine, tmp_path: Path) -> None:
    source = tmp_path / "model.bin"
    source.write_text("weights")
    targets = ("/mnt/deep/er/model.bin", "/fresh/model.bin", "/model.bin", "/tmp/a/m", "/spell/b/m")
    _, output = await machine.run(
        f"cat {' '.join(targets)}; test -d /usr/bin && ls /mnt",
        mounts=dict.fromkeys(targets, source),
    )
    assert output.startswith("weights" * len(targets))
    assert set(os.listdir("/mnt")) | {"deep"} == set(output[35:].split())
    _, output = await machine.run("ls -d /mnt/deep /fresh /model.bin 2>/dev/null")
    assert output == ""


async def test_mounts_may_lie_in_mounts(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    mounts = {"/data/inner/b": tmp_path / "b", "/data": tmp_path / "outer"}
    _, output = await machine.run("cat /data/a /data/inner/b", mounts=mounts)
    assert output == "ab"


async def test_a_mount_over_a_file_of_another_kind_is_refused(
    machine: Machine, tmp_path: Path
) -> None:
    with pytest.raises(WorldError, match=r"a folder at /etc/passwd: there is a file") as refused:
        await machine.prepare("true", mounts={"/etc/passwd": tmp_path})
    assert refused.value.mount
    assert (await machine.run("true"))[0].code == 0


async def test_a_mount_of_nothing_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="No such file") as refused:
        await machine.prepare("true", mounts={"/data": tmp_path / "nowhere"})
    assert refused.value.mount


async def test_a_mount_in_a_crowded_folder_is_refused(machine: Machine, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as crowded:  # the host's /tmp is not there
        for number in range(4097):
            os.mkfifo(f"{crowded}/{number}")
        with pytest.raises(WorldError, match="4097 entries"):
            await machine.prepare("true", mounts={f"{crowded}/new": tmp_path})


@pytest.mark.parametrize(
    "target", ["/dev/data", "/dev/shm/x", "/proc/x", "/sys/x", "/.host/x", "/spell", "/tmp/../"]
)
async def test_a_mount_where_the_worlds_own_is_is_refused(
    machine: Machine, tmp_path: Path, target: str
) -> None:
    with pytest.raises(WorldError, match="belongs to the world itself") as refused:
        await machine.prepare("true", mounts={target: tmp_path})
    assert refused.value.mount
    assert (await machine.run("true"))[0].code == 0


@pytest.mark.parametrize("link", ["p/l", "out"])
async def test_a_mount_through_a_link_that_leads_out_of_the_code_is_refused(
    machine: Machine, code: Path, folder_outside_tmp: Path, link: str
) -> None:
    (code / "p").mkdir()
    (code / "p" / "d").symlink_to("..")
    (code / "p" / "l").symlink_to("d/../proc/self/fd/7")  # "inside", by its text
    (code / "out").symlink_to(folder_outside_tmp)
    for deep in (f"{folder_outside_tmp}/x", "x"):
        with pytest.raises(WorldError, match="a link leads elsewhere"):
            await machine.prepare("true", code=code, mounts={f"/spell/{link}/{deep}": code})
    assert os.listdir(folder_outside_tmp) == []


@pytest.mark.parametrize("target", ["/", "/etc", "/proc/self/fd/7", "/.host"])
async def test_a_command_cannot_start_outside_of_its_code(
    machine: Machine, code: Path, target: str
) -> None:
    (code / "link").symlink_to(target)
    with pytest.raises(WorldError, match=r"leads out of /spell|does not exist"):
        await machine.prepare("true", code=code, cwd="link")


# Outputs


async def test_a_mount_through_a_link_of_the_code_is_no_output(
    machine: Machine, code: Path, tmp_path: Path
) -> None:
    (code / "in").symlink_to("src")
    (tmp_path / "model.bin").write_text("weights")
    snapshot = make_tree(
        [
            TreeEntry(path="src/train.py", size=8, sha256="0" * 64),
            TreeEntry(path="in", link="src"),
        ]
    )
    target = "/spell/in/model.bin"
    execution = await machine.start(
        "cat in/model.bin; touch src/made", code=code, mounts={target: tmp_path / "model.bin"}
    )
    await execution.ended()
    assert execution.output.read_text() == "weights"
    found = await scan(execution.files, snapshot, [target])
    assert [file.path for file in found.files] == ["src/made"]


DEEP: Final = """
import os
for _ in range({depth}):
    os.mkdir({name!r})
    os.chdir({name!r})
open("file", "w").close()
"""


@pytest.mark.parametrize(("depth", "name"), [(2000, "d"), (20, "d" * 250)])
async def test_no_folder_is_too_deep(
    machine: Machine, tmp_path: Path, depth: int, name: str
) -> None:
    (tmp_path / "deep.py").write_text(DEEP.format(depth=depth, name=name))
    mounts = {"/mnt/deep.py": tmp_path / "deep.py"}
    execution = await machine.start(
        f"touch made; {sys.executable} /mnt/deep.py; cd /tmp; {sys.executable} /mnt/deep.py",
        mounts=mounts,
    )
    assert (await execution.ended()).code == 0
    found = await scan(execution.files, None, ())
    assert [file.path for file in found.files] == ["made"]
    assert len(found.notes) == 1
    [adopted] = await machine.restart().adopt()
    await adopted.execution.discard()
    assert (await machine.run("echo fine"))[1] == "fine\n"
    await machine.executor.close()
    assert not list((machine.home / "agent" / "slots" / "cpu-0").glob("*-*"))


async def test_outputs_are_what_is_new_or_changed_and_never_a_mount(
    machine: Machine, code: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input").write_text("input")
    target = "/spell/in/data"
    execution = await machine.start(
        "echo new > model; echo more >> src/train.py; rm unused.txt; cat in/data/input",
        code=code,
        mounts={target: tmp_path / "data"},
    )
    assert (await execution.ended()).code == 0
    found = await scan(execution.files, None, [target])
    assert [file.path for file in found.files] == ["model", "src/train.py"]
    assert (execution.files / "src/train.py").read_text() == "originalmore\n"
    await execution.discard()
    assert (code / "src" / "train.py").read_text() == "original"
    assert (code / "unused.txt").exists()


CLOSED: Final = ["d/f", "g", "r/only/read", "src/new"]


async def test_what_a_command_closed_is_saved_and_removed_all_the_same(
    machine: Machine, code: Path, artifacts: DiskArtifacts
) -> None:
    """Closed even to its own user, who may be an ordinary one."""
    execution = await machine.start(
        "mkdir -p d r/only; for f in d/f g r/only/read src/new; do printf $f > $f; done; "
        "rm src/train.py; chmod 0 d/f d g /tmp src; chmod 400 r/only r; mkdir ~/x; touch ~/x/y; "
        "chmod 555 ~/x; chmod 0 /spell ~",
        code=code,
    )
    assert (await execution.ended()).code == 0
    assert not is_untouched(execution.files)
    saved = await saved_contents(execution, artifacts)
    assert {path: content for path, (content, _) in saved.items()} == {
        path: path.encode() for path in CLOSED
    }
    await execution.discard()
    await machine.executor.close()
    assert not list((machine.home / "agent" / "slots" / "cpu-0").glob("*-*"))


# Ends


@pytest.mark.parametrize(
    ("command", "code", "ended_by"),
    [("exit 66", 66, None), ("kill -TERM $$", 143, 15), ("sh -c 'kill -9 $$'; exit $?", 137, None)],
)
async def test_the_exit_code_is_the_shells(
    machine: Machine, command: str, code: int, ended_by: int | None
) -> None:
    end, _ = await machine.run(command)
    assert (end.code, end.signal) == (code, ended_by)
    assert end.started_at <= end.ended_at


async def test_output_and_errors_go_to_one_file_in_order(machine: Machine) -> None:
    _, output = await machine.run("echo one; echo two >&2; echo three; cat")
    assert output == "one\ntwo\nthree\n"


async def test_stop_lets_the_command_clean_up(machine: Machine) -> None:
    execution = await machine.start("trap 'echo bye; exit 3' TERM; echo up; sleep 99 & wait")
    await hear(execution, "up")
    await execution.stop(30)
    assert (await execution.ended()).code == 3
    assert execution.output.read_text() == "up\nbye\n"


async def test_a_command_that_ignores_stop_is_killed_after_the_grace(machine: Machine) -> None:
    execution = await machine.start("trap '' TERM; echo up; while :; do sleep 99; done")
    await hear(execution, "up")
    await execution.stop(0.05)
    end = await execution.ended()
    assert (end.code, end.signal) == (137, signal.SIGKILL)


async def test_no_descendant_outlives_its_command(machine: Machine) -> None:
    """A detached process holds a lock; once the end is told, the lock is free."""
    execution = await machine.start(
        "mkfifo gate; (setsid sh -c 'flock 9; echo locked; sleep 99' &) 9> lock; read < gate"
    )
    await hear(execution, "locked")
    with (execution.files / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await anyio.to_thread.run_sync((execution.files / "gate").write_text, "\n")
        assert (await execution.ended()).code == 0
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_kill_ends_everything_at_once(machine: Machine) -> None:
    execution = await machine.start("trap '' TERM; echo up; sleep 99")
    await hear(execution, "up")
    await execution.kill()
    assert (await execution.ended()).code == 137


async def test_a_command_started_twice_is_executed_once(machine: Machine) -> None:
    execution = await machine.start("echo once")
    await execution.start()
    await execution.ended()
    await execution.start()
    assert execution.output.read_text() == "once\n"


async def test_nothing_is_executed_before_start(machine: Machine) -> None:
    execution = await machine.prepare("echo now")
    assert not execution.output.exists()
    await execution.discard()
    assert not execution.folder.exists()


ORDERS: Final = [("stop", 143, signal.SIGTERM), ("kill", 137, signal.SIGKILL)]


@pytest.mark.parametrize(("order", "code", "ended_by"), ORDERS)
@pytest.mark.parametrize("adopted", [False, True])
async def test_what_is_stopped_before_its_start_is_never_executed(
    machine: Machine, order: str, code: int, ended_by: int, adopted: bool
) -> None:
    execution = await machine.prepare("echo executed")
    await (execution.stop(30) if order == "stop" else execution.kill())
    if adopted:
        [found] = await machine.restart().adopt()
        assert not found.started
        assert found.held
        execution = _ours(found.execution)
    with anyio.fail_after(5):
        await execution.start()
        end = await execution.ended()
    assert (end.code, end.signal) == (code, ended_by)
    assert execution.output.read_text() == ""
    [found] = await machine.restart().adopt()
    assert (await found.execution.ended()).code == code
    await found.execution.discard()
    assert (await machine.run("echo next"))[1] == "next\n"


async def test_killed_counts_for_more_than_stopped(machine: Machine) -> None:
    execution = await machine.prepare("echo executed")
    await execution.kill()
    await execution.stop(30)
    await execution.start()
    assert (await execution.ended()).code == 137


def _ours(execution: object) -> ProcessExecution:
    assert isinstance(execution, ProcessExecution)
    return execution


@pytest.mark.parametrize("step", ["open_output", "mark_started"])
async def test_a_full_disk_keeps_a_command_from_starting(
    machine: Machine, faulty: Faulty, step: str
) -> None:
    faulty(f"runfolder.RunFolder.{step}", "once")
    execution = await machine.prepare("echo executed")
    with pytest.raises(WorldError, match="No space left"):
        await execution.start()
    await execution.start()
    assert (await execution.ended()).code == 0


async def test_a_missing_folder_is_refused_by_name(machine: Machine, code: Path) -> None:
    with pytest.raises(WorldError, match=r"/spell/nowhere does not exist") as refused:
        await machine.prepare("true", code=code, cwd="nowhere")
    assert not refused.value.mount


async def test_a_command_too_long_to_be_executed_says_so(machine: Machine) -> None:
    end, output = await machine.run("true " + "x" * 200_000)
    assert end.code == 126
    assert "Argument list too long" in output


# The agent's death


async def test_a_running_command_is_found_again(machine: Machine) -> None:
    execution = await machine.start("mkfifo gate; echo up; read < gate; exit 7")
    await hear(execution, "up")
    [adopted] = await machine.restart().adopt()
    assert adopted.started
    assert (adopted.execution.run, adopted.execution.slot) == (1, "cpu-0")
    await anyio.to_thread.run_sync((execution.files / "gate").write_text, "\n")
    assert (await adopted.execution.ended()).code == 7
    await adopted.execution.discard()
    assert await machine.restart().adopt() == []


async def test_an_end_nobody_heard_is_told_to_the_next_agent(machine: Machine) -> None:
    execution = await machine.start("exit 7")
    await execution.ended()
    [adopted] = await machine.restart().adopt()
    assert adopted.started
    assert (await adopted.execution.ended()).code == 7


async def test_the_journal_tells_the_end_when_the_helper_is_gone(machine: Machine) -> None:
    execution = await machine.start("exit 7")
    await execution.ended()
    await machine.executor.close()
    await _helper_is_gone(machine)
    [adopted] = await machine.restart().adopt()
    assert adopted.started
    assert (await adopted.execution.ended()).code == 7
    await adopted.execution.discard()
    assert not execution.folder.exists()


async def test_a_prepared_world_is_found_unstarted(machine: Machine) -> None:
    await machine.prepare("exit 7")
    [adopted] = await machine.restart().adopt()
    assert not adopted.started
    await adopted.execution.start()
    assert (await adopted.execution.ended()).code == 7


async def test_a_command_whose_helper_was_killed_is_lost(machine: Machine) -> None:
    execution = await machine.start("echo up; sleep 99")
    await hear(execution, "up")
    os.kill(_helper(machine), signal.SIGKILL)
    with pytest.raises(ExecutionLost):
        await execution.ended()
    [adopted] = await machine.restart().adopt()
    assert adopted.started
    with pytest.raises(ExecutionLost):
        await adopted.execution.ended()
    await adopted.execution.discard()
    assert (await machine.run("exit 7"))[0].code == 7


async def test_a_prepared_world_whose_helper_is_gone_is_not_held(machine: Machine) -> None:
    execution = await machine.prepare("exit 7")
    os.kill(_helper(machine), signal.SIGKILL)
    await _helper_is_gone(machine)
    [adopted] = await machine.restart().adopt()
    assert not adopted.started
    assert not adopted.held
    with pytest.raises(ExecutionLost):
        await adopted.execution.start()
    await adopted.execution.discard()
    assert not execution.folder.exists()


@pytest.mark.parametrize("step", ["enter_mounts", "unmount"])
async def test_a_world_that_cannot_be_taken_down_is_replaced(
    machine: Machine, faulty: Faulty, step: str
) -> None:
    faulty(f"world.{step}", "once")
    for text in ("one", "two", "three"):
        assert (await machine.run(f"echo {text} | tee file"))[1] == f"{text}\n"


async def test_a_mount_point_removed_on_the_host_harms_no_later_run(
    machine: Machine, folder_outside_tmp: Path, tmp_path: Path
) -> None:
    point = folder_outside_tmp / "point"
    point.mkdir()
    execution = await machine.start("echo up; sleep 99", mounts={str(point): tmp_path})
    await hear(execution, "up")
    point.rmdir()
    await execution.kill()
    await execution.ended()
    await execution.discard()
    for _ in range(3):
        assert (await machine.run("true"))[0].code == 0


async def test_a_helper_that_does_not_answer_loses_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ANSWER_SECONDS", 0.2)
    execution = await machine.start("echo up; sleep 99")
    await hear(execution, "up")
    helper = _helper(machine)
    os.kill(helper, signal.SIGSTOP)
    try:
        with anyio.fail_after(5):
            await execution.kill()
            [adopted] = await machine.restart().adopt()
            await machine.executor.close()
        assert adopted.held
        assert adopted.started
        with anyio.move_on_after(0.5) as waiting:
            await execution.ended()
        assert waiting.cancelled_caught
    finally:
        os.kill(helper, signal.SIGCONT)
    with anyio.fail_after(5):
        assert (await execution.ended()).code == 137


async def test_two_helpers_never_start_at_once_in_a_slot(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = threading.Lock()
    really = link.run_helper

    def run_helper(config: dict[str, Any], stderr: int) -> link.Started:
        assert starting.acquire(blocking=False)
        try:
            time.sleep(0.1)
            return really(config, stderr)
        finally:
            starting.release()

    monkeypatch.setattr(link, "run_helper", run_helper)
    with anyio.move_on_after(0.02) as given_up:
        await machine.prepare("true")
    assert given_up.cancelled_caught
    assert (await machine.run("exit 7"))[0].code == 7


async def test_ends_are_noted_for_a_day_and_a_failure_stops_nobody(machine: Machine) -> None:
    journals = machine.home / "agent" / "journals"
    journals.mkdir(parents=True)
    (journals / "2020-01-01T00.jsonl").write_text("{}\n")
    os.utime(journals / "2020-01-01T00.jsonl", (0, 0))
    await machine.run("exit 7")
    [journal] = journals.iterdir()
    assert '"code":7' in journal.read_text()
    machine.restart()
    shutil.rmtree(journals)
    journals.write_text("in the way")
    assert (await machine.run("exit 7"))[0].code == 7
    journals.unlink()


async def test_what_cannot_be_removed_or_read_keeps_no_agent_from_starting(
    machine: Machine,
) -> None:
    execution = await machine.start("exit 7")
    await execution.ended()
    await machine.executor.close()
    await _helper_is_gone(machine)
    (execution.folder / "exit.json").write_text("half a")
    (execution.folder.parent / "discarded-9-1").write_text("a file")
    (execution.folder.parent / "spare").symlink_to("/nowhere")
    [adopted] = await machine.restart().adopt()
    with pytest.raises(ExecutionLost):
        await adopted.execution.ended()
    await adopted.execution.discard()
    assert (await machine.run("true"))[0].code == 0


async def test_a_cancelled_wait_loses_nothing(machine: Machine) -> None:
    execution = await machine.start("mkfifo gate; echo up; read < gate; exit 7")
    await hear(execution, "up")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await execution.ended()
    await anyio.to_thread.run_sync((execution.files / "gate").write_text, "\n")
    assert (await execution.ended()).code == 7


async def test_closing_ends_idle_helpers(machine: Machine) -> None:
    await machine.run("true")
    await machine.executor.close()
    await _helper_is_gone(machine)


def _helper(machine: Machine, slot: str = "cpu-0") -> int:
    return int((machine.home / "agent" / "slots" / slot / "helper.pid").read_text())


async def _helper_is_gone(machine: Machine, slot: str = "cpu-0") -> None:
    """Wait for the end of a process that is nobody's child here."""
    try:
        helper = os.pidfd_open(_helper(machine, slot))
    except ProcessLookupError:
        return
    try:
        await anyio.wait_readable(helper)
    finally:
        os.close(helper)
