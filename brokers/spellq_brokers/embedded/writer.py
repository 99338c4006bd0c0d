"""Who executes the store's steps: a thread that groups commits, or the caller itself.

A step is a function of the open transaction. Steps run one after the other in the order they were
submitted; those that queued while a commit was under way are committed together, so that the disk
is synced once for all of them. There is no timer: an idle store commits at once.
"""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from anyio import to_thread

from spellq.files import is_full
from spellq.ports import StoreFull, StoreUnavailable
from spellq.runs import Run

T = TypeVar("T")

MAX_GROUP: Final = 512

_log = logging.getLogger(__name__)


class Transaction:
    """The group of steps being committed: its connection, what it changed, what comes after.

    `runs` are the runs as the group's steps have left them so far; a step that raises leaves no
    trace of itself, neither here nor in the database.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.runs: dict[int, Run] = {}
        self._connection = connection
        self._after: list[Callable[[], None]] = []
        self._begun = False
        self._saved = False

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Execute a statement inside the group's transaction, which begins with the first."""
        if not self._begun:
            self._connection.execute("BEGIN IMMEDIATE")
            self._begun = True
        if not self._saved:
            self._connection.execute("SAVEPOINT step")
            self._saved = True
        return self._connection.execute(sql, values)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Call `action` when everything is durable, before the step's answer is asked for."""
        self._after.append(action)

    def attempt(self, step: "Step[T]") -> Callable[[], T]:
        """Execute one step, wholly or not at all; gives what is to be done once it is durable."""
        runs = dict(self.runs)
        self._after = []
        self._saved = False
        try:
            answer = step(self)
        except BaseException:
            self.runs = runs
            if self._saved and self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO step")
                self._connection.execute("RELEASE step")
            raise
        if self._saved:
            self._connection.execute("RELEASE step")
        return partial(_finish, self._after, answer)

    def commit(self) -> None:
        if self._begun:
            self._connection.execute("COMMIT")

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _finish(actions: list[Callable[[], None]], answer: Callable[[], T]) -> T:
    """It is durable and cannot be taken back: an action that fails does not undo it."""
    for action in actions:
        try:
            action()
        except Exception:
            _log.exception("after a commit")
    return answer()


Step = Callable[[Transaction], Callable[[], T]]
"""Changes the database and returns what gives its answer once the group is durable."""

Query = Callable[[sqlite3.Connection], T]


class Writer(Protocol):
    """Executes steps and queries on one database."""

    async def submit(self, step: Step[T]) -> T:
        """The step's answer, once it is durable.

        Raises:
            StoreUnavailable: the database could not be written; nothing was changed.
        """

    async def read(self, query: Query[T]) -> T:
        """The answer of a query that sees every step answered before."""

    async def close(self) -> None:
        """Finish what was submitted, then close the database."""


class Job:
    """A step or a query on its way to its thread and back."""

    __slots__ = ("answer", "error", "future", "work")

    def __init__(self, work: Callable[[Any], Any], future: "asyncio.Future[Any]") -> None:
        self.work = work
        self.future = future
        self.answer: Any = None
        self.error: BaseException | None = None

    def resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


def run_group(connection: sqlite3.Connection, jobs: list[Job]) -> None:
    """Execute and commit the jobs as one group; fills in their answers or errors."""
    transaction = Transaction(connection)
    answers: list[tuple[Job, Callable[[], Any]]] = []
    try:
        for job in jobs:
            try:
                answers.append((job, transaction.attempt(job.work)))
            except sqlite3.OperationalError:
                raise  # the disk, not the step: SQLite may have rolled everything back
            except Exception as error:
                job.error = _unavailable(error)
        transaction.commit()
    except sqlite3.Error as error:
        transaction.rollback()
        for job in jobs:
            job.error = job.error or _unavailable(error)
        return
    for job, answer in answers:
        try:
            job.answer = answer()
        except Exception as error:
            job.error = _unavailable(error)


def _unavailable(error: Exception) -> Exception:
    """What comes through the port instead of a library's own error."""
    if _says_full(error):
        return StoreFull(
            "The disk is full, and nothing was changed. Free some space where SPELLQ_HOME lies, "
            "then try again."
        )
    if isinstance(error, (sqlite3.Error, OSError)):
        return StoreUnavailable(f"The store cannot be used: {error}")
    return error


def _says_full(error: Exception) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and is_full(error)


class ThreadWriter:
    """A writer thread with its connection, and a reader thread with another."""

    def __init__(self, writing: sqlite3.Connection, reading: sqlite3.Connection) -> None:
        self._writer = _Thread("spellq-writer", writing, run_group)
        self._reader = _Thread("spellq-reader", reading, _read)

    async def submit(self, step: Step[T]) -> T:
        answer: T = await self._writer.do(step)
        return answer

    async def read(self, query: Query[T]) -> T:
        answer: T = await self._reader.do(query)
        return answer

    async def close(self) -> None:
        await to_thread.run_sync(self._writer.close)
        await to_thread.run_sync(self._reader.close)


def _read(connection: sqlite3.Connection, jobs: list[Job]) -> None:
    for job in jobs:
        try:
            job.answer = job.work(connection)
        except Exception as error:
            job.error = _unavailable(error)


class _Thread:
    """One thread, one connection, one queue; hands on all that queued meanwhile as one list."""

    def __init__(
        self,
        name: str,
        connection: sqlite3.Connection,
        execute: Callable[[sqlite3.Connection, list[Job]], None],
    ) -> None:
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._execute = execute
        self._connection = connection
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[Any], Any]) -> Any:
        if self._closed:
            raise StoreUnavailable("The store is closed.")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put(Job(work, future))
        return await future

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        job = self._queue.get()
        while job is not None:
            jobs = [job]
            job = None
            while not self._queue.empty() and len(jobs) < MAX_GROUP:
                job = self._queue.get()
                if job is None:
                    self._queue.put(None)
                    break
                jobs.append(job)
            self._execute_safely(jobs)
            _deliver(jobs)
            job = self._queue.get()
        self._connection.close()

    def _execute_safely(self, jobs: list[Job]) -> None:
        """Whatever goes wrong, everybody gets an answer and the thread lives on."""
        try:
            self._execute(self._connection, jobs)
        except BaseException as error:
            _log.exception("a group of steps")
            for job in jobs:
                job.error = job.error or StoreUnavailable(f"The store failed: {error!r}")


def _deliver(jobs: list[Job]) -> None:
    """Wake everybody who waits, with one call into their loop."""
    loop = jobs[0].future.get_loop()
    try:
        loop.call_soon_threadsafe(_resolve, jobs)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _resolve(jobs: list[Job]) -> None:
    for job in jobs:
        job.resolve()


class InlineWriter:
    """Executes each step where it is submitted: no thread, for a simulated world."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def submit(self, step: Step[T]) -> T:
        job = Job(step, asyncio.get_running_loop().create_future())
        run_group(self._connection, [job])
        job.resolve()
        answer: T = await job.future
        return answer

    async def read(self, query: Query[T]) -> T:
        job = Job(query, asyncio.get_running_loop().create_future())
        _read(self._connection, [job])
        job.resolve()
        answer: T = await job.future
        return answer

    async def close(self) -> None:
        self._connection.close()
