"""Workflows: a master run and the worker runs launched in its name (async)."""

from datetime import datetime
from typing import Any, Unpack

from spellq.wire import WorkflowView
from spellq_sdk.gateway import Gateway
from spellq_sdk.options import RunOptions, run_request, whole_number
from spellq_sdk.runs import Run


class Workflow:
    """A workflow as it was when last fetched; `runs` holds its worker runs, not the master."""

    def __init__(self, gateway: Gateway, view: WorkflowView) -> None:
        self._gateway = gateway
        self._load(view)

    def _load(self, view: WorkflowView) -> None:
        self._view = view
        self.id = view.id
        self.owner = view.owner
        self.created_at: datetime = view.created_at
        self.workspace_specs: dict[str, Any] = {}
        self.managing_run = Run(self._gateway, view.managing_run)
        self.runs = [Run(self._gateway, run) for run in view.runs]

    async def refresh(self) -> None:
        """Fetch the workflow again, in place."""
        self._load(await self._gateway.workflow(self.id))

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Stop the master and what runs, cancel what waits; does not wait for it.

        The grace is as in `Run.stop`.
        """
        self._load(await self._gateway.end_workflow(self.id, "stop", grace_seconds))

    async def kill(self) -> None:
        """Kill the master and all its worker runs; does not wait for it."""
        self._load(await self._gateway.end_workflow(self.id, "kill"))

    def __repr__(self) -> str:
        return f"Workflow(id={self.id}, managing_run={self.managing_run!r}, runs={self.runs!r})"


class WorkflowsService:
    """`client.workflows`: launch workflows and find them."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def new(self, **options: Unpack[RunOptions]) -> Workflow:
        """Launch a master run, in a workflow of its own; takes the keywords of `runs.new`."""
        request = run_request(options, caller="workflows.new")
        return Workflow(self._gateway, await self._gateway.launch_workflow(request))

    async def get(self, workflow_id: int) -> Workflow:
        """The workflow of that number.

        Raises:
            TypeError: not a whole number.
            ClientException: there is none (`response.status_code` is 404).
        """
        number = whole_number(workflow_id, "workflow_id")
        return Workflow(self._gateway, await self._gateway.workflow(number))
