"""The process executor: commands as processes of this machine, each in a world of its own.

Needs root on Linux in this release. Below `home`/agent: `slots/<slot>/` is a slot helper's folder,
`slots/<slot>/<run>-<attempt>/` a run's (see runfolder.py), and `journals/<hour>.jsonl` keeps how
discarded executions ended for 24 hours more.
"""

import asyncio
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from spellq.ports import Adopted, ExecutionLost, Exit, Job, WorldError
from spellq_workers.link import Link, Message, connect, start_helper
from spellq_workers.worldcheck import refuse_without_root, visible_paths

JOURNAL_KEPT_SECONDS: Final = 24 * 3600.0


class _Journal(Struct):
    code: int
    signal: int | None
    started_at: float
    ended_at: float


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
        """A link to the helper, which is started where none lives."""
        link = await self.link()
        if link is not None:
            return link
        async with self._connecting:
            await asyncio.to_thread(start_helper, self.folder, self._cover, self._visible)
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
        await self._ask_if_there("stop", grace_seconds=grace_seconds)

    async def kill(self) -> None:
        await self._ask_if_there("kill")

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
            self._exit = _exit(msgspec.convert(journal, _Journal))
        elif self._link is None:
            self._exit = read_journal(self.folder)
            self._started = started or self._exit is not None

    @property
    def adopted(self) -> Adopted:
        return Adopted(self, self._started)

    async def _ask(self, verb: str, **values: float) -> Message:
        if self._link is None:
            raise ConnectionResetError("the slot helper is gone")
        return await self._link.ask(
            {"do": verb, "run": self.run, "attempt": self.attempt, **values}
        )

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
            self._exit = _exit(msgspec.convert(message["exit"], _Journal))
        self._news.set()

    async def _find_again(self) -> None:
        """The link is lost: the journal tells the end, or the helper is still there."""
        link = await self._slot.link()
        self._exit = read_journal(self.folder)
        if self._exit is not None:
            return
        state = await _status(link)
        if link is None or (state["run"], state["attempt"]) != (self.run, self.attempt):
            raise ExecutionLost(f"The slot helper of run {self.run} is gone, and left no journal.")
        self._bind(link)
        if state["exit"] is not None:
            self._exit = _exit(msgspec.convert(state["exit"], _Journal))


class ProcessExecutor:
    """Implements `spellq.ports.Executor`. One a home; to be used in one event loop."""

    def __init__(self, home: Path) -> None:
        self._home = Path(os.path.realpath(home))
        self._slots_folder = self._home / "agent" / "slots"
        self._journals = self._home / "agent" / "journals"
        self._visible = visible_paths(self._home)
        self._slots: dict[str, _Slot] = {}
        self._remover = ThreadPoolExecutor(1, "spellq-remover")
        self._journals_exist = False

    async def prepare(self, job: Job) -> ProcessExecution:
        refuse_without_root()
        slot = self._slot(job.slot)
        folder = slot.folder / f"{job.run}-{job.attempt}"
        self.remove(folder)
        link, answer = await self._prepare(slot, _request(job, folder))
        if answer["is"] != "prepared":
            self.remove(folder)
            raise WorldError(answer["message"], mount=answer["mount"])
        return ProcessExecution(self, slot, job.run, job.attempt, link)

    async def adopt(self) -> list[Adopted]:
        left = await asyncio.to_thread(self._tidy_up)
        states = {name: await self._state(self._slot(name)) for name in {slot for slot, *_ in left}}
        return [self._adopt_one(name, run, attempt, *states[name]) for name, run, attempt in left]

    async def close(self) -> None:
        """Also asks the helpers without a running command to end at once."""
        for link in [slot.release() for slot in self._slots.values()]:
            if link is not None:
                link.on_ended = None
                try:
                    await link.ask({"do": "leave"})
                except ConnectionError:
                    continue
                link.close()
        self._slots.clear()
        await asyncio.to_thread(self._remover.shutdown)

    def remove(self, folder: Path) -> None:
        """Remove a run's folder in the background, if it is there under any of its names."""
        discarded = folder.with_name(f"discarded-{folder.name}")
        if folder.exists():
            folder.rename(discarded)
        if discarded.exists():
            self._remover.submit(shutil.rmtree, discarded, ignore_errors=True)

    def keep_journal(self, run: int, attempt: int, exit_: Exit) -> None:
        if not self._journals_exist:
            self._journals.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._journals_exist = True
        hour = exit_.ended_at.strftime("%Y-%m-%dT%H")
        line = msgspec.json.encode({"run": run, "attempt": attempt, "exit": exit_})
        with (self._journals / f"{hour}.jsonl").open("ab") as file:
            file.write(line + b"\n")

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            if "/" in name or name.startswith("."):
                raise WorldError(f"Invalid slot name {name!r}.")
            self._slots[name] = _Slot(self._slots_folder / name, self._home, self._visible)
        return self._slots[name]

    async def _prepare(self, slot: _Slot, request: Message) -> tuple[Link, Message]:
        """A helper that was about to leave is replaced by a new one."""
        for last_try in (False, True):
            link = await slot.helper()
            try:
                return link, await link.ask(request)
            except ConnectionError as error:
                if last_try:
                    raise WorldError(f"The slot helper of {slot.folder.name} died.") from error
            except asyncio.CancelledError:
                link.tell({"do": "discard", "run": request["run"], "attempt": request["attempt"]})
                raise
        raise AssertionError("the last try returns or raises")

    async def _state(self, slot: _Slot) -> tuple[Link | None, Message]:
        link = await slot.link()
        return link, await _status(link)

    def _adopt_one(
        self, name: str, run: int, attempt: int, link: Link | None, state: Message
    ) -> Adopted:
        held = (state["run"], state["attempt"]) == (run, attempt)
        slot = self._slot(name)
        execution = ProcessExecution(self, slot, run, attempt, link if held else None)
        if held:
            execution.recall(started=state["state"] != "prepared", journal=state["exit"])
        else:
            execution.recall(started=(execution.folder / "started").exists())
        return execution.adopted

    def _tidy_up(self) -> list[tuple[str, int, int]]:
        """Removes journals that are old enough; returns the run folders that are there."""
        for journal in self._journals.glob("*.jsonl"):
            if time.time() - journal.stat().st_mtime > JOURNAL_KEPT_SECONDS:
                journal.unlink(missing_ok=True)
        found = []
        for folder in sorted(self._slots_folder.glob("*/*-*/")):
            run, _, attempt = folder.name.partition("-")
            if run.isdigit() and attempt.isdigit():
                found.append((folder.parent.name, int(run), int(attempt)))
            elif run == "discarded":
                shutil.rmtree(folder, ignore_errors=True)
        return found


def read_journal(folder: Path) -> Exit | None:
    """How the command of a run's folder ended, or None where nobody wrote that down."""
    try:
        data = (folder / "exit.json").read_bytes()
    except FileNotFoundError:
        return None
    return _exit(msgspec.json.decode(data, type=_Journal))


def _exit(journal: _Journal) -> Exit:
    return Exit(
        code=journal.code,
        signal=journal.signal,
        started_at=datetime.fromtimestamp(journal.started_at, UTC),
        ended_at=datetime.fromtimestamp(journal.ended_at, UTC),
    )


async def _status(link: Link | None) -> Message:
    if link is not None:
        try:
            return await link.ask({"do": "status"})
        except ConnectionError:
            pass
    return {"run": None, "attempt": None, "state": "idle", "exit": None}


def _request(job: Job, folder: Path) -> Message:
    return {
        "do": "prepare",
        "run": job.run,
        "attempt": job.attempt,
        "folder": str(folder),
        "command": job.command,
        "cwd": job.cwd,
        "environment": job.environment,
        "code": job.code and os.path.realpath(job.code),
        "mounts": [[os.path.realpath(mount.source), mount.target] for mount in job.mounts],
    }
