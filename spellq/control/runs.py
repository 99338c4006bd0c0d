"""Commands on runs that exist: look, stop, kill, label; one run or a whole workflow."""

from spellq.control.errors import NotFound
from spellq.lifecycle import Command, Kill, Label, Refused, Stop
from spellq.outbox import Outbox
from spellq.ports import Bus, RunQuery, Store, UnknownRun
from spellq.runs import Cause, Run, Workflow

_EVERY: int = 1_000_000


class Runs:
    """The commands a caller may give. `owner` None is an admin, who sees everybody's."""

    def __init__(self, store: Store, outbox: Outbox, bus: Bus) -> None:
        self._store = store
        self._outbox = outbox
        self._bus = bus

    async def get(self, number: int, owner: str | None) -> Run:
        """
        Raises:
            NotFound: no such run, or another owner's.
        """
        run = await self._store.get(number)
        if run is None or (owner is not None and run.owner != owner):
            raise NotFound(str(UnknownRun(number)))
        return run

    async def stop(self, number: int, owner: str | None) -> tuple[Run, bool]:
        """Ask for the end and keep outputs; the run, and whether anything changed."""
        await self.get(number, owner)
        return await self._want(number, Stop())

    async def kill(self, number: int, owner: str | None) -> tuple[Run, bool]:
        """End it at once; outputs are lost."""
        await self.get(number, owner)
        return await self._want(number, Kill())

    async def label(
        self, number: int, owner: str | None, add: tuple[str, ...], remove: tuple[str, ...]
    ) -> Run:
        await self.get(number, owner)
        return (await self._outbox.apply(number, Label(add, remove))).run

    async def workflow(self, number: int, owner: str | None) -> tuple[Workflow, Run, list[Run]]:
        """The workflow, its master run, and its worker runs, oldest first.

        Raises:
            NotFound: no such workflow, or another owner's.
        """
        workflow = await self._store.get_workflow(number)
        if workflow is None or (owner is not None and workflow.owner != owner):
            raise NotFound(f"There is no workflow {number}.")
        runs = await self._store.find(RunQuery(limit=_EVERY, workflow=number))
        master = await self.get(workflow.managing_run, owner)
        return workflow, master, [run for run in reversed(runs) if run.id != master.id]

    async def end_workflow(self, number: int, owner: str | None, *, kill: bool) -> None:
        """Stop or kill the master run first, then every worker run that has not ended."""
        _, master, runs = await self.workflow(number, owner)
        command = Kill(Cause.WORKFLOW) if kill else Stop(Cause.WORKFLOW)
        for run in (master, *runs):
            if not run.is_final:
                await self._want(run.id, command)
        _, _, later = await self.workflow(number, owner)
        for run in later[len(runs) :]:
            await self._want(run.id, command)

    async def _want(self, number: int, command: Command) -> tuple[Run, bool]:
        try:
            committed = await self._outbox.apply(number, command)
        except Refused as refusal:
            return refusal.run, False
        run = committed.run
        if committed.logged and run.agent is not None and not run.is_final:
            await self._store.nudge(run.agent)
            await self._bus.hint(run.agent)
        return run, bool(committed.logged)
