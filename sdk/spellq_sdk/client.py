"""The async client: `async with spellq.AsyncClient.from_environment() as client: …`."""

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from types import TracebackType
from typing import Self

from spellq.events import EventFilter
from spellq.wire import LsReply, Me
from spellq_sdk.doors import Door, RemoteDoor, door_of
from spellq_sdk.gateway import Gateway
from spellq_sdk.later import LaterServices
from spellq_sdk.models import LsLine, RunEvent
from spellq_sdk.runs import RunsService
from spellq_sdk.settings import settings_from
from spellq_sdk.statuses import parse_statuses, parse_types
from spellq_sdk.transport import Transport
from spellq_sdk.workflows import Workflow, WorkflowsService


class AsyncClient(LaterServices):
    """A client of one gateway, for one event loop.

    Entered with `async with`, it loads the active workflow where there is one; left, it closes its
    connections. Everything travels over one HTTP session and one WebSocket, however many runs are
    waited for.
    """

    def __init__(
        self, url: str, token: str, *, owner: str | None = None, workflow_id: int | None = None
    ) -> None:
        """A client of the gateway at `url`; inside a workflow, `workflow_id` is its number.

        Raises:
            UnauthorizedClient: the token is empty.
        """
        self._set_up(RemoteDoor(url, token), owner, workflow_id)

    @classmethod
    def from_environment(cls, *, announce: Callable[[], None] | None = None) -> Self:
        """A client of the gateway that the environment names, else of the local daemon.

        Asks and starts nothing yet: the daemon is started when the client is entered or first
        used, and again should it go away meanwhile; `announce` is called right before that, from
        another thread.

        Raises:
            ClientException: the environment contradicts itself, or names no gateway inside a run.
        """
        settings = settings_from()
        return cls.at(door_of(settings, announce), settings.owner, settings.workflow_id)

    @classmethod
    def at(cls, door: Door, owner: str | None = None, workflow_id: int | None = None) -> Self:
        """A client that finds its gateway through a door."""
        client = cls.__new__(cls)
        client._set_up(door, owner, workflow_id)
        return client

    def _set_up(self, door: Door, owner: str | None, workflow_id: int | None) -> None:
        self.owner = owner
        self.active_workflow: Workflow | None = None
        self.gateway = Gateway(Transport(door))
        self.runs = RunsService(self.gateway, workflow_id)
        self.workflows = WorkflowsService(self.gateway)
        self._workflow_id = workflow_id

    async def me(self) -> Me:
        """Who the token is, and what the gateway offers. Sets `owner` if it was not known."""
        me = await self.gateway.me()
        self.owner = self.owner or me.owner
        return me

    async def ls(self, path: str) -> list[LsLine]:
        """What lies in a resource, for example `runs/12`."""
        return ls_lines(await self.gateway.ls(path))

    async def events(
        self,
        runs: Iterable[int] | None = None,
        workflow: int | None = None,
        types: Iterable[str] | None = None,
        statuses: Iterable[str] | None = None,
        after: str | None = None,
    ) -> AsyncGenerator[RunEvent, None]:
        """The events that match all that is given, from now on or from after a cursor.

        Never ends by itself. Lost connections are taken up again; none is missed, and within a
        run none comes twice or out of order.

        Raises:
            BadRequest: an unknown type or status, or a cursor of another gateway.
        """
        wanted = EventFilter(
            runs=None if runs is None else frozenset(runs),
            workflow=workflow,
            types=None if types is None else parse_types(tuple(types)),
            statuses=None
            if statuses is None
            else frozenset(parse_statuses(tuple(statuses), "events(statuses=…)")),
        )
        async with contextlib.aclosing(self.gateway.events(wanted, after)) as events:
            async for event in events:
                yield event

    async def aclose(self) -> None:
        """Close the connections; what still waits raises ClientException."""
        await self.gateway.aclose()

    async def __aenter__(self) -> Self:
        try:
            await self.gateway.transport.address()
            if self._workflow_id is not None:
                view = await self.gateway.workflow(self._workflow_id)
                self.active_workflow = Workflow(self.gateway, view)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def ls_lines(reply: LsReply) -> list[LsLine]:
    """The rows of a listing as clients see them."""
    return [
        LsLine(
            path=entry.path,
            size=entry.size,
            date=entry.date.isoformat() if entry.date else None,
            additional_info=entry.info or None,
            link_target=entry.link,
        )
        for entry in reply.entries
    ]
