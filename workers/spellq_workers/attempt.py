"""One attempt of one run, from its claim to its final status.

Every step is committed before the next begins, so that an agent that comes back after a crash goes
on where this one was (`resume`).
"""

import errno
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from signal import SIGKILL
from typing import Final, TypeVar

import anyio
from msgspec.structs import replace

from spellq.lifecycle import Advance, Claim, Command, End, Refused, Requeue, Stop
from spellq.logs import LogEntry
from spellq.outbox import Outbox
from spellq.ports import (
    Adopted,
    ArtifactStore,
    Clock,
    Execution,
    ExecutionLost,
    Executor,
    Exit,
    Job,
    Store,
    StoreUnavailable,
    Ticket,
    UnknownRun,
    WorldError,
    WorldMount,
)
from spellq.runs import BEFORE_RUNNING, Cause, Run, Status
from spellq.seal import Sealer
from spellq.tokens import make_master_token, token_hash
from spellq.trees import Tree, encode_tree
from spellq_workers.environment import run_environment
from spellq_workers.machine import Machine, Output
from spellq_workers.outputs import Scan

T = TypeVar("T")

LOG_BYTES: Final = 10 << 30
"""How much output of one run is kept."""

_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_RETRY_SECONDS: Final = (0.1, 0.3, 1.0, 3.0, 5.0)
_SCANNING: Final = "Scanning for modified or new files from the run"
_NOTHING: Final = "No modified or new files found"
_DISK_FULL: Final = "The disk became full before the command began."
_OUT_OF_MEMORY: Final = "The kernel killed a process for lack of memory while the command ran."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What every attempt of an agent works with."""

    agent: str
    store: Store
    outbox: Outbox
    artifacts: ArtifactStore
    executor: Executor
    machine: Machine
    sealer: Sealer
    clock: Clock
    gateway_url: str


def command_for_lost(run: Run, loss: Cause) -> Command:
    """What becomes of a run whose helper is gone: a command that was executed never is again."""
    if run.status in BEFORE_RUNNING or run.status is Status.KILLING:
        return Requeue(run.attempt, "The agent lost the run before its command began.")
    reason = "The helper that held the command was lost."
    if loss is Cause.MACHINE_RESTARTED:
        reason = "The machine was restarted."
    return End(run.attempt, status=Status.INTERRUPTED, cause=loss, reason=reason)


class Attempt:
    """Carries one attempt out. `look` may be called at any time to see what is wanted of it.

    `loss` is how an execution was lost, should nobody be able to tell its end.
    """

    def __init__(
        self,
        workshop: Workshop,
        slot: str,
        number: int,
        attempt: int,
        loss: Cause = Cause.HELPER_LOST,
    ) -> None:
        self.number = number
        self.attempt = attempt
        self.claimed = anyio.Event()
        self.done = anyio.Event()
        self._workshop = workshop
        self._slot = slot
        self._loss = loss
        self._execution: Execution | None = None
        self._interruptible: anyio.CancelScope | None = None
        self._status = Status.BUILDING
        self._asked: Status | None = None
        self._grace_asked = math.inf
        self._ended: Exit | None = None
        self._raw_start = 0

    async def carry_out(self, ticket: Ticket) -> None:
        """Claim the run and see it to its end; a run that does not want it (any more) is left."""
        await self._to_the_end(self._claim_and_begin(ticket))

    async def resume(self, run: Run, adopted: Adopted) -> None:
        """Go on with an execution an earlier incarnation of this agent left."""
        self.claimed.set()
        self._execution = adopted.execution
        self._status = run.status
        await self._to_the_end(self._go_on(run, adopted))

    async def look(self) -> None:
        """Do what is wanted of the run, as the store says now; each thing is asked for once.

        A stop with a shorter grace is another thing.
        """
        run = await self._until_available(lambda: self._workshop.store.get(self.number))
        if run is None or self.done.is_set():
            return
        fenced = run.is_final or run.attempt != self.attempt
        wanted = Status.KILLING if fenced else run.status
        if self._asked is Status.KILLING:
            return
        if wanted is Status.KILLING:
            self._asked = wanted
            if self._interruptible is not None:
                self._interruptible.cancel()
            if self._execution is not None:
                await self._execution.kill()
        elif (
            wanted is Status.STOPPING
            and self._execution is not None
            and run.grace_seconds < self._grace_asked
        ):
            self._asked = self._status = wanted
            self._grace_asked = run.grace_seconds
            await self._execution.stop(run.grace_seconds)

    async def _to_the_end(self, work: Coroutine[None, None, None]) -> None:
        """Whatever happens to the work, the run comes to an end and the agent goes on."""
        try:
            try:
                await self._with_its_ending(work)
            except Refused as refusal:
                await self._give_up(refusal)
            except Exception as error:
                await self._fault(error)
        except Exception:
            _log.exception("run %s, attempt %s", self.number, self.attempt)
        finally:
            self.claimed.set()
            self.done.set()

    async def _with_its_ending(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except ExecutionLost:
            await self._lost()
        except WorldError as error:
            await self._end_without_world(error)

    # From claim to end

    async def _claim_and_begin(self, ticket: Ticket) -> None:
        run, token = await self._claim(ticket)
        self.claimed.set()
        if run is None:
            return
        await self.look()
        try:
            execution = await self._unless_killed(self._make_world(run, token))
        except WorldError:
            if not self._workshop.machine.room.lack():
                raise
            await self._apply(Requeue(self.attempt, _DISK_FULL))
            return
        if execution is None:
            await self._apply(End(self.attempt))
            return
        self._execution = execution
        await self._execute(execution)

    async def _go_on(self, run: Run, adopted: Adopted) -> None:
        execution = adopted.execution
        _, self._raw_start = await self._until_available(
            lambda: self._workshop.store.log_state(self.number)
        )
        if run.status in BEFORE_RUNNING:
            if not adopted.held:
                raise ExecutionLost(f"No helper holds run {run.id}.")
            await self._execute(execution)
            return
        await self.look()
        if not adopted.started:
            await execution.start()
        await self._see_to_the_end(run, execution)

    async def _claim(self, ticket: Ticket) -> tuple[Run | None, str | None]:
        run = await self._until_available(lambda: self._workshop.store.get(ticket.run))
        if run is not None and await self._until_available(partial(self._was_called_off, run)):
            await self._apply(Stop(Cause.WORKFLOW))
            return None, None
        token = None
        if run is not None and run.spec.master:
            token = make_master_token(ticket.run, ticket.attempt)
        claim = Claim(
            attempt=ticket.attempt,
            agent=self._workshop.agent,
            slot=self._slot,
            claim=self._workshop.clock.fresh_id(),
            token_hash=token_hash(token) if token else None,
        )
        try:
            run = await self._apply(claim)
        except UnknownRun:
            _log.warning("dropped a ticket for run %s, which does not exist", ticket.run)
            return None, None
        except Refused:
            return None, None
        return run, token

    async def _was_called_off(self, run: Run) -> bool:
        """Whether its workflow was ended while it was launched, and its launcher died over it."""
        store = self._workshop.store
        if run.spec.master or run.workflow is None:
            return False
        workflow = await store.get_workflow(run.workflow)
        master = await store.get(workflow.managing_run) if workflow is not None else None
        if master is None:
            return False
        return master.stop_requested or master.status in (Status.KILLING, Status.KILLED)

    async def _unless_killed(self, work: Coroutine[None, None, T]) -> T | None:
        """The work's result, or None when the run was killed meanwhile."""
        result = None
        with anyio.CancelScope() as self._interruptible:
            if self._asked is Status.KILLING:
                self._interruptible.cancel()
            result = await work
        self._interruptible = None
        return result

    async def _make_world(self, run: Run, token: str | None) -> Execution:
        try:
            return await self._workshop.executor.prepare(await self._job(run, token))
        except (OSError, ValueError, KeyError, RuntimeError, StoreUnavailable) as error:
            raise WorldError(
                f"The run's world could not be made: {error}",
                mount=self._status is Status.MOUNTING,
            ) from error

    async def _job(self, run: Run, token: str | None) -> Job:
        shop = self._workshop
        spec = run.spec
        code = None
        if spec.snapshot is not None:
            code = str(await shop.machine.code(spec.snapshot))
        mounts = []
        if spec.mounts:
            await self._advance(Status.MOUNTING)
            for mount in spec.mounts:
                source = await shop.machine.content(mount.tree, mount.path)
                mounts.append(WorldMount(str(source), mount.target))
        values = shop.sealer.open(spec.environment_vars)
        return Job(
            run=run.id,
            attempt=run.attempt,
            slot=self._slot,
            command=spec.command,
            cwd=spec.cwd,
            environment=run_environment(run, values, shop.gateway_url, token),
            code=code,
            mounts=tuple(mounts),
        )

    async def _execute(self, execution: Execution) -> None:
        """Store `running`, then start: a command that was started is known to have been."""

        async def store_and_start() -> Run:
            with anyio.CancelScope(shield=True):
                running = Advance(self.attempt, Status.RUNNING)
                run = (await self._workshop.outbox.apply(self.number, running)).run
                self._status = Status.RUNNING
                await execution.start()
            return run

        run = await self._until_available(store_and_start)
        await self._see_to_the_end(run, execution)

    async def _see_to_the_end(self, run: Run, execution: Execution) -> None:
        await self.look()
        self._ended = ended = await self._follow(execution)
        if await self._unless_killed(self._save(run, execution, ended)) is None:
            await self._apply(End(self.attempt, user_exit_code=_own_code(ended)))
        await execution.discard()

    async def _follow(self, execution: Execution) -> Exit:
        """Carry the command's output into the log until it has ended and all of it is there."""
        if self._status in (Status.SAVING, Status.PUSHING):
            return await execution.ended()
        raw = self._workshop.machine.output(execution, self._raw_start)
        outcome: Exit | ExecutionLost
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._append_output, raw)
            try:
                outcome = await execution.ended()
            except ExecutionLost as lost:
                outcome = lost
            raw.finish()
        if isinstance(outcome, ExecutionLost):
            raise outcome
        return outcome

    async def _append_output(self, raw: Output) -> None:
        """A fault here is told, and the command goes on."""
        try:
            async for pieces in raw.batches():
                at = self._workshop.clock.now()
                entries = [
                    LogEntry(
                        status=self._status,
                        log=piece.text,
                        at=at,
                        raw_end=piece.raw_end,
                        continued=piece.continued,
                    )
                    for piece in pieces
                ]
                await self._append(entries)
                if pieces[-1].raw_end > LOG_BYTES:
                    await self._stop_talking()
                    return
        except OSError as error:
            _log.warning("run %s: its output cannot be read: %s", self.number, error)

    async def _stop_talking(self) -> None:
        """The log is full: the run is stopped, and what it says from now on is lost."""
        reason = f"The limit of {LOG_BYTES >> 30} GiB of log is reached."
        await self._apply(Stop(Cause.LOG, reason))
        await self.look()

    async def _append(self, entries: Sequence[LogEntry]) -> None:
        await self._until_available(lambda: self._workshop.outbox.append(self.number, entries))

    async def _save(self, run: Run, execution: Execution, ended: Exit) -> Run:
        """Save outputs and end; again with every heartbeat while the machine is exhausted."""
        while True:
            try:
                return await self._save_once(run, execution, ended)
            except (OSError, RuntimeError, StoreUnavailable) as error:
                if not _is_exhausted(error):
                    raise
                _log.warning("run %s: its outputs cannot be saved yet: %s", self.number, error)
                await self._workshop.machine.room.next_look()

    async def _save_once(self, run: Run, execution: Execution, ended: Exit) -> Run:
        """A run without outputs ends in one step. Its exit code is never lost."""
        end = End(self.attempt, user_exit_code=ended.code)
        if ended.out_of_memory:
            end = replace(end, cause=Cause.OUT_OF_MEMORY, reason=_OUT_OF_MEMORY)
        pushing = Advance(self.attempt, Status.PUSHING)
        try:
            targets = [mount.target for mount in run.spec.mounts]
            found = await self._workshop.machine.scan(execution, run.spec.snapshot, targets)
            if not found:
                told = (_SCANNING, *found.notes, _NOTHING)
                return await self._apply(Advance(self.attempt, Status.SAVING, told), pushing, end)
            told = (_SCANNING, *found.notes)
            self._status = (await self._apply(Advance(self.attempt, Status.SAVING, told))).status
            tree_id, tree = await self._store_outputs(found)
        except (OSError, ValueError, StoreUnavailable) as error:
            if _is_exhausted(error):
                raise
            return await self._apply(
                Advance(self.attempt, Status.SAVING),
                replace(
                    end,
                    status=Status.FAILED,
                    cause=Cause.OUTPUTS,
                    reason=f"The outputs could not be saved: {error}",
                ),
            )
        return await self._apply(
            pushing,
            replace(
                end,
                outputs=tree_id,
                outputs_files=len(tree.entries),
                outputs_bytes=tree.size,
            ),
        )

    async def _store_outputs(self, found: Scan) -> tuple[str, Tree]:
        async def say(texts: Sequence[str]) -> None:
            at = self._workshop.clock.now()
            await self._append([LogEntry(status=self._status, log=text, at=at) for text in texts])

        shop = self._workshop
        tree = await shop.machine.save(found, say)
        tree_id, data = encode_tree(tree)
        await shop.machine.room.spend(lambda: shop.artifacts.put_bytes(data), say)
        return tree_id, tree

    # Other ends

    async def _lost(self) -> None:
        """Nobody can tell how the command ended, or whether it did anything."""
        run = await self._until_available(lambda: self._workshop.store.get(self.number))
        if run is not None and not run.is_final and run.attempt == self.attempt:
            await self._apply(command_for_lost(run, self._loss))
        await self._discard()

    async def _give_up(self, refusal: Refused) -> None:
        """The run is being killed, or is somebody else's by now."""
        run = refusal.run
        if run.status is Status.KILLING and run.attempt == self.attempt:
            await self._kill()
            await self._apply(End(self.attempt))
        elif self._ended is not None:
            with suppress(Refused):
                await self._apply(End(self.attempt, user_exit_code=_own_code(self._ended)))
        await self._discard()

    async def _end_without_world(self, error: WorldError) -> None:
        await self._apply(
            End(
                self.attempt,
                status=Status.MOUNT_FAILED if error.mount else Status.FAILED,
                cause=Cause.MOUNT if error.mount else Cause.WORLD,
                reason=str(error),
            )
        )
        await self._discard()

    async def _fault(self, error: Exception) -> None:
        """A fault of ours must not leave the run without an end."""
        _log.exception("run %s, attempt %s", self.number, self.attempt, exc_info=error)
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        await self._kill()
        try:
            await self._apply(
                End(
                    self.attempt,
                    status=Status.FAILED,
                    user_exit_code=self._ended.code if self._ended else None,
                    cause=Cause.WORLD,
                    reason=f"An internal error of spellq: {error!r}",
                )
            )
        except Refused as refusal:
            await self._give_up(refusal)
        await self._discard()

    async def _kill(self) -> None:
        if self._execution is not None:
            await self._execution.kill()

    async def _discard(self) -> None:
        if self._execution is not None:
            await self._execution.kill()
            await self._execution.discard()

    async def _advance(self, status: Status) -> Run:
        run = await self._apply(Advance(self.attempt, status))
        self._status = status
        return run

    async def _apply(self, *commands: Command) -> Run:
        committed = await self._until_available(
            lambda: self._workshop.outbox.apply(self.number, *commands)
        )
        return committed.run

    async def _until_available(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeat a step while the store is away; the command is not touched by that."""
        for seconds in chain(_RETRY_SECONDS, repeat(_RETRY_SECONDS[-1])):
            try:
                return await step()
            except StoreUnavailable as error:
                _log.warning("run %s: %s; trying again", self.number, error)
                await anyio.sleep(seconds)
        raise AssertionError("there is always a next try")


def _is_exhausted(error: BaseException | None) -> bool:
    """Whether threads, descriptors or memory lack for now: no fault of the run's or of the disk."""
    if isinstance(error, StoreUnavailable):
        error = error.__cause__
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    # Python has no type of its own for a thread that cannot be started.
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def _own_code(ended: Exit) -> int | None:
    """The exit code, unless a kill ended the command; a run that was given up keeps it."""
    return None if ended.signal == SIGKILL else ended.code
