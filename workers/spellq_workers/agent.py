"""The agent: takes tickets while it has free slots, and sees each claimed run to its end."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus
from msgspec import Struct
from msgspec.structs import replace

from spellq.lifecycle import End, Find, Refused
from spellq.outbox import Outbox
from spellq.ports import (
    LEASE_SECONDS,
    Adopted,
    AgentInfo,
    ArtifactStore,
    Bus,
    Clock,
    Execution,
    Executor,
    RunQuery,
    Store,
    StoreUnavailable,
    Ticket,
    UnknownRun,
)
from spellq.runs import MASTER_QUEUE, Cause, Run
from spellq.seal import Sealer
from spellq.version import __version__
from spellq_workers.attempt import Attempt, Workshop, command_for_lost
from spellq_workers.machine import Incarnation, Machine

HEARTBEAT_SECONDS: Final = 2.0
KEEP_TICKET_SECONDS: Final = 5.0
"""How long a claimed run's ticket stays unacknowledged, which keeps the next one away."""

_log = logging.getLogger(__name__)


class _NoRoom(Exception):
    """The machine's disk has no room for another run."""


class AgentSettings(Struct, frozen=True, kw_only=True):
    """What an agent serves."""

    name: str
    slots: dict[str, int]
    master_slots: int
    gateway_url: str


class Agent:
    """One incarnation. Its commands outlive it; the next incarnation finds them again."""

    def __init__(
        self,
        settings: AgentSettings,
        store: Store,
        bus: Bus,
        outbox: Outbox,
        artifacts: ArtifactStore,
        executor: Executor,
        machine: Machine,
        sealer: Sealer,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._store = store
        self._bus = bus
        self._outbox = outbox
        self._executor = executor
        self._machine = machine
        self.info = AgentInfo(
            id=f"{settings.name}.{clock.fresh_id()[:12]}",
            name=settings.name,
            slots={**settings.slots, MASTER_QUEUE: settings.master_slots},
            version=__version__,
        )
        self._attempts: list[Attempt] = []
        self._told = anyio.Event()
        self._workshop = Workshop(
            agent=self.info.id,
            store=store,
            outbox=outbox,
            artifacts=artifacts,
            executor=executor,
            machine=machine,
            sealer=sealer,
            clock=clock,
            gateway_url=settings.gateway_url,
        )

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once every earlier run was found or given up."""
        before = await self._machine.recall()
        own = Incarnation(self.info.id, self._machine.boot_id)
        await self._machine.remember((*before, own))
        async with anyio.create_task_group() as tasks:
            self._see_what_lacks()
            # Finding many runs takes its time: who owns them is heard of before.
            counter = await self._store.renew(self.info, LEASE_SECONDS)
            tasks.start_soon(self._renew, counter)
            adopted = await self._adopt(before, tasks)
            await self._machine.remember((own,))
            tasks.start_soon(self._listen_for_hints)
            tasks.start_soon(self._look_when_told, tasks)
            for queue, count in self.info.slots.items():
                for place in range(count):
                    slot = f"{queue}-{place}"
                    tasks.start_soon(self._serve, slot, queue, adopted.pop(slot, None), tasks)
            task_status.started()

    # Slots

    async def _serve(
        self, slot: str, queue: str, adopted: Attempt | None, tasks: TaskGroup
    ) -> None:
        """Take tickets for one slot, one at a time.

        A short run's ticket is kept until the run has ended. After five seconds the slot stops
        consuming, then acknowledges, and consumes again when it is free: so no ticket waits
        behind a busy slot, and no delivery is held for longer.
        """
        if adopted is not None:
            await adopted.done.wait()
        while True:
            await self._machine.room.wait()
            with suppress(_NoRoom):
                await self._serve_while_there_is_room(slot, queue, tasks)

    async def _serve_while_there_is_room(self, slot: str, queue: str, tasks: TaskGroup) -> None:
        """Until a run has taken long.

        Raises:
            _NoRoom: the disk has run short; the ticket that came is offered again.
        """
        async with self._bus.consume(queue) as source:
            while True:
                delivery = await source.take()
                if self._machine.room.lack():
                    raise _NoRoom
                ticket = delivery.ticket
                attempt = Attempt(self._workshop, slot, ticket.run, ticket.attempt)
                tasks.start_soon(self._carry_out, attempt, ticket)
                await attempt.claimed.wait()
                with anyio.move_on_after(KEEP_TICKET_SECONDS):
                    await attempt.done.wait()
                if not attempt.done.is_set():
                    break
                await delivery.ack()
        await delivery.ack()
        await attempt.done.wait()

    async def _carry_out(self, attempt: Attempt, ticket: Ticket) -> None:
        with self._holding(attempt):
            await attempt.carry_out(ticket)

    async def _resume(self, attempt: Attempt, run: Run, adopted: Adopted) -> None:
        with self._holding(attempt):
            await attempt.resume(run, adopted)

    @contextmanager
    def _holding(self, attempt: Attempt) -> Iterator[None]:
        """While an attempt is under way, it is looked after."""
        self._attempts.append(attempt)
        try:
            yield
        finally:
            self._attempts.remove(attempt)

    # What is wanted of the runs

    async def _renew(self, counter: int) -> None:
        """Keep the lease; the answer's counter tells when to look at the runs again."""
        while True:
            await anyio.sleep(HEARTBEAT_SECONDS)
            self._see_what_lacks()
            try:
                latest = await self._store.renew(self.info, LEASE_SECONDS)
            except StoreUnavailable as error:
                _log.warning("the lease could not be renewed: %s", error)
                continue
            if latest != counter:
                counter = latest
                self._told.set()

    def _see_what_lacks(self) -> None:
        self._machine.look()
        lack = self._machine.room.lack() or ""
        if lack and not self.info.lack:
            _log.warning("no run is claimed any more: it lacks %s", lack)
        elif self.info.lack and not lack:
            _log.info("runs are claimed again")
        self.info = replace(self.info, lack=lack)

    async def _listen_for_hints(self) -> None:
        async with self._bus.hints(self.info.id) as hints:
            async for _ in hints:
                self._told.set()

    async def _look_when_told(self, tasks: TaskGroup) -> None:
        """A run that does not let itself be asked keeps nobody else waiting, nor the lease."""
        while True:
            await self._told.wait()
            self._told = anyio.Event()
            for attempt in tuple(self._attempts):
                tasks.start_soon(self._look_at, attempt)

    async def _look_at(self, attempt: Attempt) -> None:
        try:
            await attempt.look()
        except Exception:
            _log.exception("looking at run %s", attempt.number)

    # After a restart

    async def _adopt(self, before: Sequence[Incarnation], tasks: TaskGroup) -> dict[str, Attempt]:
        """Go on with what earlier incarnations left, by slot; give up what is gone."""
        restarted = any(earlier.boot_id != self._machine.boot_id for earlier in before)
        loss = Cause.MACHINE_RESTARTED if restarted else Cause.HELPER_LOST
        attempts: dict[str, Attempt] = {}
        for adopted in await self._executor.adopt():
            execution = adopted.execution
            run = await self._found(execution)
            if run is None:
                await self._drop(adopted)
                continue
            attempt = Attempt(self._workshop, execution.slot, run.id, run.attempt, loss=loss)
            attempts[execution.slot] = attempt
            tasks.start_soon(self._resume, attempt, run, adopted)
        for earlier in before:
            for run in await self._store.find(RunQuery(limit=None, agent=earlier.agent)):
                with suppress(Refused):  # somebody else has ended it meanwhile
                    await self._outbox.apply(run.id, command_for_lost(run, loss))
        return attempts

    async def _drop(self, adopted: Adopted) -> None:
        """The run has ended without this execution, or is another attempt; a result is kept."""
        execution = adopted.execution
        if adopted.exit is not None:
            with suppress(Refused, UnknownRun):
                late = End(execution.attempt, user_exit_code=adopted.exit.code)
                await self._outbox.apply(execution.run, late)
        await execution.kill()
        await execution.discard()

    async def _found(self, execution: Execution) -> Run | None:
        """The run of an execution, ours again; None when it has ended or is another attempt."""
        try:
            found = Find(execution.attempt, self.info.id)
            return (await self._outbox.apply(execution.run, found)).run
        except (Refused, UnknownRun):
            return None
