"""What has to hold once the faults are over and everything had its time."""

import asyncio
from typing import Final

from spellq.events import BEGINNING, fold
from spellq.logs import LogEntry, status_line
from spellq.ports import EventLog, RunQuery, Store
from spellq.runs import FINAL, MASTER_QUEUE, Cause, Run, Status
from spellq.wire import RunRequest
from tests.simulation.client import OWNER, Client, Record, right_answer
from tests.simulation.installation import Installation, capacity
from tests.simulation.machine import Folder, Script
from tests.simulation.world import World

_STATUS_LINES: Final = frozenset(filter(None, map(status_line, Status)))
_PROBE_SECONDS: Final = 20.0
_PROBE_PATIENCE: Final = 100.0
_OUTBOX_PATIENCE: Final = 10.0
_SETTLING_SECONDS: Final = 30.0
"""Until then the latest duplicate is there, and who was leaving has come back."""


async def look_through(
    world: World, installation: Installation, record: Record, client: Client
) -> None:
    """Compare what the store says with what truly happened and what clients were told."""
    await asyncio.sleep(_SETTLING_SECONDS)
    world.tell("the history is looked through")
    await _probe_every_slot(world, installation, client)
    await asyncio.sleep(_OUTBOX_PATIENCE)
    store = await installation.store()
    runs = {run.id: run for run in await store.find(RunQuery(limit=None))}
    for number in record.accepted:
        if number not in runs:
            world.violated("lost", f"run {number} was accepted and is not there")
        elif not runs[number].is_final:
            world.violated("lost", f"run {number} is still {runs[number].status}")
    if len(runs) > record.asked_for:
        world.violated("faults", f"{record.asked_for} runs were asked for, {len(runs)} are there")
    truth = _Truth(installation)
    for run in runs.values():
        await _look_at_run(world, store, run, truth)
    _look_at_answers(world, record, runs)
    await _look_at_logs(world, store, record, runs, truth)
    await _look_at_the_event_log(world, await installation.log(), record)
    if await store.unpublished(0):
        world.violated("faults", "something was never published")
    for machine in installation.machines:
        for folder in machine.folders.values():
            world.violated("faults", f"the world of run {folder.name} was not taken down")
    leases = await store.agents()
    if len(leases) != len(installation.machines):
        world.violated("faults", f"{len(installation.machines)} agents hold {len(leases)} leases")
    owners = await store.owners()
    if owners and all(run.is_final for run in runs.values()):
        world.violated("faults", f"agents own runs that have ended: {owners}")


async def _probe_every_slot(world: World, installation: Installation, client: Client) -> None:
    """No slot has leaked: as many runs as there are slots run at the same time."""
    script = Script(seconds=_PROBE_SECONDS)
    for queue, count in capacity(installation.machines).items():
        began = world.loop.time()
        async with asyncio.TaskGroup() as tasks:
            for place in range(count):
                tasks.create_task(_probe(world, client, queue, script, f"{queue} {place}"))
        took = world.loop.time() - began
        if took > 1.75 * _PROBE_SECONDS:
            world.violated("faults", f"{count} slots of {queue}: the last run ended after {took} s")


async def _probe(world: World, client: Client, queue: str, script: Script, name: str) -> None:
    request = RunRequest(command=script.command())
    if queue == MASTER_QUEUE:
        _, number = await client.launch_workflow(request, f"probe {name}")
    else:
        (number,) = await client.launch([request], f"probe {name}")
    try:
        async with asyncio.timeout(_PROBE_PATIENCE):
            await client.wait(number, FINAL)
    except TimeoutError:
        world.violated("faults", f"no slot of {queue} takes run {number}")


class _Truth:
    """What the machine knows."""

    def __init__(self, installation: Installation) -> None:
        self.folders: dict[int, list[Folder]] = {}
        for machine in installation.machines:
            for folder in machine.every_folder:
                self.folders.setdefault(folder.run, []).append(folder)

    def executed(self, number: int) -> Folder | None:
        for folder in self.folders.get(number, ()):
            if folder.process is not None:
                return folder
        return None


async def _look_at_run(world: World, store: Store, run: Run, truth: _Truth) -> None:
    events = await store.history(run.id)
    if fold(events) != run:
        world.violated("faults", f"run {run.id}: its events do not fold to its state")
    folder = truth.executed(run.id)
    if run.started_at is None and folder is not None:
        world.violated("faults", f"run {run.id} was executed, and is not known to have been")
    if run.status is Status.COMPLETE and (
        folder is None or folder.exit is None or folder.exit.code != run.user_exit_code
    ):
        world.violated("faults", f"run {run.id}: its exit code {run.user_exit_code} is not true")
    if run.reason.startswith("An internal error"):
        world.violated("faults", f"run {run.id}: {run.reason}")
    if folder is not None and folder.natural and run.is_final:
        told = run.user_exit_code if run.late_exit_code is None else run.late_exit_code
        if run.status not in (Status.KILLED,) and folder.exit and told != folder.exit.code:
            world.violated(
                "lost", f"run {run.id} ended with {folder.exit.code}, and is {run.status} {told}"
            )
    lost = any(folder.lost for folder in truth.folders.get(run.id, ()))
    if run.status is Status.INTERRUPTED and run.cause is not Cause.AGENT_LOST and not lost:
        world.violated("lost", f"run {run.id} is interrupted, though its helper never died")


def _look_at_answers(world: World, record: Record, runs: dict[int, Run]) -> None:
    for number, statuses, process in record.waits_open:
        if process is None or process.alive:
            world.violated("waits_missed", f"run {number} {statuses}: never answered")
    for number, statuses, answer in record.waits:
        if number not in runs:
            continue
        right = right_answer(runs[number], statuses)
        if answer != right:
            world.violated("waits_missed", f"run {number} {statuses}: told {answer}, not {right}")


async def _look_at_logs(
    world: World, store: Store, record: Record, runs: dict[int, Run], truth: _Truth
) -> None:
    logs = {}
    for run in runs.values():
        entries = logs[run.id] = await store.read(run.id, 0, 1_000_000)
        told = [entry.log for entry in entries if entry.raw_end is not None]
        folder = truth.executed(run.id)
        said = [piece.text for piece in folder.said] if folder is not None else []
        whole = run.status in (Status.COMPLETE, Status.STOPPED, Status.FAILED)
        if told != said[: None if whole else len(told)]:
            world.violated("faults", f"run {run.id} said {said}, its log {told}")
        _look_at_status_lines(world, run, entries)
    for number, entries in record.logs:
        if number not in logs:
            continue
        run = runs[number]
        given_up = run.cause is Cause.AGENT_LOST
        given_up |= run.status is Status.KILLED and record.agents_may_be_lost
        # What a lost agent still adds comes after the end that its followers have seen.
        if entries != logs[number][: len(entries) if given_up else None]:
            world.violated("faults", f"a follower of run {number} read another log")


def _look_at_status_lines(world: World, run: Run, entries: list[LogEntry]) -> None:
    """Each step's lines are there, once and in order."""
    announced = [
        (then.version, status_line(then.status))
        for then in run.history
        if status_line(then.status) is not None
    ]
    told = [
        (entry.version, entry.log)
        for entry in entries
        if entry.status_event and entry.log in _STATUS_LINES
    ]
    if told != announced:
        world.violated("faults", f"run {run.id}: its log tells {told}, not {announced}")
    ends = [entry for entry in entries if entry.log.startswith(f"Run {run.id} ")]
    if run.is_final and len(ends) != 1:
        world.violated("faults", f"run {run.id}: its end is told {len(ends)} times")


async def _look_at_the_event_log(world: World, log: EventLog, record: Record) -> None:
    everything = [
        (logged.event.run, logged.event.version)
        for logged in await log.events_after(BEGINNING, 1_000_000)
        if logged.event.owner == OWNER
    ]
    for name, seen in record.subscriptions.items():
        missed = sorted(set(everything) - set(seen))
        if missed:
            world.violated("waits_missed", f"{name} never heard of {missed[:5]}")
        newest: dict[int, int] = {}
        for run, version in seen:
            if version > newest.get(run, 0) + 1:
                world.violated("faults", f"{name} heard of {run} v{version} too early")
            newest[run] = max(version, newest.get(run, 0))
