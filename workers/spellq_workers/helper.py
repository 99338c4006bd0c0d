"""The slot helper: parent of a slot's commands, pid 1 of their world; it outlives the agent.

Run as `python -I -S -X utf8 helper.py CONFIG`, CONFIG being a JSON object with `slot` (the slot's
folder), `cover` (a folder no command may see) and `visible` (read-only folders a command sees at
their own paths even where its own HOME or /tmp lies over them). The process that was started makes
new PID, mount and IPC namespaces, listens on `socket` in the slot's folder, writes `helper.pid` and
ends; its child goes on. With `check` (a folder) in CONFIG it only tries whether a world can be made
there: exit status 0, and on stdout why it has no overlay, if so; or a sentence on stderr. The exit
status 3 says that it may not even make namespaces.

Only the standard library, nothing of spellq: the helper starts fast and survives an update.

Guarantees: a command is executed at most once for a `prepare`; `ended` is sent only after every
process of the world is dead and the journal `exit.json` is in the run's folder, or was tried to be
written there; what one run leaves in the world is gone before the next is prepared; without an
agent and without a running command the helper ends after 30 seconds. A helper whose world is of no
use any more ends as well, and listens no more from the answer on that made it so.

Protocol: one JSON object a line. The latest connection wins. Every request gets one answer, in
order; `ended` comes unasked, in between. All but `prepare`, `status` and `leave` name `run` and
`attempt`, and get `unknown` when the helper holds another run.

    {"do": "prepare", "run", "attempt", "folder", "command", "cwd", "environment", "home", "code",
     "mounts": [[source, target], ...]}     -> prepared | error {message, mount, leaving}; leaving:
                                               it is worth a try with a new helper
    {"do": "start"}                         -> started; repeated, nothing happens again
                                               | error {message, mount}; nothing was executed
    {"do": "stop", "grace_seconds"}         -> done; SIGTERM to the command's process group, once;
                                               SIGKILL to all when nobody of the group is left, or
                                               after the grace: of several, the one that ends first
    {"do": "kill"}                          -> done; SIGKILL to all
                                               (either before `start`: that executes nothing then,
                                               and the command has ended by that signal)
    {"do": "discard"}                       -> discarded {clean} | error while the command runs;
                                               not clean: `discarded-…` is left to be removed
    {"do": "status"}                        -> status {run, attempt, state, exit}
    {"do": "leave"}                         -> done, and the helper ends unless a command runs
    ended {run, attempt, exit: {code, signal, started_at, ended_at, out_of_memory}}; out_of_memory:
                                               it ended by a SIGKILL that was not ours (137), and
                                               the kernel killed for lack of memory meanwhile

What a command says goes into its run's folder through a pipe: see outputpipe.py. What else is in
that folder, which `prepare` makes: see runfolder.py. The journal also has `run`,
`attempt`, `boot_id`, and `held`: whether somebody outside may still write to the run's files.
"""

import json
import os
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

# Isolated (-I) and without site (-S): this package's own parent is not on the path.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from spellq_workers.keyrings import close_keyrings
from spellq_workers.memory import OomKills, Sacrifice
from spellq_workers.mounts import give_up_privileges, is_below
from spellq_workers.outputpipe import Carrier, OutputPipe
from spellq_workers.places import Refused
from spellq_workers.privileges import NO_ENTRY, enter_namespaces, keep_apart
from spellq_workers.runfolder import Message, RunFolder
from spellq_workers.world import RUN_DIRECTORY, World

IDLE_SECONDS = 30.0

_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]

_SHELL = next((path for path in ("/bin/bash", "/usr/bin/bash") if os.path.exists(path)), "/bin/sh")


class Command:
    """One run's command: prepared, started once, ended."""

    def __init__(self, request: Message, folder: RunFolder, carrier: Carrier, boot_id: str) -> None:
        self.run: int = request["run"]
        self.attempt: int = request["attempt"]
        self.exit: Message | None = None
        self.pid: int | None = None
        self.folder = folder
        self._output: OutputPipe | None = None
        self._carrier = carrier
        self._text: str = request["command"]
        self._environment: dict[str, str] = request["environment"]
        self._boot_id = boot_id
        self._started_at = 0.0
        self._doom: signal.Signals | None = None
        cwd = os.path.normpath(os.path.join(RUN_DIRECTORY, request["cwd"]))
        self._cwd = os.path.realpath(cwd)
        if not os.path.isdir(self._cwd):
            raise Refused(f"The run's folder {cwd} does not exist in its code.")
        if not is_below(self._cwd, RUN_DIRECTORY):
            raise Refused(f"The run's folder {cwd} leads out of {RUN_DIRECTORY}.")

    @property
    def state(self) -> str:
        if self.exit is not None:
            return "ended"
        return "started" if self._started_at else "prepared"

    def doom(self, end: signal.Signals) -> None:
        """Prepared, it shall not be executed: `start` will end it by this signal."""
        if self._doom is not signal.SIGKILL:
            self._doom = end

    def start(self) -> tuple[int, int | None] | None:
        """Execute it, unless it is doomed; how it ended, (code, signal), if it did at once.

        One that cannot be executed says so in its output and ends with 126.

        Raises:
            OSError: its output cannot be written; it is still prepared.
        """
        output = OutputPipe(self.folder.open_output())
        try:
            if self._doom is None:
                self.folder.mark_started()
            self._started_at = time.time()
            if self._doom is not None:
                return 128 + self._doom, self._doom
            self.pid = self._spawn(output.writer)
            self._carrier.begin(output)
            self._output = output
        except (OSError, ValueError) as error:
            if not self._started_at:
                raise
            os.write(output.writer, f"spellq: the command cannot be executed: {error}\n".encode())
            return 126, None
        finally:
            if self._output is None:
                output.close()
        return None

    def close_output(self) -> None:
        """Every process is dead: all it said is in its output."""
        if self._output is not None:
            self._carrier.end()
            self._output.close()
            self._output = None

    def end(self, code: int, ended_by: int | None, *, held: bool, out_of_memory: bool) -> None:
        """Write the journal. If that fails, the exit is told all the same.

        `held`: somebody outside may still write to the run's files.
        """
        self.exit = {
            "code": code,
            "signal": ended_by,
            "started_at": self._started_at,
            "ended_at": time.time(),
            "out_of_memory": out_of_memory,
        }
        about = {"run": self.run, "attempt": self.attempt, "boot_id": self._boot_id, "held": held}
        try:
            self.folder.write_journal(about | self.exit)
        except OSError as error:
            _complain("the journal cannot be written", error)

    def _spawn(self, output: int) -> int:
        os.chdir(self._cwd)
        try:
            return os.posix_spawn(
                _SHELL,
                [os.path.basename(_SHELL), "-c", self._text],
                self._environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        finally:
            os.chdir("/")


class Helper:
    """Serves one agent at a time, and at most one command."""

    def __init__(self, listener: socket.socket, config: Message) -> None:
        self._listener = listener
        self._config = config
        self._world: World | None = None
        self._carrier: Carrier
        self._connection: socket.socket | None = None
        self._received = b""
        self._command: Command | None = None
        self._status: int | None = None
        self._kill_at: float | None = None
        self._oom_kills = OomKills()
        self._oom_kills_before: int | None = None
        self._sacrifice = Sacrifice()
        self._limits = _read_limits()
        self._idle_since = time.monotonic()
        self._leaving = False
        with open("/proc/sys/kernel/random/boot_id") as file:
            self._boot_id = file.read().strip()
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._children = self._watch_children()

    def serve(self) -> None:
        while not self._leaving:
            for descriptor, _ in self._poll.poll(self._timeout_ms()):
                if descriptor == self._children:
                    os.read(self._children, 4096)
                    self._reap()
                elif descriptor == self._listener.fileno():
                    self._accept()
                else:
                    self._receive()
            self._keep_deadlines()

    def _watch_children(self) -> int:
        readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        self._poll.register(readable, select.POLLIN)
        return readable

    def _running(self) -> bool:
        return self._command is not None and self._command.state == "started"

    def _deadline(self) -> float | None:
        if self._running():
            return self._kill_at
        return None if self._connection is not None else self._idle_since + IDLE_SECONDS

    def _timeout_ms(self) -> int | None:
        deadline = self._deadline()
        return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)

    def _keep_deadlines(self) -> None:
        deadline = self._deadline()
        if deadline is not None and time.monotonic() >= deadline:
            if self._running():
                self._kill_all()
                self._kill_at = None
            else:
                self._leave()

    def _leave(self) -> None:
        """End soon. Whoever connects from now on finds nobody, and starts another helper."""
        if not self._leaving:
            self._leaving = True
            self._poll.unregister(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._disconnect()
        connection.setblocking(False)
        self._poll.register(connection, select.POLLIN)
        self._connection, self._received = connection, b""

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._poll.unregister(self._connection)
            self._connection.close()
            self._connection = None
            self._idle_since = time.monotonic()

    def _receive(self) -> None:
        if self._connection is None:
            return
        try:
            data = self._connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            for line in lines:
                self._answer(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            print(f"a request that is none: {error!r}", file=sys.stderr)  # noqa: T201
            self._disconnect()

    def _send(self, message: Message) -> None:
        """An agent that does not read its answers loses its connection, never holds us up."""
        if self._connection is None:
            return
        data = json.dumps(message).encode() + b"\n"
        with suppress(OSError):
            if self._connection.send(data) == len(data):
                return
        self._disconnect()

    def _answer(self, request: Message) -> None:
        verb = request["do"]
        if verb == "prepare":
            self._send(self._prepare(request))
        elif verb == "status":
            self._send(self._describe())
        elif verb == "leave":
            if not self._running():
                self._leave()
            self._send({"is": "done"})
        else:
            self._answer_about_command(verb, request)

    def _answer_about_command(self, verb: str, request: Message) -> None:
        command = self._command
        asked = (request["run"], request["attempt"])
        if command is None or (command.run, command.attempt) != asked:
            self._send({"is": "unknown"})
        elif verb == "start":
            self._start(command)
        elif verb == "discard" and self._running():
            self._send(_error("The command is still running."))
        elif verb == "discard":
            self._send({"is": "discarded", "clean": self._forget()})
        else:
            if verb == "kill":
                self._kill(command)
            elif verb == "stop":
                self._stop(command, request["grace_seconds"])
            self._send({"is": "done"})

    def _describe(self) -> Message:
        command = self._command
        if command is None:
            return {"is": "status", "run": None, "attempt": None, "state": "idle", "exit": None}
        return {
            "is": "status",
            "run": command.run,
            "attempt": command.attempt,
            "state": command.state,
            "exit": command.exit,
        }

    def _prepare(self, request: Message) -> Message:
        if self._running():
            return _error("The slot has a running command.")
        self._forget()
        if self._leaving:
            return _error("The slot helper is about to end.", leaving=True)
        try:
            self._command = self._make_command(request)
        except Refused as refusal:
            return _error(str(refusal), mount=refusal.mount)
        except OSError as error:
            _complain("the world cannot be made", error)
            self._leave()
            return _error(error.strerror or str(error), leaving=True)
        return {"is": "prepared"}

    def _make_command(self, request: Message) -> Command:
        if self._world is None:
            config = self._config
            world = World(config["slot"], config["cover"], config["visible"])
            give_up_privileges()
            keep_apart()
            close_keyrings()
            self._carrier = Carrier()
            self._world = world
        folder = self._world.prepare(
            request["folder"], request["home"], request["code"], request["mounts"]
        )
        try:
            return Command(request, folder, self._carrier, self._boot_id)
        except Refused:
            self._world.discard(folder)
            raise

    def _forget(self) -> bool:
        """Let go of the run in hand. False: its folder is left to be removed."""
        command, self._command = self._command, None
        if command is None or self._world is None:
            return True
        clean = False
        try:
            clean = self._world.discard(command.folder)
        except OSError as error:
            _complain("the world cannot be used again", error)
            self._leave()
        if self._world.was_held or _read_limits() != self._limits:
            self._leave()
        return clean

    def _start(self, command: Command) -> None:
        if command.state == "prepared":
            self._status, self._kill_at = None, None
            self._oom_kills_before = self._oom_kills.count()
            try:
                with self._sacrifice:
                    ended = command.start()
            except OSError as error:
                message = f"The command cannot be started: {error.strerror or error}."
                self._send(_error(message))
                return
            if ended is not None:
                self._send({"is": "started"})
                self._end(command, *ended)
                return
        self._send({"is": "started"})
        if command.exit is not None:
            self._report(command)

    def _kill(self, command: Command) -> None:
        if command.state == "prepared":
            command.doom(signal.SIGKILL)
        else:
            self._kill_all()

    def _stop(self, command: Command, grace_seconds: float) -> None:
        if command.state == "prepared":
            command.doom(signal.SIGTERM)
        elif self._running() and command.pid is not None:
            kill_at = time.monotonic() + grace_seconds
            if self._kill_at is not None:
                self._kill_at = min(kill_at, self._kill_at)
            elif self._status is None:
                os.killpg(command.pid, signal.SIGTERM)
                self._kill_at = kill_at

    def _kill_all(self) -> None:
        if self._status is None:
            self._oom_kills_before = None  # how the shell ends is our doing
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    def _reap(self) -> None:
        command = self._command
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                return
            if command is not None and pid == command.pid:
                self._status = status
            if self._status is not None and not self._has_grace(command):
                self._kill_all()
        if command is not None and command.state == "started" and self._status is not None:
            self._finish(command, self._status)

    def _has_grace(self, command: Command | None) -> bool:
        """Whether a stop left time to what the shell, which has ended, began in its own group."""
        if command is None or command.pid is None or self._kill_at is None:
            return False
        with suppress(ProcessLookupError):
            os.killpg(command.pid, 0)
            return True
        return False

    def _finish(self, command: Command, status: int) -> None:
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self._end(command, os.WEXITSTATUS(status) if ended_by is None else 128 + ended_by, ended_by)

    def _end(self, command: Command, code: int, ended_by: int | None) -> None:
        out_of_memory = code == 128 + signal.SIGKILL and self._memory_was_short()
        command.close_output()
        command.end(code, ended_by, held=self._leave_world(), out_of_memory=out_of_memory)
        self._report(command)

    def _memory_was_short(self) -> bool:
        before, now = self._oom_kills_before, self._oom_kills.count()
        return before is not None and now is not None and now > before

    def _leave_world(self) -> bool:
        assert self._world is not None
        try:
            return self._world.leave()
        except OSError as error:
            _complain("the world cannot be used again", error)
            self._world.was_held = True
            return True

    def _report(self, command: Command) -> None:
        self._send(
            {"is": "ended", "run": command.run, "attempt": command.attempt, "exit": command.exit}
        )
        self._idle_since = time.monotonic()


def _read_limits() -> list[tuple[int, int]]:
    """What every command inherits from this process; one may have lowered them: it has its user."""
    return [resource.getrlimit(limit) for limit in _LIMITS]


def _error(message: str, *, mount: bool = False, leaving: bool = False) -> Message:
    return {"is": "error", "message": message, "mount": mount, "leaving": leaving}


def _complain(what: str, error: OSError) -> None:
    print(f"{what}: {error}", file=sys.stderr)  # noqa: T201


def _check(folder: str) -> None:
    """Make a world with code, and let this process's end take it down."""
    os.mkdir(f"{folder}/code")
    world = World(folder, folder, [])
    give_up_privileges()
    world.discard(world.prepare(f"{folder}/run", "/", f"{folder}/code", []))
    print(world.overlay_refusal)  # noqa: T201


def _leave_agent(config: Message) -> socket.socket:
    """Continue as pid 1 of new namespaces, listening; the process that was started ends."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if "slot" in config:
        os.chdir(config["slot"])
        with suppress(FileNotFoundError):
            os.unlink("socket")
        listener.bind("socket")
        listener.listen(4)
    os.setsid()
    try:
        enter_namespaces()
    except OSError as error:
        print(error.strerror, file=sys.stderr)  # noqa: T201
        sys.exit(NO_ENTRY)
    child = os.fork()
    if child == 0:
        return listener
    if "check" in config:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    with open("helper.pid", "w") as file:
        file.write(str(child))
    os._exit(0)


def main() -> NoReturn:
    config: Message = json.loads(sys.argv[1])
    os.umask(0o022)
    try:
        listener = _leave_agent(config)
        if "check" in config:
            _check(config["check"])
        else:
            Helper(listener, config).serve()
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)  # noqa: T201
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
