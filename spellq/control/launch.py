"""Launching: from a request to a run that waits for a machine, checked before anything is made."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final

import anyio

from spellq.control.errors import Rejected
from spellq.control.outputs import Saved, SavedOutputs
from spellq.control.runs import Runs, check_grace, check_labels
from spellq.outbox import Outbox
from spellq.ports import ArtifactStore, Clock, NewRun, Store
from spellq.resources import InvalidResourceError, mount_target, working_directory
from spellq.runs import MASTER_QUEUE, Mount, Run, RunSpec, Workflow, machine_type_key
from spellq.seal import Sealer
from spellq.wire import RunRequest

MAX_BATCH: Final = 500
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
"""Linux takes no longer argument or variable (MAX_ARG_STRLEN, which counts the closing NUL)."""

MAX_ENVIRONMENT_BYTES: Final = 1024 * 1024
MAX_DESCRIPTION_CHARACTERS: Final = 10_000
MAX_MOUNTS: Final = 1_000
HEARD_AGAIN_SECONDS: Final = 3.0
"""An agent that lives is heard within that time; it renews its lease every 2 s."""

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Launcher:
    """Checks requests and creates runs from them; all of a batch or (an error) none."""

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        artifacts: ArtifactStore,
        sealer: Sealer,
        clock: Clock,
        runs: Runs,
        outputs: SavedOutputs,
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._artifacts = artifacts
        self._sealer = sealer
        self._clock = clock
        self._runs = runs
        self._outputs = outputs

    async def launch(
        self, requests: Sequence[RunRequest], owner: str, command_id: str, *, sees: str | None
    ) -> list[Run]:
        """Create worker runs. A repeat with the same command id gets the same runs.

        `sees` is the owner whose workflows and outputs the caller may name, None everybody's.

        Raises:
            Rejected: what is wrong with the first bad request.
        """
        if not 0 < len(requests) <= MAX_BATCH:
            raise Rejected(f"A batch holds 1 to {MAX_BATCH} runs, not {len(requests)}.")
        specs = [await self._spec(request, sees) for request in requests]
        workflows = {request.workflow_id for request in requests if request.workflow_id is not None}
        for workflow in workflows:
            await self._runs.check_open(workflow, sees)
        numbers = await self._store.allot("run", len(requests), command_id)
        made = await self._outbox.create(
            [
                NewRun(
                    number=number,
                    owner=owner,
                    spec=spec,
                    workflow=request.workflow_id,
                    labels=request.labels,
                )
                for number, spec, request in zip(numbers, specs, requests, strict=True)
            ]
        )
        for workflow in workflows:
            await self._runs.end_late(workflow, made)
        return made

    async def launch_workflow(
        self, request: RunRequest, owner: str, command_id: str, *, sees: str | None
    ) -> tuple[Workflow, Run]:
        """Create a workflow and its master run. A repeat gets the same ones.

        Raises:
            Rejected: what is wrong with the request.
        """
        spec = await self._spec(request, sees, master=True)
        (number,) = await self._store.allot("run", 1, command_id)
        (workflow_number,) = await self._store.allot("workflow", 1, command_id)
        workflow = Workflow(
            id=workflow_number, owner=owner, managing_run=number, created_at=self._clock.now()
        )
        await self._store.create_workflow(workflow)
        workflow = await self._store.get_workflow(workflow.id) or workflow
        new = NewRun(
            number=number, owner=owner, spec=spec, workflow=workflow.id, labels=request.labels
        )
        (run,) = await self._outbox.create([new])
        return workflow, run

    async def _spec(
        self, request: RunRequest, sees: str | None, *, master: bool = False
    ) -> RunSpec:
        _check_text(request)
        if master:
            await self._check_masters_are_served()
        else:
            await self._check_machine_type(request.machine_type)
        if request.snapshot is not None and await self._artifacts.missing([request.snapshot]):
            raise Rejected(f"There is no snapshot {request.snapshot!r}; upload it first.")
        try:
            cwd = working_directory(request.cwd)
        except InvalidResourceError as error:
            raise Rejected(str(error)) from error
        return RunSpec(
            command=request.command,
            machine_type=request.machine_type,
            description=request.description,
            environment_vars=self._sealer.seal(request.environment_vars),
            mounts=await self._mounts(request.attached_resources, sees),
            cwd=cwd,
            snapshot=request.snapshot,
            git_commit_hash=request.git_commit_hash,
            repository=request.repository,
            timeout_minutes=request.timeout_minutes,
            grace_seconds=request.grace_seconds,
            master=master,
        )

    async def _check_machine_type(self, name: str) -> None:
        key = machine_type_key(name)
        if key == MASTER_QUEUE:
            raise Rejected(f"{name!r} is no machine type: those slots are for master runs.")
        served = await self._served()
        known = sorted(served.keys() - {MASTER_QUEUE})
        if key in known:
            return
        near = get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        types = [*(f"{queue}={served[queue]}" for queue in known), key[:63] or "cpu"]
        raise Rejected(
            f"Unknown machine type {name[:80]!r}.{hint} Served here: {', '.join(known) or 'none'}. "
            f"Serve it with: spellq up --machine-types {','.join(types)}"
        )

    async def _check_masters_are_served(self) -> None:
        if MASTER_QUEUE not in await self._served():
            raise Rejected(
                "No slots for master runs are served here. Have some with SPELLQ_MASTER_SLOTS=16, "
                "then: spellq down; spellq up"
            )

    async def _served(self) -> Counter[str]:
        """The queues that have slots, and how many.

        Where nobody at all is heard, agents may just have been stopped for a while, as this process
        may: who lives is heard again within a heartbeat.
        """
        agents = await self._store.agents()
        if not agents:
            await anyio.sleep(HEARD_AGAIN_SECONDS)
            agents = await self._store.agents()
        return +sum((Counter(agent.slots) for agent in agents), Counter())

    async def _mounts(self, resources: dict[str, str], sees: str | None) -> tuple[Mount, ...]:
        if len(resources) > MAX_MOUNTS:
            raise Rejected(f"{len(resources)} mounts for one run; the limit is {MAX_MOUNTS}.")
        mounts: dict[str, Mount] = {}
        for resource, mount_point in resources.items():
            target = _target(resource, mount_point)
            if target in mounts:
                raise Rejected(
                    f"Both {mounts[target].resource!r} and {resource!r} would be mounted at "
                    f"{target}. Give each a place of its own."
                )
            saved = await self._find(resource, sees)
            mounts[target] = Mount(
                resource=resource.rstrip("/"), target=target, tree=saved.tree_id, path=saved.path
            )
        return tuple(mounts[target] for target in sorted(mounts))

    async def _find(self, resource: str, sees: str | None) -> Saved:
        try:
            return await self._outputs.find(resource, sees)
        except Rejected as error:
            raise type(error)(f"Cannot mount resource {resource!r}: {error}") from error


def _target(resource: str, mount_point: str) -> str:
    try:
        return mount_target(resource, mount_point)
    except InvalidResourceError as error:
        raise Rejected(str(error)) from error


def _check_text(request: RunRequest) -> None:
    """Refuse what no run could be made of, whatever else is right."""
    if not request.command.strip():
        raise Rejected("The command is empty. Give the shell command to run, for example: echo hi")
    if len(request.command.encode(errors="replace")) > MAX_ARGUMENT_BYTES:
        raise Rejected(
            f"The command is longer than {MAX_ARGUMENT_BYTES} bytes. Put it into a script."
        )
    for what, text in (("command", request.command), ("description", request.description)):
        if "\0" in text:
            raise Rejected(f"The {what} holds a NUL character.")
    if len(request.description) > MAX_DESCRIPTION_CHARACTERS:
        raise Rejected(
            f"The description has {len(request.description)} characters; "
            f"the limit is {MAX_DESCRIPTION_CHARACTERS}."
        )
    _check_environment(request.environment_vars)
    check_labels(request.labels)
    timeout = request.timeout_minutes
    if timeout is not None and not 0 < timeout <= 525_600:
        raise Rejected(f"timeout is {timeout:g} minutes; it has to be above 0, a year at most.")
    check_grace(request.grace_seconds)


def _check_environment(variables: Mapping[str, str]) -> None:
    total = 0
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            raise Rejected(
                f"{name[:200]!r} cannot name an environment variable: use letters, digits and _."
            )
        if "\0" in value:
            raise Rejected(f"The value of the environment variable {name} holds a NUL character.")
        if name.startswith(("SPELL_", "SPELLQ_")):
            raise Rejected(f"{name} belongs to the runtime. Choose another name.")
        size = len(name) + 1 + len(value.encode(errors="replace"))
        if size > MAX_ARGUMENT_BYTES:
            raise Rejected(
                f"The environment variable {name[:200]} has {size} bytes with its name; the limit "
                f"is {MAX_ARGUMENT_BYTES}. Put the value into a file."
            )
        total += size + 1
    if total > MAX_ENVIRONMENT_BYTES:
        raise Rejected(
            f"The environment variables have {total} bytes in all; "
            f"the limit is {MAX_ENVIRONMENT_BYTES}. Put them into files."
        )
