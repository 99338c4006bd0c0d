"""Commands on runs that exist: look, stop, kill, label; one run or a whole workflow."""

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from spellq.control.errors import Conflict, NotFound, Rejected
from spellq.lifecycle import Command, Kill, Label, Refused, Stop
from spellq.outbox import Outbox
from spellq.ports import AgentInfo, RunQuery, Store, UnknownRun
from spellq.runs import MAX_NUMBER, WAITING, Cause, Run, Status, Workflow

MAX_LABELS: Final = 100
MAX_LABEL_CHARACTERS: Final = 200
MAX_GRACE_SECONDS: Final = 86_400


class Runs:
    """The commands a caller may give. `owner` None is an admin, who sees everybody's."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store = store
        self._outbox = outbox

    async def get(self, number: int, owner: str | None) -> Run:
        """
        Raises:
            NotFound: no such run, or another owner's.
        """
        run = await self._store.get(number) if 0 < number <= MAX_NUMBER else None
        if run is None or (owner is not None and run.owner != owner):
            raise NotFound(str(UnknownRun(number)))
        return run

    async def explained(self, runs: Sequence[Run]) -> list[Run]:
        """The runs; the reason of each that waits is what it waits for now."""
        if all(run.status not in WAITING for run in runs):
            return list(runs)
        agents = await self._store.agents()
        return [_explained(run, agents) for run in runs]

    async def live(self, owner: str | None) -> list[Run]:
        """Every run that has not ended, newest first."""
        return await self._store.find(RunQuery(limit=None, owner=owner, live=True))

    async def stop(
        self, number: int, owner: str | None, grace_seconds: float | None = None
    ) -> tuple[Run, bool]:
        """Ask for the end and keep outputs; the run, and whether anything changed.

        `grace_seconds` is in place of the run's own grace, and may shorten that of a stop before.

        Raises:
            NotFound: no such run, or another owner's.
            Rejected: a grace that cannot be.
        """
        await self.get(number, owner)
        if grace_seconds is not None:
            check_grace(grace_seconds)
        return await self._want(number, Stop(grace_seconds=grace_seconds))

    async def kill(self, number: int, owner: str | None) -> tuple[Run, bool]:
        """End it at once; outputs are lost."""
        await self.get(number, owner)
        return await self._want(number, Kill())

    async def label(
        self, number: int, owner: str | None, add: tuple[str, ...], remove: tuple[str, ...]
    ) -> Run:
        """
        Raises:
            Rejected: a label that cannot be, or too many of them.
        """
        run = await self.get(number, owner)
        check_labels({*add, *(label for label in run.labels if label not in remove)})
        return (await self._outbox.apply(number, Label(add, remove))).run

    async def workflow(self, number: int, owner: str | None) -> tuple[Workflow, Run, list[Run]]:
        """The workflow, its master run, and its worker runs, oldest first.

        Raises:
            NotFound: no such workflow, or another owner's.
        """
        workflow, master = await self._workflow(number, owner)
        return workflow, master, await self._workers(workflow)

    async def stop_workflow(
        self, number: int, owner: str | None, grace_seconds: float | None = None
    ) -> None:
        """Stop the master run and every worker run that has not ended; the grace as in `stop`.

        Raises:
            NotFound: no such workflow, or another owner's.
            Rejected: a grace that cannot be.
        """
        if grace_seconds is not None:
            check_grace(grace_seconds)
        await self._end_workflow(number, owner, Stop(Cause.WORKFLOW, grace_seconds=grace_seconds))

    async def kill_workflow(self, number: int, owner: str | None) -> None:
        """Kill the master run and every worker run that has not ended.

        Raises:
            NotFound: no such workflow, or another owner's.
        """
        await self._end_workflow(number, owner, Kill(Cause.WORKFLOW))

    async def _end_workflow(self, number: int, owner: str | None, command: Stop | Kill) -> None:
        """The master run first.

        None that is launched meanwhile stays behind: the master's end is stored before the
        workers are listed, and whoever launches looks at the master once more after its runs are
        stored (`end_late`). So a run is either in the list, or its launcher sees the end; should
        the launcher die over it, the agent that is offered the run does.
        """
        workflow, master = await self._workflow(number, owner)
        if not master.is_final:
            await self._want(master.id, command)
        for run in await self._workers(workflow):
            if not run.is_final:
                await self._want(run.id, command)

    async def check_open(self, number: int, owner: str | None) -> None:
        """Whether runs may be launched into the workflow.

        Raises:
            NotFound: no such workflow, or another owner's.
            Conflict: its master run has ended, or is about to.
        """
        _, master = await self._workflow(number, owner)
        if _is_over(master):
            raise Conflict(
                f"Workflow {number} takes no more runs: its managing run {master.id} is "
                f"{master.status.replace('_', ' ')}. Launch without it, or in a new workflow."
            )

    async def end_late(self, number: int, made: Iterable[Run]) -> None:
        """End the runs just made together if a workflow of theirs came to its end meanwhile.

        Raises:
            Conflict: it did.
        """
        try:
            await self.check_open(number, None)
        except Conflict:
            _, master = await self._workflow(number, None)
            killed = master.status in (Status.KILLING, Status.KILLED)
            for run in made:
                await self._want(run.id, Kill(Cause.WORKFLOW) if killed else Stop(Cause.WORKFLOW))
            raise

    async def _workflow(self, number: int, owner: str | None) -> tuple[Workflow, Run]:
        known = 0 < number <= MAX_NUMBER
        workflow = await self._store.get_workflow(number) if known else None
        if workflow is None or (owner is not None and workflow.owner != owner):
            raise NotFound(f"There is no workflow {number}.")
        return workflow, await self.get(workflow.managing_run, None)

    async def _workers(self, workflow: Workflow) -> list[Run]:
        runs = await self._store.find(RunQuery(limit=None, workflow=workflow.id))
        return [run for run in reversed(runs) if run.id != workflow.managing_run]

    async def _want(self, number: int, command: Command) -> tuple[Run, bool]:
        try:
            committed = await self._outbox.apply(number, command)
        except Refused as refusal:
            return refusal.run, False
        return committed.run, bool(committed.logged)


def _explained(run: Run, agents: Sequence[AgentInfo]) -> Run:
    """Where all who serve its queue claim nothing, it waits for what the first of them lacks."""
    serving = [agent for agent in agents if agent.slots.get(run.spec.queue)]
    if run.status not in WAITING or not serving or not all(agent.lack for agent in serving):
        return run
    return replace(run, reason=f"Waiting for {serving[0].lack}.")


def _is_over(master: Run) -> bool:
    """Whether a master run has ended or was asked to; what it still saves changes nothing."""
    return master.is_final or master.stop_requested or master.status is Status.KILLING


def check_grace(seconds: float) -> None:
    """
    Raises:
        Rejected: no such grace can be.
    """
    if not 0 <= seconds <= MAX_GRACE_SECONDS:
        raise Rejected(f"grace is {seconds:g} seconds; it has to be 0 to {MAX_GRACE_SECONDS}.")


def check_labels(labels: Iterable[str]) -> None:
    """
    Raises:
        Rejected: a label that cannot be, or too many of them.
    """
    several = tuple(labels)
    for label in several:
        if not label.strip():
            raise Rejected("A label is empty.")
        if len(label) > MAX_LABEL_CHARACTERS:
            raise Rejected(
                f"The label {label[:40]!r}… has {len(label)} characters; "
                f"the limit is {MAX_LABEL_CHARACTERS}."
            )
    if len(several) > MAX_LABELS:
        raise Rejected(f"A run has at most {MAX_LABELS} labels, not {len(several)}.")
