"""The blocking client: the async one, run by a thread of its own.

Every method does what its namesake in the async client does, and waits for it. Clients may be
shared by threads, and used where an event loop is running already, as in a notebook.
"""

import os
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, Unpack

from spellq.wire import Me
from spellq_sdk import runs as async_runs
from spellq_sdk import workflows as async_workflows
from spellq_sdk.client import AsyncClient
from spellq_sdk.doors import Door, RemoteDoor, door_of
from spellq_sdk.later import LaterServices
from spellq_sdk.models import LogEntry, LsLine, RunEvent, RunFields
from spellq_sdk.options import RunOptions
from spellq_sdk.portal import Portal
from spellq_sdk.settings import settings_from
from spellq_sdk.statuses import Constants


class Run(RunFields):
    """A run, and what can be asked of it. Its fields change only by `refresh()`.

    Every method raises ClientException when the gateway refuses or cannot be reached.
    """

    def __init__(self, client: "Client", run: async_runs.Run) -> None:
        super().__init__(run._view)
        self._client = client
        self._run = run

    def refresh(self) -> None:
        """Fetch the run again, in place."""
        self._client._portal.call(self._run.refresh)
        self._load(self._run._view)

    def wait_status(self, *statuses: str) -> None:
        """Block until the run has reached one of `statuses`; at once if it was there before.

        Does not refresh. A lost connection is taken up again unnoticed.

        Raises:
            WaitError: the run ended without reaching any of them.
            BadRequest: no status, or an unknown one.
        """
        self._client._portal.call(lambda: self._run.wait_status(*statuses))

    def wait_metric(self, metric_name: str, condition: str, value: float | str) -> None:
        """Not available yet: raises ClientException."""
        self._client._portal.call(lambda: self._run.wait_metric(metric_name, condition, value))

    def metrics(
        self, metric_name: str, follow: bool = False, start: int | None = None
    ) -> Generator[tuple[Any, int, Any], None, None]:
        """Not available yet: raises ClientException when first asked for a value."""
        return self._client._portal.stream(lambda: self._run.metrics(metric_name, follow, start))

    def logs(self, follow: bool = False, offset: int = 0) -> Generator[LogEntry, None, None]:
        """The lines of the run's log from `offset` on; a negative one counts from the end.

        With `follow`, goes on until the run is final and its log was given to the end. After a
        lost connection it goes on where it was: no line is missing or comes twice.
        """
        return self._client._portal.stream(lambda: self._run.logs(follow, offset))

    def stop(self, grace_seconds: float | None = None) -> bool:
        """Ask the run to end and keep its outputs; does not wait. False: that changed nothing.

        A run whose command has not started is killed. `grace_seconds` lies between the signals
        TERM and KILL, in place of the run's own; stopping again with a shorter one hurries it.
        """
        return self._client._portal.call(lambda: self._run.stop(grace_seconds))

    def kill(self) -> bool:
        """End the run at once, without its outputs; does not wait. False: it had ended already."""
        return self._client._portal.call(self._run.kill)

    def add_label(self, name: str) -> None:
        """Put a label on the run, ended or not."""
        self._client._portal.call(lambda: self._run.add_label(name))

    def remove_label(self, name: str) -> None:
        """Take a label off the run."""
        self._client._portal.call(lambda: self._run.remove_label(name))

    def cp(
        self, source_path: str = "", destination_directory: str | os.PathLike[str] | None = None
    ) -> None:
        """Copy what the run saved at `source_path` into a folder (default: the current one).

        A file keeps its name; of a folder, the content is copied. Nothing is written outside the
        destination, and every file's hash is checked.
        """
        self._client._portal.call(lambda: self._run.cp(source_path, destination_directory))


Runs = list[Run]


class RunsService(Constants):
    """`client.runs`: launch runs and find them; also home of the status words."""

    def __init__(self, client: "Client", service: async_runs.RunsService) -> None:
        self._client = client
        self._service = service

    def new(self, **options: Unpack[RunOptions]) -> Run:
        """Launch a run and return as soon as it is queued.

        Inside a workflow it belongs to the active one unless `workflow_id` says otherwise.

        Raises:
            TypeError: an unknown keyword, no command, or a value of a wrong type.
            BadRequest: a request the gateway refuses; the message says why.
        """
        return Run(self._client, self._client._portal.call(lambda: self._service.new(**options)))

    def new_many(self, requests: Sequence[RunOptions]) -> Runs:
        """Launch several runs, in order. Each item holds the keywords of `new`.

        All are checked before the first is sent. Of every 500, either all are launched or (an
        error) none.
        """
        made = self._client._portal.call(lambda: self._service.new_many(requests))
        return [Run(self._client, run) for run in made]

    def get(self, run_id: int) -> Run:
        """The run of that number.

        Raises:
            TypeError: not a whole number.
            ClientException: there is none (`response.status_code` is 404).
        """
        return Run(self._client, self._client._portal.call(lambda: self._service.get(run_id)))

    def list(
        self,
        number: int = 50,
        project: str | None = None,
        show_uncategorized: bool = False,
        labels: Collection[str] = (),
        *,
        workflow: int | None = None,
        live: bool = False,
    ) -> Runs:
        """The newest runs, newest first: those with any of `labels`, of a workflow, not final.

        Raises:
            TypeError: `number` or `workflow` is no whole number, or `labels` a single text.
        """
        found = self._client._portal.call(
            lambda: self._service.list(
                number, project, show_uncategorized, labels, workflow=workflow, live=live
            )
        )
        return [Run(self._client, run) for run in found]


class Workflow:
    """A workflow as it was when last fetched; `runs` holds its worker runs, not the master."""

    def __init__(self, client: "Client", workflow: async_workflows.Workflow) -> None:
        self._client = client
        self._workflow = workflow
        self._load()

    def _load(self) -> None:
        self.id = self._workflow.id
        self.owner = self._workflow.owner
        self.created_at: datetime = self._workflow.created_at
        self.workspace_specs = self._workflow.workspace_specs
        self.managing_run = Run(self._client, self._workflow.managing_run)
        self.runs = [Run(self._client, run) for run in self._workflow.runs]

    def refresh(self) -> None:
        """Fetch the workflow again, in place."""
        self._client._portal.call(self._workflow.refresh)
        self._load()

    def stop(self, grace_seconds: float | None = None) -> None:
        """Stop the master and what runs, cancel what waits; does not wait for it.

        The grace is as in `Run.stop`.
        """
        self._client._portal.call(lambda: self._workflow.stop(grace_seconds))
        self._load()

    def kill(self) -> None:
        """Kill the master and all its worker runs; does not wait for it."""
        self._client._portal.call(self._workflow.kill)
        self._load()

    def __repr__(self) -> str:
        return f"Workflow(id={self.id}, managing_run={self.managing_run!r}, runs={self.runs!r})"


class WorkflowsService:
    """`client.workflows`: launch workflows and find them."""

    def __init__(self, client: "Client", service: async_workflows.WorkflowsService) -> None:
        self._client = client
        self._service = service

    def new(self, **options: Unpack[RunOptions]) -> Workflow:
        """Launch a master run, in a workflow of its own; takes the keywords of `runs.new`."""
        made = self._client._portal.call(lambda: self._service.new(**options))
        return Workflow(self._client, made)

    def get(self, workflow_id: int) -> Workflow:
        """The workflow of that number.

        Raises:
            TypeError: not a whole number.
            ClientException: there is none (`response.status_code` is 404).
        """
        found = self._client._portal.call(lambda: self._service.get(workflow_id))
        return Workflow(self._client, found)


class Client(LaterServices):
    """A client of one gateway, for ordinary code. Closed by `close()`, `with`, or at exit."""

    def __init__(
        self, url: str, token: str, *, owner: str | None = None, workflow_id: int | None = None
    ) -> None:
        """A client of the gateway at `url`; inside a workflow, `workflow_id` is its number.

        Raises:
            UnauthorizedClient: the token is empty.
            ClientException: the active workflow cannot be loaded.
        """
        self._set_up(RemoteDoor(url, token), owner, workflow_id)

    @classmethod
    def from_environment(cls, *, announce: Callable[[], None] | None = None) -> Self:
        """A client of the gateway that the environment names, else of the local daemon.

        The daemon is started if need be, and again should it go away meanwhile; `announce` is
        called right before that, from another thread.

        Raises:
            ClientException: the environment contradicts itself, names no gateway inside a run, or
                the daemon cannot be started.
        """
        settings = settings_from()
        client = cls.__new__(cls)
        client._set_up(door_of(settings, announce), settings.owner, settings.workflow_id)
        return client

    def _set_up(self, door: Door, owner: str | None, workflow_id: int | None) -> None:
        self._portal = Portal()
        client = self._portal.call(lambda: _make(door, owner, workflow_id))
        self._client = client
        # Runs when the client is closed, when nobody has it any more, or when Python exits.
        self._finalizer = weakref.finalize(self, self._portal.close, client.aclose)
        try:
            self._portal.call(client.__aenter__)
        except BaseException:
            self.close()
            raise
        self.runs = RunsService(self, client.runs)
        self.workflows = WorkflowsService(self, client.workflows)
        workflow = client.active_workflow
        self.active_workflow = None if workflow is None else Workflow(self, workflow)

    @property
    def owner(self) -> str:
        """Whose client this is; asks the gateway the first time if the environment did not say."""
        return self._client.owner or self.me().owner

    def me(self) -> Me:
        """Who the token is, and what the gateway offers."""
        return self._portal.call(self._client.me)

    def ls(self, path: str) -> list[LsLine]:
        """What lies in a resource, for example `runs/12`."""
        return self._portal.call(lambda: self._client.ls(path))

    def events(
        self,
        runs: Iterable[int] | None = None,
        workflow: int | None = None,
        types: Iterable[str] | None = None,
        statuses: Iterable[str] | None = None,
        after: str | None = None,
    ) -> Generator[RunEvent, None, None]:
        """The events that match all that is given, from now on or from after a cursor.

        Never ends by itself. Lost connections are taken up again; none is missed, and within a
        run none comes twice or out of order.
        """
        return self._portal.stream(
            lambda: self._client.events(runs, workflow, types, statuses, after)
        )

    def close(self) -> None:
        """Close the connections; calls of other threads that still wait raise ClientException."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def _make(door: Door, owner: str | None, workflow_id: int | None) -> AsyncClient:
    return AsyncClient.at(door, owner, workflow_id)
