"""Runs: launching, looking at, waiting for and ending them (async)."""

import contextlib
import os
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path
from typing import Any, Unpack

from spellq.wire import LabelRequest, Reached, RunView
from spellq_sdk.downloads import download
from spellq_sdk.exceptions import ClientException, WaitError, bad_request
from spellq_sdk.gateway import Gateway
from spellq_sdk.models import LogEntry, RunFields, log_entry
from spellq_sdk.options import RunOptions, label_names, run_request, whole_number
from spellq_sdk.statuses import Constants, parse_statuses

NO_METRICS = "Metrics are not available in this version of spellq yet."
NO_PROJECTS = "Projects are not available in this version of spellq yet."


class Run(RunFields):
    """A run, and what can be asked of it. Its fields change only by `refresh()`.

    Every method raises ClientException when the gateway refuses or cannot be reached.
    """

    def __init__(self, gateway: Gateway, view: RunView) -> None:
        super().__init__(view)
        self._gateway = gateway

    def _load(self, view: RunView) -> None:
        super()._load(view)
        self._view = view

    async def refresh(self) -> None:
        """Fetch the run again, in place."""
        self._load(await self._gateway.run(self.id))

    async def wait_status(self, *statuses: str) -> None:
        """Return when the run has reached one of `statuses`, at once if it was there before.

        Does not refresh. A lost connection is taken up again unnoticed.

        Raises:
            WaitError: the run ended without reaching any of them.
            BadRequest: no status, or an unknown one.
        """
        wanted = parse_statuses(statuses)
        answer = await self._gateway.socket.wait(self.id, wanted)
        if not isinstance(answer, Reached):
            raise WaitError(
                f"Run {self.id} ended with status {answer.status.value!r}; "
                f"it never reached {' or '.join(repr(status.value) for status in wanted)}."
            )

    async def wait_metric(self, metric_name: str, condition: str, value: float | str) -> None:
        """Not available yet: raises ClientException."""
        raise ClientException(NO_METRICS)

    async def metrics(
        self, metric_name: str, follow: bool = False, start: int | None = None
    ) -> AsyncGenerator[tuple[Any, int, Any], None]:
        """Not available yet: raises ClientException when first asked for a value."""
        raise ClientException(NO_METRICS)
        yield

    async def logs(self, follow: bool = False, offset: int = 0) -> AsyncGenerator[LogEntry, None]:
        """The lines of the run's log from `offset` on; a negative one counts from the end.

        With `follow`, goes on until the run is final and its log was given to the end. After a
        lost connection it goes on where it was: no line is missing or comes twice.
        """
        lines = self._gateway.logs(self.id, follow=follow, offset=offset)
        async with contextlib.aclosing(lines):
            async for line in lines:
                yield log_entry(line)

    async def stop(self, grace_seconds: float | None = None) -> bool:
        """Ask the run to end and keep its outputs; does not wait. False: that changed nothing.

        A run whose command has not started is killed. `grace_seconds` lies between the signals
        TERM and KILL, in place of the run's own; stopping again with a shorter one hurries it.
        """
        return (await self._gateway.end(self.id, "stop", grace_seconds)).changed

    async def kill(self) -> bool:
        """End the run at once, without its outputs; does not wait. False: it had ended already."""
        return (await self._gateway.end(self.id, "kill")).changed

    async def add_label(self, name: str) -> None:
        """Put a label on the run, ended or not."""
        await self._gateway.label(self.id, LabelRequest(add=(name,)))

    async def remove_label(self, name: str) -> None:
        """Take a label off the run."""
        await self._gateway.label(self.id, LabelRequest(remove=(name,)))

    async def cp(
        self, source_path: str = "", destination_directory: str | os.PathLike[str] | None = None
    ) -> None:
        """Copy what the run saved at `source_path` into a folder (default: the current one).

        A file keeps its name; of a folder, the content is copied. Nothing is written outside the
        destination, and every file's hash is checked.
        """
        resource = f"runs/{self.id}/{source_path}".rstrip("/")
        tree = await self._gateway.tree(resource)
        await download(self._gateway, tree, Path(destination_directory or "."))


Runs = list[Run]


class RunsService(Constants):
    """`client.runs`: launch runs and find them; also home of the status words."""

    def __init__(self, gateway: Gateway, workflow_id: int | None = None) -> None:
        self._gateway = gateway
        self._workflow_id = workflow_id

    async def new(self, **options: Unpack[RunOptions]) -> Run:
        """Launch a run and return as soon as it is queued.

        Inside a workflow it belongs to the active one unless `workflow_id` says otherwise.
        Launches gathered with `asyncio.gather` travel in one request.

        Raises:
            TypeError: an unknown keyword, no command, or a value of a wrong type.
            BadRequest: a request the gateway refuses; the message says why.
        """
        request = run_request(options, workflow_id=self._workflow_id)
        return Run(self._gateway, await self._gateway.launch(request))

    async def new_many(self, requests: Sequence[RunOptions]) -> Runs:
        """Launch several runs, in order. Each item holds the keywords of `new`.

        All are checked before the first is sent. Of every 500, either all are launched or (an
        error) none.
        """
        made = [
            run_request(options, workflow_id=self._workflow_id, caller="runs.new_many")
            for options in requests
        ]
        return [Run(self._gateway, view) for view in await self._gateway.launch_many(made)]

    async def get(self, run_id: int) -> Run:
        """The run of that number.

        Raises:
            TypeError: not a whole number.
            ClientException: there is none (`response.status_code` is 404).
        """
        number = whole_number(run_id, "run_id")
        return Run(self._gateway, await self._gateway.run(number))

    async def list(
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
        if project or show_uncategorized:
            raise bad_request(NO_PROJECTS)
        views = await self._gateway.runs(
            whole_number(number, "number"),
            labels=tuple(label_names(labels, "runs.list()")),
            workflow=None if workflow is None else whole_number(workflow, "workflow"),
            live=live,
        )
        return [Run(self._gateway, view) for view in views]
