"""The process executor: commands as processes of this machine, each in a world of its own.

Needs Linux. Below `home`/agent: `slots/<slot>/` is a slot helper's folder,
`slots/<slot>/<run>-<attempt>/` a run's (see runfolder.py), and `journals/<hour>.jsonl` keeps how
discarded executions ended for 24 hours more.
"""

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
from anyio import to_thread

from spellq.ports import Adopted, ExecutionLost, Exit, Job, WorldError
from spellq_workers.environment import this_user
from spellq_workers.link import (
    HelperSilent,
    Link,
    Message,
    connect,
    remove_folder,
    start_helper,
)
from spellq_workers.worldcheck import refuse_without_linux, visible_paths

JOURNAL_KEPT_SECONDS: Final = 24 * 3600.0


CLOSING_SECONDS: Final = 2.0
"""How long `close` waits for each helper to say that it ends."""

_NOBODY: Final[Message] = {"run": None, "attempt": None, "state": "idle", "exit": None}

_log = logging.getLogger(__name__)


class _Slot:
    """A slot's folder, and the link to its helper while there is one."""

    def __init__(self, folder: Path, cover: Path, visible: list[str]) -> None:
        self.folder = folder
        self._cover = cover
        self._visible = visible
        self._link: Link | None = None
        self._connecting = asyncio.Lock()

    async def link(self) -> Link | None:
        """A link to the helper that lives, or None."""
        async with self._connecting:
            if self._link is None or not self._link.is_open:
                self._link = await connect(self.folder)
            return self._link

    async def helper(self) -> Link:
        """A link to the helper, which is started where none lives.

        A cancelled start is waited for, so that two helpers never start at once.
        """
        link = await self.link()
        if link is not None:
            return link
        async with self._connecting:
            await to_thread.run_sync(start_helper, self.folder, self._cover, self._visible)
        link = await self.link()
        if link is None:
            raise WorldError("The slot helper ended at once; see helper.log in its slot's folder.")
        return link

    def release(self) -> Link | None:
        """Forget the link, and hand it over."""
        link, self._link = self._link, None
        return link if link is not None and link.is_open else None


class ProcessExecution:
    """An execution held by a slot helper (or one whose helper is gone)."""

    def __init__(
        self, executor: "ProcessExecutor", slot: _Slot, run: int, attempt: int, link: Link | None
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.slot = slot.folder.name
        self.folder = slot.folder / f"{run}-{attempt}"
        self.output = self.folder / "output"
        self.files = self.folder / "files"
        self._executor = executor
        self._slot = slot
        self._started = False
        self._exit: Exit | None = None
        self._discarded = False
        self._ordered: tuple[str, dict[str, float]] | None = None
        self._link: Link | None = None
        self._news = asyncio.Event()
        if link is not None:
            self._bind(link)

    async def start(self) -> None:
        if self._exit is not None:
            return
        try:
            answer = await self._ask("start")
        except ConnectionError as error:
            raise ExecutionLost(f"The slot helper of run {self.run} is gone.") from error
        if answer["is"] == "error":
            raise WorldError(answer["message"])
        if answer["is"] != "started":
            raise ExecutionLost(f"The slot helper does not hold run {self.run} any more.")
        self._started = True

    async def ended(self) -> Exit:
        while self._exit is None:
            if self._link is None or not self._link.is_open:
                await self._find_again()
            else:
                await self._news.wait()
                self._news.clear()
        return self._exit

    async def stop(self, grace_seconds: float) -> None:
        await self._order("stop", grace_seconds=grace_seconds)

    async def kill(self) -> None:
        await self._order("kill")

    async def discard(self) -> None:
        if self._discarded:
            return
        if self._started and self._exit is None:
            await self.kill()
            try:
                await self.ended()
            except ExecutionLost:
                self._link = None
        self._discarded = True
        if self._exit is not None:
            self._executor.keep_journal(self.run, self.attempt, self._exit)
        answer = await self._ask_if_there("discard")
        if self._link is not None:
            self._link.on_ended = None
        if answer is None or not answer.get("clean"):
            self._executor.remove(self.folder)

    def recall(self, *, started: bool, journal: Message | None = None) -> None:
        """What is known of it from before this agent."""
        self._started = started
        if journal is not None:
            self._exit = _exit(journal)
        elif self._link is None:
            self._exit = read_journal(self.folder)
            self._started = started or self._exit is not None

    def adopted(self, *, held: bool) -> Adopted:
        return Adopted(self, self._started, held or self._exit is not None, self._exit)

    async def _ask(self, verb: str, **values: float) -> Message:
        if self._link is None:
            raise ConnectionResetError("the slot helper is gone")
        return await self._link.ask(
            {"do": verb, "run": self.run, "attempt": self.attempt, **values}
        )

    async def _order(self, verb: str, **values: float) -> None:
        """What a silent helper may have missed it is told again when it is found again."""
        self._ordered = verb, values
        await self._ask_if_there(verb, **values)

    async def _ask_if_there(self, verb: str, **values: float) -> Message | None:
        try:
            return await self._ask(verb, **values)
        except ConnectionError:
            return None

    def _bind(self, link: Link) -> None:
        self._link = link
        link.on_ended = self._hear

    def _hear(self, message: Message | None) -> None:
        """The helper says that it ended, or is gone itself (None)."""
        if message is not None:
            if (message["run"], message["attempt"]) != (self.run, self.attempt):
                return
            self._exit = _exit(message["exit"])
        self._news.set()

    async def _find_again(self) -> None:
        """The link is lost: the journal tells the end, or the helper is still there.

        A silent helper is there: a slow disk may hold it up for minutes.
        """
        link = await self._slot.link()
        self._exit = self._exit or read_journal(self.folder)
        if self._exit is not None:
            return
        try:
            state = await _status(link)
        except HelperSilent:
            return
        if link is None or (state["run"], state["attempt"]) != (self.run, self.attempt):
            raise ExecutionLost(f"The slot helper of run {self.run} is gone, and left no journal.")
        self._bind(link)
        if state["exit"] is not None:
            self._exit = _exit(state["exit"])
        elif self._ordered is not None:
            verb, values = self._ordered
            await self._ask_if_there(verb, **values)


class ProcessExecutor:
    """Implements `spellq.ports.Executor`. One a home; to be used in one event loop."""

    def __init__(self, home: Path) -> None:
        self._home = Path(os.path.realpath(home))
        self._slots_folder = self._home / "agent" / "slots"
        self._journals = self._home / "agent" / "journals"
        self._visible = visible_paths(self._home)
        self._slots: dict[str, _Slot] = {}
        self._remover = ThreadPoolExecutor(1, "spellq-remover")
        self._journal: Path | None = None

    async def prepare(self, job: Job) -> ProcessExecution:
        refuse_without_linux()
        slot = self._slot(job.slot)
        folder = slot.folder / f"{job.run}-{job.attempt}"
        self.remove(folder)
        link, answer = await self._prepare(slot, _request(job, folder))
        if answer["is"] != "prepared":
            self.remove(folder)
            raise WorldError(answer["message"], mount=answer["mount"])
        return ProcessExecution(self, slot, job.run, job.attempt, link)

    async def adopt(self) -> list[Adopted]:
        left = await to_thread.run_sync(self._tidy_up)
        names = sorted({slot for slot, *_ in left})
        states = await asyncio.gather(*(self._state(self._slot(name)) for name in names))
        by_name = dict(zip(names, states, strict=True))
        return [self._adopt_one(name, run, attempt, *by_name[name]) for name, run, attempt in left]

    async def close(self) -> None:
        """Also asks the helpers without a running command to end at once."""
        links = [slot.release() for slot in self._slots.values()]
        await asyncio.gather(*(_say_goodbye(link) for link in links if link is not None))
        self._slots.clear()
        await asyncio.to_thread(self._remover.shutdown)

    def remove(self, folder: Path) -> None:
        """Remove a run's folder in the background, if it is there under any of its names."""
        ours = folder.with_name(f"discarded-{folder.name}-{os.urandom(4).hex()}")
        try:
            folder.rename(ours)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("%s cannot be removed: %s", folder, error)
        for discarded in (ours, folder.with_name(f"discarded-{folder.name}")):
            if discarded.exists():
                self._remover.submit(remove_folder, discarded)

    def keep_journal(self, run: int, attempt: int, exit_: Exit) -> None:
        """Note how a run ended that is discarded now; a failure is logged."""
        hour = self._journals / exit_.ended_at.strftime("%Y-%m-%dT%H.jsonl")
        line = msgspec.json.encode({"run": run, "attempt": attempt, "exit": exit_})
        try:
            if hour != self._journal:
                self._journals.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._remove_old_journals()
                self._journal = hour
            with hour.open("ab") as file:
                file.write(line + b"\n")
        except OSError as error:
            _log.warning("the end of run %s cannot be noted: %s", run, error)

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            if "/" in name or name.startswith("."):
                raise WorldError(f"Invalid slot name {name!r}.")
            self._slots[name] = _Slot(self._slots_folder / name, self._home, self._visible)
        return self._slots[name]

    async def _prepare(self, slot: _Slot, request: Message) -> tuple[Link, Message]:
        """A helper that leaves, or whose world is of no use any more, is replaced by a new one."""
        for last_try in (False, True):
            link = await slot.helper()
            try:
                answer = await link.ask(request)
            except ConnectionError as error:
                if last_try:
                    raise WorldError(f"The slot helper of {slot.folder.name} died.") from error
            except asyncio.CancelledError:
                link.tell({"do": "discard", "run": request["run"], "attempt": request["attempt"]})
                raise
            else:
                if last_try or not answer.get("leaving"):
                    return link, answer
                link.close()
            self.remove(Path(request["folder"]))
        raise AssertionError("the last try returns or raises")

    async def _state(self, slot: _Slot) -> tuple[Link | None, Message | None]:
        """The helper's link and what it holds; of a silent one nobody knows (None)."""
        link = await slot.link()
        try:
            return link, await _status(link)
        except HelperSilent:
            return None, None

    def _adopt_one(
        self, name: str, run: int, attempt: int, link: Link | None, state: Message | None
    ) -> Adopted:
        held = state is not None and (state["run"], state["attempt"]) == (run, attempt)
        slot = self._slot(name)
        execution = ProcessExecution(self, slot, run, attempt, link if held else None)
        if held and state is not None:
            execution.recall(started=state["state"] != "prepared", journal=state["exit"])
        else:
            execution.recall(started=(execution.folder / "started").exists())
        return execution.adopted(held=held or state is None)

    def _tidy_up(self) -> list[tuple[str, int, int]]:
        """Removes what is left of others; returns the run folders that are there."""
        self._remove_old_journals()
        found = []
        for folder in sorted(self._slots_folder.glob("*/*-*/")):
            run, _, attempt = folder.name.partition("-")
            if run.isdigit() and attempt.isdigit():
                found.append((folder.parent.name, int(run), int(attempt)))
            elif run == "discarded":
                self._remover.submit(remove_folder, folder)
        return found

    def _remove_old_journals(self) -> None:
        for journal in self._journals.glob("*.jsonl"):
            try:
                if time.time() - journal.stat().st_mtime > JOURNAL_KEPT_SECONDS:
                    journal.unlink()
            except OSError as error:
                _log.warning("%s cannot be removed: %s", journal, error)


def read_journal(folder: Path) -> Exit | None:
    """How the command of a run's folder ended, or None where nobody wrote that down."""
    try:
        return _exit(msgspec.json.decode((folder / "exit.json").read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("the journal in %s cannot be read: %s", folder, error)
        return None


def _exit(journal: Message) -> Exit:
    """Its times are in seconds since 1970."""
    return msgspec.convert(journal, Exit, strict=False)


async def _status(link: Link | None) -> Message:
    """What the helper holds; nothing where none is. Raises HelperSilent."""
    if link is not None:
        try:
            return await link.ask({"do": "status"})
        except HelperSilent:
            raise
        except ConnectionError:
            pass
    return _NOBODY


async def _say_goodbye(link: Link) -> None:
    link.on_ended = None
    try:
        await link.ask({"do": "leave"}, CLOSING_SECONDS)
    except ConnectionError:
        return
    link.close()


def _request(job: Job, folder: Path) -> Message:
    return {
        "do": "prepare",
        "run": job.run,
        "attempt": job.attempt,
        "folder": str(folder),
        "command": job.command,
        "cwd": job.cwd,
        "environment": job.environment,
        "home": this_user().home,
        "code": job.code and os.path.realpath(job.code),
        "mounts": [[os.path.realpath(mount.source), mount.target] for mount in job.mounts],
    }
