"""What a hostile command cannot do in any kind of world: alone, or with an accomplice."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import anyio
import pytest

from spellq_brokers.embedded.artifacts import DiskArtifacts
from spellq_workers import link
from spellq_workers.process import ProcessExecution
from tests.e2e.conftest import WORKERS
from tests.e2e.machine import ENVIRONMENT, Machine, hear, saved_contents

# What it cannot read

SEARCHING: Final = """
cat {home}/token; ls -A {home} {slots} /proc/*/root{home}; cat {other}/files/secret {other}/output
grep -rsl "the other" /spell /tmp ~ /dev/shm /run
for process in /proc/[0-9]* /proc/{outside}; do cat $process/environ | tr '\\0' '\\n'; done
"""


@pytest.fixture
def outsider(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user, like the daemon, with a secret in its environment."""
    with subprocess.Popen(["sleep", "99"], env=ENVIRONMENT | {"SECRET": "the outsider"}) as process:
        yield process
        process.kill()


async def test_nothing_of_others_can_be_read(
    any_machine: Machine, outsider: subprocess.Popen[bytes]
) -> None:
    home = any_machine.home
    home.mkdir(exist_ok=True)
    (home / "token").write_text("the token")
    other = await any_machine.prepare(
        "echo the other > secret; echo the other; sleep 99",
        slot="cpu-1",
        environment={"SECRET": "the other"},
    )
    await other.start()
    await hear(other, "the other")
    search = SEARCHING.format(
        home=home, slots=home / "agent/slots", other=other.folder, outside=outsider.pid
    )
    _, output = await any_machine.run(search, environment={"SECRET": "its own"})
    assert "SECRET=its own" in output
    for secret in ("the token", "the other", "the outsider", "cpu-1\n", "SPELLQ_HOME"):
        assert secret not in output


async def test_nobody_listens_in_run(any_machine: Machine) -> None:
    """There the user's own systemd, or Docker, would execute for it whatever it asks."""
    _, output = await any_machine.run("find /run /var/run/ -type s; ls -A /run")
    listening = [line for line in output.splitlines() if line.startswith("/")]
    assert [path for path in listening if "resolve" not in path and "nscd" not in path] == []
    assert not {"user", "dbus", "docker.sock", "lock"} & set(output.splitlines())


CALLING: Final = """
import os, socket
try:
    socket.socket(socket.AF_UNIX).connect("\\0" + os.environ["PLACE"])
    print("reached")
except PermissionError:
    print("refused")
"""


async def test_abstract_sockets_of_the_host_are_out_of_reach(
    any_machine: Machine, tmp_path: Path
) -> None:
    assert _kernel() >= (6, 12), "these tests need Linux 6.12 or newer, with Landlock"
    (tmp_path / "call.py").write_text(CALLING)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{tmp_path}")
        listener.listen()
        _, output = await any_machine.run(
            f"{sys.executable} /mnt/call.py",
            mounts={"/mnt/call.py": tmp_path / "call.py"},
            environment={"PLACE": str(tmp_path)},
        )
    assert output == "refused\n"


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


# What it cannot undo


UNCOVERING: Final = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000 | 0x20000) == 0:  # CLONE_NEWUSER | CLONE_NEWNS
    print("powerful", flush=True)
def tried(what, result):
    if result == 0:
        print("did", what, flush=True)
for place in (b"/.host", b"/spell", b"/tmp", b"/proc", b"/dev/shm", b"/dev"):
    tried(f"unmount {place}", libc.umount2(place, 2))
for place in (b"/", b"/usr", b"/etc", b"/proc", b"/dev"):
    tried(f"remount {place}", libc.mount(None, place, None, 4096 | 32, None))
tried("copy of one layer", libc.mount(b"/", b"/tmp", None, 4096, None))
for place in ("/usr/x", "/proc/sys/kernel/core_pattern", "/dev/x", "/new"):
    try:
        open(place, "a").close()
        print("wrote", place)
    except OSError:
        pass
print(os.listdir("/.host"))
"""


async def test_a_user_namespace_of_its_own_uncovers_nothing(
    any_machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "uncover.py").write_text(UNCOVERING)
    _, output = await any_machine.run(
        f"{sys.executable} /mnt/uncover.py", mounts={"/mnt/uncover.py": tmp_path / "uncover.py"}
    )
    assert output == "powerful\n[]\n"  # a host that forbids such namespaces proves nothing here


# What it cannot touch or leave behind


ATTACKING: Final = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (1, {outside}, -1):
    for attack in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
        if libc.ptrace(attack, pid, None, None) == 0:
            print("attached to", pid, attack)
    for end in (signal.SIGINT, signal.SIGTERM) + (signal.SIGKILL, signal.SIGSTOP) * (pid > 0):
        try:
            os.kill(pid, end)
        except ProcessLookupError:
            pass
print("done", flush=True)
"""


async def test_no_process_outside_can_be_ended_or_traced(
    any_machine: Machine, tmp_path: Path, outsider: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "attack.py").write_text(ATTACKING.format(outside=outsider.pid))
    other = await any_machine.start("echo up; sleep 99", slot="cpu-1")
    await hear(other, "up")
    _, output = await any_machine.run(
        f"exec {sys.executable} /mnt/attack.py", mounts={"/mnt/attack.py": tmp_path / "attack.py"}
    )
    assert output == "done\n"
    assert outsider.poll() is None
    await other.kill()
    assert (await other.ended()).signal == signal.SIGKILL
    assert (await any_machine.run("exit 7"))[0].code == 7  # the helper has not minded


DETACHED: Final = """
import fcntl, os, signal, sys
if os.fork():
    os.wait()
    open("/tmp/gate").read()
    sys.exit()
os.setsid()
if os.fork():
    os._exit(0)
for ignored in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(ignored, signal.SIG_IGN)
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("end", ["by itself", "stop", "kill"])
async def test_no_process_is_left_behind(any_machine: Machine, tmp_path: Path, end: str) -> None:
    """Detached twice over, and deaf: once the end is told, the lock it held is free."""
    (tmp_path / "detach.py").write_text(DETACHED)
    execution = await any_machine.start(
        f"mkfifo /tmp/gate; {sys.executable} /mnt/detach.py",
        mounts={"/mnt/detach.py": tmp_path / "detach.py"},
    )
    await hear(execution, "locked")
    with (execution.files / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if end == "by itself":
            await anyio.to_thread.run_sync((execution.folder / "tmp/gate").write_text, "")
        elif end == "stop":
            await execution.stop(0.2)
        else:
            await execution.kill()
        await execution.ended()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("do", "see"),
    [
        ("prlimit --pid 1 --nofile=64:64", "ulimit -n"),
        ("chmod 0 /dev/pts/ptmx", "stat -c %a /dev/pts/ptmx"),
        ("chmod 0 /dev/pts", "stat -c %a /dev/pts"),
    ],
)
async def test_what_one_run_forbids_the_next_may_do(
    any_machine: Machine, do: str, see: str
) -> None:
    """Also what it may not do itself, like an ordinary user with /dev/pts, makes no difference."""
    _, before = await any_machine.run(see)
    await any_machine.run(f"{do}; {see}")
    end, after = await any_machine.run(see)
    assert (end.code, after) == (0, before)


LOCKING: Final = """
import os, socket
reading, writing = socket.socketpair()
writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 4096)
if os.fork() == 0:
    if os.fork() == 0:
        gate = open("/tmp/gate", "w")
        for _ in range(32):
            writing.send(b"x")  # more than fits: some of it is in the pipe in the end
    os._exit(0)  # an orphan at its end, which has the helper look around
os.splice(reading.fileno(), 1, 4096)
"""


async def test_who_locks_the_pipe_of_its_output_can_be_killed(
    any_machine: Machine, tmp_path: Path
) -> None:
    """A splice that waits for more from a socket keeps all others away from the pipe."""
    (tmp_path / "lock.py").write_text(LOCKING)
    execution = await any_machine.start(
        f"mkfifo /tmp/gate; echo up; exec {sys.executable} /mnt/lock.py",
        mounts={"/mnt/lock.py": tmp_path / "lock.py"},
    )
    await hear(execution, "up")
    await anyio.to_thread.run_sync((execution.folder / "tmp/gate").read_text)
    await execution.kill()
    with anyio.fail_after(20):
        assert (await execution.ended()).code == 137
    assert execution.output.read_text().startswith("up\nx")


# With an accomplice


async def test_two_runs_cannot_meet(any_machine: Machine, tmp_path: Path) -> None:
    assert _kernel() >= (6, 12), "these tests need Linux 6.12 or newer, with Landlock"
    accomplice = Accomplice(any_machine, tmp_path)
    receiver = await accomplice.wait()
    giver = await accomplice.hand_over("/tmp")
    assert (await giver.ended()).code != 0
    assert "PermissionError" in giver.output.read_text()
    await receiver.kill()


@pytest.fixture
def before_linux_6_12(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers whose kernel cannot keep two runs from meeting."""
    program = tmp_path / "helper_of_before.py"
    program.write_text(
        f"""if True:
        import sys
        sys.path.append({WORKERS!r})
        from spellq_workers import helper
        helper.keep_apart = lambda: False
        helper.main()
        """
    )
    monkeypatch.setattr(link, "HELPER", program)


HANDING_OVER: Final = """
import array, os, socket
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect("\\0" + os.environ["MEETING"])
kept = [os.open(os.environ["PLACE"], os.O_RDONLY), 1]
peer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", kept))])
peer.recv(1)
"""
RECEIVING: Final = """
import array, os, socket
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind("\\0" + os.environ["MEETING"])
listener.listen()
print("ready", flush=True)
peer, _ = listener.accept()
_, [(_, _, descriptors)], _, _ = peer.recvmsg(1, 1000)
place, output = array.array("i", descriptors)
peer.send(b"x")
print("received", flush=True)
open("gate").read()
try:
    os.write(output, b"forged")
except BrokenPipeError:
    ended = "nobody reads its output any more"
if "victim" in os.listdir(place):
    os.chmod("victim", 0o644, dir_fd=place)
    os.write(os.open("victim", os.O_WRONLY, dir_fd=place), b"forged")
print(os.listdir(place), ended)
"""


class Accomplice:
    """A run beside `cpu-0` that gets a folder and the output of one in `cpu-0`, and keeps them."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self._machine = machine
        self._scripts = {"/mnt/hand": folder / "hand.py", "/mnt/receive": folder / "receive.py"}
        self._scripts["/mnt/hand"].write_text(HANDING_OVER)
        self._scripts["/mnt/receive"].write_text(RECEIVING)
        self._meeting = {"MEETING": str(folder)}

    async def wait(self) -> ProcessExecution:
        """The run that will hold what it is handed."""
        command = f"mkfifo gate; exec {sys.executable} -B /mnt/receive"
        receiver = await self._machine.prepare(
            command, slot="cpu-1", mounts=self._scripts, environment=self._meeting
        )
        await receiver.start()
        await hear(receiver, "ready")
        return receiver

    async def hand_over(self, place: str, before: str = ":") -> ProcessExecution:
        """The run that tries to hand `place` over."""
        giver = await self._machine.prepare(
            f"{before}; exec {sys.executable} -B /mnt/hand",
            mounts=self._scripts,
            environment=self._meeting | {"PLACE": place},
        )
        await giver.start()
        return giver

    async def meet(
        self, place: str, before: str = ":"
    ) -> tuple[ProcessExecution, ProcessExecution]:
        """(the run that handed `place` over, ended; the run that holds it)"""
        receiver = await self.wait()
        giver = await self.hand_over(place, before)
        await hear(receiver, "received")
        assert (await giver.ended()).code == 0
        return giver, receiver

    async def see(self, receiver: ProcessExecution) -> str:
        """What it finds in what it holds now, before it writes there."""
        await anyio.to_thread.run_sync((receiver.files / "gate").write_text, "\n")
        assert (await receiver.ended()).code == 0
        return receiver.output.read_text().splitlines()[-1]


@pytest.mark.usefixtures("before_linux_6_12")
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "~", "/spell", "/proc"])
async def test_who_kept_a_folder_of_one_run_sees_nothing_of_the_next(
    machine: Machine, tmp_path: Path, place: str
) -> None:
    """Though the first left no trace, so that its world would have been used again."""
    accomplice = Accomplice(machine, tmp_path)
    giver, receiver = await accomplice.meet(place.replace("~", ENVIRONMENT["HOME"]))
    await giver.discard()
    following = await machine.start(
        f"touch {place}/1000000 2> /dev/null; echo B; mkfifo /spell/gate; read < /spell/gate"
    )
    await hear(following, "B")
    seen = await accomplice.see(receiver)
    assert "'1" not in seen  # neither its file nor, in /proc, its processes
    assert "B" not in seen
    assert following.output.read_text() == "B\n"


@pytest.mark.usefixtures("before_linux_6_12")
async def test_outputs_somebody_still_holds_are_copied(
    machine: Machine, tmp_path: Path, artifacts: DiskArtifacts
) -> None:
    accomplice = Accomplice(machine, tmp_path)
    giver, receiver = await accomplice.meet("/spell", "echo true > victim")
    found = await saved_contents(giver, artifacts)
    assert "victim" in await accomplice.see(receiver)
    assert (giver.files / "victim").read_text() == "forged"
    assert found == {"victim": (b"true\n", 1)}


@pytest.mark.parametrize("mounted", [False, True])
async def test_outputs_nobody_holds_are_moved(
    machine: Machine, tmp_path: Path, artifacts: DiskArtifacts, mounted: bool
) -> None:
    mounts = {"/spell/in/data": tmp_path} if mounted else None
    execution = await machine.start("echo true > made", mounts=mounts)
    await execution.ended()
    assert await saved_contents(execution, artifacts) == {"made": (b"true\n", 2)}


# Keyrings

KEYING: Final = """
import ctypes, platform
add_key = {"x86_64": 248, "aarch64": 217}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
for keyring in (-4, -3, -2, -1):  # the user's two, the session's, the process's
    key = libc.syscall(add_key, b"user", b"leak", b"secret", 6, keyring)
    print(key, ctypes.get_errno())
"""


async def test_the_kernels_keyrings_are_closed(machine: Machine, tmp_path: Path) -> None:
    """They are one for all the runs of a user."""
    script = tmp_path / "keying.py"
    script.write_text(KEYING)
    _, output = await machine.run(f"{sys.executable} /mnt/keying", mounts={"/mnt/keying": script})
    assert output == f"-1 {errno.EPERM}\n" * 4
