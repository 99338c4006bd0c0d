"""REST: runs, workflows, and who one is.

A POST that launches may carry an `Idempotency-Key`: repeated with the same key within 24 hours, it
launches nothing more and is answered with the same runs. The key belongs to its request: on
another path, with another body, or from another master run's workflow it is another key.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from litestar import get, post
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody

from spellq.control.errors import Rejected
from spellq.gateway.auth import Caller
from spellq.gateway.services import ApiRequest, Provided, Services
from spellq.ports import RunQuery
from spellq.runs import MASTER_QUEUE, MAX_NUMBER, Run, Status
from spellq.version import __version__
from spellq.wire import (
    IDEMPOTENCY_HEADER,
    LabelRequest,
    Me,
    RunBatch,
    RunPage,
    RunReply,
    RunRequest,
    RunView,
    WorkflowRequest,
    WorkflowView,
    run_view,
    workflow_view,
)

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name=IDEMPOTENCY_HEADER,
        required=False,
        description="Repeats of this very request (path and body) with the same key within "
        "24 hours launch nothing more and get the same answer.",
    ),
]

MAX_PAGE: Final = 1000


async def _command_id(request: ApiRequest, key: str | None) -> str:
    """What a repeat of this request is known by; without a key nothing repeats it."""
    caller = request.user
    body = hashlib.sha256(await request.body()).hexdigest()
    workflow = "" if caller.workflow is None else str(caller.workflow)
    key = key or secrets.token_hex(16)
    return "\0".join((caller.owner, workflow, request.url.path, key, body))


def _in_workflow(request: RunRequest, caller: Caller) -> RunRequest:
    """A master run's launches belong to its workflow unless they say otherwise."""
    if request.workflow_id is None and caller.workflow is not None:
        return msgspec.structs.replace(request, workflow_id=caller.workflow)
    return request


@post("/runs")
async def launch(
    data: JSONBody[RunRequest],
    request: ApiRequest,
    services: Provided,
    key: IdempotencyKey = None,
) -> RunView:
    """Launch a worker run."""
    caller = request.user
    (run,) = await services.launcher.launch(
        [_in_workflow(data, caller)],
        caller.owner,
        await _command_id(request, key),
        sees=caller.sees,
    )
    return await _view(services, run)


@post("/runs/batch")
async def launch_batch(
    data: JSONBody[RunBatch],
    request: ApiRequest,
    services: Provided,
    key: IdempotencyKey = None,
) -> RunPage:
    """Launch several worker runs; all of them or (an error) none. Answered in order."""
    caller = request.user
    runs = await services.launcher.launch(
        [_in_workflow(each, caller) for each in data.runs],
        caller.owner,
        await _command_id(request, key),
        sees=caller.sees,
    )
    return RunPage(await _views(services, runs))


@get("/runs")
async def list_runs(
    request: ApiRequest,
    services: Provided,
    limit: FromQuery[int] = 50,
    before: FromQuery[int | None] = None,
    label: FromQuery[list[str] | None] = None,
    workflow: FromQuery[int | None] = None,
    live: FromQuery[bool] = False,
    status: FromQuery[Status | None] = None,
) -> RunPage:
    """Runs, newest first; `label` may be repeated and asks for any of them."""
    if not 1 <= limit <= MAX_PAGE:
        raise Rejected(f"limit is {limit}; it has to be 1 to {MAX_PAGE}.")
    for name, number in (("before", before), ("workflow", workflow)):
        if number is not None and not 0 <= number <= MAX_NUMBER:
            raise Rejected(f"{name} is {number}; it has to be 0 to {MAX_NUMBER}.")
    query = RunQuery(
        limit=limit,
        before=before,
        owner=request.user.sees,
        labels=tuple(label or ()),
        workflow=workflow,
        live=live,
        status=status,
    )
    runs = await services.store.find(query)
    next_before = runs[-1].id if len(runs) == limit else None
    return RunPage(await _views(services, runs), next_before)


@get("/runs/{number:int}")
async def get_run(number: FromPath[int], request: ApiRequest, services: Provided) -> RunView:
    """One run as it is now."""
    return await _view(services, await services.runs.get(number, request.user.sees))


@post("/runs/{number:int}/stop", status_code=200)
async def stop_run(
    number: FromPath[int],
    request: ApiRequest,
    services: Provided,
    grace_seconds: FromQuery[float | None] = None,
) -> RunReply:
    """End the command, save its outputs. A run that has ended stays as it is.

    `grace_seconds` is in place of the grace the run was launched with; of several stops, the one
    whose grace ends first counts.
    """
    run, changed = await services.runs.stop(number, request.user.sees, grace_seconds)
    return RunReply(run_view(run), changed)


@post("/runs/{number:int}/kill", status_code=200)
async def kill_run(number: FromPath[int], request: ApiRequest, services: Provided) -> RunReply:
    """End the command at once; outputs are lost."""
    run, changed = await services.runs.kill(number, request.user.sees)
    return RunReply(run_view(run), changed)


@post("/runs/{number:int}/labels", status_code=200)
async def label_run(
    number: FromPath[int], data: JSONBody[LabelRequest], request: ApiRequest, services: Provided
) -> RunView:
    """Add and remove labels."""
    run = await services.runs.label(number, request.user.sees, data.add, data.remove)
    return run_view(run)


@post("/workflows")
async def launch_workflow(
    data: JSONBody[WorkflowRequest],
    request: ApiRequest,
    services: Provided,
    key: IdempotencyKey = None,
) -> WorkflowView:
    """Launch a master run in a workflow of its own."""
    caller = request.user
    workflow, run = await services.launcher.launch_workflow(
        data.run, caller.owner, await _command_id(request, key), sees=caller.sees
    )
    return workflow_view(workflow, run, [])


@get("/workflows/{number:int}")
async def get_workflow(
    number: FromPath[int], request: ApiRequest, services: Provided
) -> WorkflowView:
    """A workflow with its master run and its worker runs, oldest first."""
    return await _workflow_view(services, number, request.user.sees)


@post("/workflows/{number:int}/stop", status_code=200)
async def stop_workflow(
    number: FromPath[int],
    request: ApiRequest,
    services: Provided,
    grace_seconds: FromQuery[float | None] = None,
) -> WorkflowView:
    """Stop the master run and every worker run that has not ended; outputs are saved."""
    sees = request.user.sees
    await services.runs.stop_workflow(number, sees, grace_seconds)
    return await _workflow_view(services, number, sees)


@post("/workflows/{number:int}/kill", status_code=200)
async def kill_workflow(
    number: FromPath[int], request: ApiRequest, services: Provided
) -> WorkflowView:
    """Kill the master run and every worker run that has not ended; outputs are lost."""
    sees = request.user.sees
    await services.runs.kill_workflow(number, sees)
    return await _workflow_view(services, number, sees)


async def _view(services: Services, run: Run) -> RunView:
    (view,) = await _views(services, [run])
    return view


async def _views(services: Services, runs: Sequence[Run]) -> list[RunView]:
    return [run_view(run) for run in await services.runs.explained(runs)]


async def _workflow_view(services: Services, number: int, sees: str | None) -> WorkflowView:
    workflow, managing_run, worker_runs = await services.runs.workflow(number, sees)
    master, *workers = await services.runs.explained([managing_run, *worker_runs])
    return workflow_view(workflow, master, workers)


@get("/me")
async def me(request: ApiRequest, services: Provided) -> Me:
    """Who the token is, and what it talks to."""
    slots: dict[str, int] = {}
    for agent in await services.store.agents():
        for kind, count in agent.slots.items():
            if kind != MASTER_QUEUE:
                slots[kind] = slots.get(kind, 0) + count
    return Me(
        owner=request.user.owner,
        scope=request.user.scope,
        version=__version__,
        machine_types=slots,
        live_runs=len(await services.runs.live(request.user.sees)),
    )


HANDLERS = [
    launch,
    launch_batch,
    list_runs,
    get_run,
    stop_run,
    kill_run,
    label_run,
    launch_workflow,
    get_workflow,
    stop_workflow,
    kill_workflow,
    me,
]
