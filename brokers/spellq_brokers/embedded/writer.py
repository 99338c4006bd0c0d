"""Who executes the store's steps: a thread that groups commits, or the caller itself.

A step is a function of the open transaction. Steps run one after the other in the order they were
submitted; those that queued while a commit was under way are committed together, so that the disk
is synced once for all of them. There is no timer: an idle store commits at once.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from spellq.ports import StoreUnavailable

T = TypeVar("T")

MAX_GROUP: Final = 512


class Transaction:
    """The group of steps being committed: its connection, and what to do once it is durable."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._after: list[Callable[[], None]] = []
        self._begun = False

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Execute a statement inside the group's transaction, which begins with the first."""
        if not self._begun:
            self._connection.execute("BEGIN IMMEDIATE")
            self._begun = True
        return self._connection.execute(sql, values)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Call `action` when everything so far is durable, before anybody gets an answer."""
        self._after.append(action)

    def commit(self) -> None:
        if self._begun:
            self._connection.execute("COMMIT")
        for action in self._after:
            action()

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


Step = Callable[[Transaction], Callable[[], T]]
"""Changes the database and returns what gives its answer once the group is durable.

It raises before it has changed anything, or not at all.
"""

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

    def close(self) -> None:
        """Finish what was submitted, then close the database."""


class _Job:
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


def run_group(
    connection: sqlite3.Connection, jobs: list[_Job], on_failure: Callable[[], None]
) -> None:
    """Execute and commit the jobs as one group; fills in their answers or errors."""
    transaction = Transaction(connection)
    answers: list[tuple[_Job, Callable[[], Any]]] = []
    try:
        for job in jobs:
            try:
                answers.append((job, job.work(transaction)))
            except sqlite3.Error:
                raise
            except Exception as error:
                job.error = error
        transaction.commit()
    except (sqlite3.Error, OSError) as error:
        transaction.rollback()
        on_failure()
        for job, _ in answers:
            job.error = StoreUnavailable(f"The store cannot write: {error}")
        for job in jobs:
            if job.error is None:
                job.error = StoreUnavailable(f"The store cannot write: {error}")
        return
    for job, answer in answers:
        try:
            job.answer = answer()
        except OSError as error:
            job.error = StoreUnavailable(f"The store cannot write: {error}")
        except Exception as error:
            job.error = error


class ThreadWriter:
    """A writer thread with its connection, and a reader thread with another."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self.on_failure: Callable[[], None] = lambda: None
        self._writer = _Thread("spellq-writer", connect, self._write)
        self._reader = _Thread("spellq-reader", connect, _read)

    async def submit(self, step: Step[T]) -> T:
        answer: T = await self._writer.do(step)
        return answer

    async def read(self, query: Query[T]) -> T:
        answer: T = await self._reader.do(query)
        return answer

    def close(self) -> None:
        self._writer.close()
        self._reader.close()

    def _write(self, connection: sqlite3.Connection, jobs: list[_Job]) -> None:
        run_group(connection, jobs, self.on_failure)


def _read(connection: sqlite3.Connection, jobs: list[_Job]) -> None:
    for job in jobs:
        try:
            job.answer = job.work(connection)
        except sqlite3.Error as error:
            job.error = StoreUnavailable(f"The store cannot read: {error}")
        except Exception as error:
            job.error = error


class _Thread:
    """One thread, one connection, one queue; hands on all that queued meanwhile as one list."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        execute: Callable[[sqlite3.Connection, list[_Job]], None],
    ) -> None:
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._execute = execute
        self._connect = connect
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[Any], Any]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put(_Job(work, future))
        return await future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        connection = self._connect()
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
            self._execute(connection, jobs)
            _deliver(jobs)
            job = self._queue.get()
        connection.close()


def _deliver(jobs: list[_Job]) -> None:
    """Wake everybody who waits, with one call into their loop."""
    loop = jobs[0].future.get_loop()
    try:
        loop.call_soon_threadsafe(_resolve, jobs)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _resolve(jobs: list[_Job]) -> None:
    for job in jobs:
        job.resolve()


class InlineWriter:
    """Executes each step where it is submitted: no thread, for a simulated world."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self.on_failure: Callable[[], None] = lambda: None
        self._connection = connect()

    async def submit(self, step: Step[T]) -> T:
        job = _Job(step, asyncio.get_running_loop().create_future())
        run_group(self._connection, [job], self.on_failure)
        job.resolve()
        answer: T = await job.future
        return answer

    async def read(self, query: Query[T]) -> T:
        try:
            return query(self._connection)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"The store cannot read: {error}") from error

    def close(self) -> None:
        self._connection.close()
