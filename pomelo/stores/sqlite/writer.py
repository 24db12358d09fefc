"""The one thread that writes: callers queue what is to be done, and it commits what has gathered in one go.

Knows nothing of what is done. What a caller gets is on the disk: futures are resolved after the commit alone.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors
from pomelo.stores.base import DECLARED_ERRORS
from pomelo.stores.ledger import UnknownOutcomeError

BATCH = 256
"""At most so much is committed at once."""

log = logging.getLogger("pomelo.stores")

T = TypeVar("T")


class Written(Protocol):
    """What the thread writes to; made, used and closed in it."""

    connection: sqlite3.Connection

    def failed(self, error: BaseException) -> None:
        """Receives the error of an operation that failed, possibly because of the file."""
        ...

    def between(self) -> None:
        """Runs between two batches. Raises nothing."""
        ...

    def close(self) -> None:
        """Gives it up."""
        ...


class _Work(NamedTuple):
    """Something to be done, and who waits for it. `reads`: it changes nothing."""

    do: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    reads: bool


class _Outcome(NamedTuple):
    future: asyncio.Future[Any]
    value: Any
    error: Exception | None


class Writer:
    """See the module. Made by `start`; all methods belong to the loop that called that."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.unexpected = UnexpectedErrors(log)
        self._loop = loop
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._closed = False
        self._ending = False
        self._ended: asyncio.Future[None] = loop.create_future()

    @classmethod
    async def start(cls, opening: Callable[[], Written]) -> Writer:
        """Opens what is written to, in a new thread.

        Raises:
            Exception: what `opening` raises.
        """
        loop = asyncio.get_running_loop()
        writer = cls(loop)
        opened: asyncio.Future[None] = loop.create_future()
        # A process that ends without closing is not kept by the thread; that is a crash like any other.
        threading.Thread(target=writer._run, args=(opening, opened), name="sqlite", daemon=True).start()
        try:
            await asyncio.shield(opened)
        except asyncio.CancelledError:
            # It is being opened, and is to be closed again; who waits for a lock waits in vain.
            await writer.close()
            raise
        return writer

    def do(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> asyncio.Future[T]:
        """Queues `work` at once, to be done wholly or not at all, and in the order of the calls.

        Cancelling the future stops nothing; nobody need await it. It raises those errors of `work`
        that the store's protocols declare, and PomeloError store_unavailable for all others:
        UnknownOutcomeError for unexpected ones. With `reads` it changes nothing.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            _fail(future, PomeloError("store_unavailable"))
        else:
            self._queue.put(_Work(work, future, reads))
        return future

    async def close(self) -> None:
        """Does what is queued, and closes. What comes later is refused."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        # A cancelled exit must not leave the file open.
        await asyncio.shield(self._ended)

    # --- in the thread

    def _run(self, opening: Callable[[], Written], opened: asyncio.Future[None]) -> None:
        try:
            target = opening()
        except Exception as error:
            self._closed = True
            self._report([_Outcome(opened, None, error), _Outcome(self._ended, None, None)])
            return
        self._report([_Outcome(opened, None, None)])
        failed: Exception | None = None
        while not self._ending:
            if batch := self._gather():
                self._report(self._done(target, batch))
                target.between()
        try:
            target.close()
        except (sqlite3.Error, OSError) as error:
            failed = error
        self._report([_Outcome(self._ended, None, failed)])

    def _done(self, target: Written, batch: list[_Work]) -> list[_Outcome]:
        """Runs a batch and returns the outcome of each work. Contains any error: the thread goes
        on."""
        try:
            outcomes = _commit(target.connection, batch)
        except Exception as error:
            outcomes = [_Outcome(work.future, None, error) for work in batch]
        for outcome in outcomes:
            if outcome.error is not None:
                target.failed(outcome.error)
        return [
            outcome
            if outcome.error is None or isinstance(outcome.error, DECLARED_ERRORS)
            else outcome._replace(error=self._contained(outcome.error))
            for outcome in outcomes
        ]

    def _contained(self, error: Exception) -> PomeloError:
        self.unexpected.log("The store failed", error)
        return _unavailable(error, UnknownOutcomeError)

    def _gather(self) -> list[_Work]:
        """Waits for something to do, and takes what is there."""
        batch: list[_Work] = []
        while len(batch) < BATCH and not (batch and self._queue.empty()):
            work = self._queue.get()
            if work is None:
                self._ending = True  # Nothing is queued behind it.
                break
            batch.append(work)
        return batch

    def _report(self, outcomes: list[_Outcome]) -> None:
        with suppress(RuntimeError):  # The loop is closed; nobody waits.
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: list[_Outcome]) -> None:
    for future, value, error in outcomes:
        if future.done():
            continue  # Its awaiter left.
        if error is None:
            future.set_result(value)
        else:
            _fail(future, error)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    future.set_exception(error)
    # Looked at once, it is not reported as never retrieved when nobody awaits it.
    future.exception()


def _commit(connection: sqlite3.Connection, batch: list[_Work]) -> list[_Outcome]:
    """Does all of the batch that can be done, in one transaction."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")  # an earlier batch that could not be rolled back
    if all(work.reads for work in batch):
        return [_read(connection, work) for work in batch]
    try:
        # Nearly always nothing fails, and savepoints are a third of the work. Each statement has to win the
        # interpreter's lock back from the loop's thread, so under load their number is what counts.
        outcomes = _transact(connection, batch, _plainly)
    except Exception:
        _undo(connection)
    else:
        return outcomes
    try:
        return _transact(connection, batch, _apart)
    except Exception as error:
        log.warning("%d operations were not kept: %s", len(batch), _reason(error))
        _undo(connection)
        # What was read may have been of this transaction: it is read again.
        return [
            _read(connection, work)
            if work.reads and not connection.in_transaction
            else _Outcome(work.future, None, _told(error))
            for work in batch
        ]


def _transact(
    connection: sqlite3.Connection, batch: list[_Work], way: Callable[[sqlite3.Connection, _Work], _Outcome]
) -> list[_Outcome]:
    connection.execute("BEGIN IMMEDIATE")
    outcomes = [way(connection, work) for work in batch]
    connection.execute("COMMIT")
    return outcomes


def _plainly(connection: sqlite3.Connection, work: _Work) -> _Outcome:
    """Does one thing; what it raises is the end of the whole transaction."""
    return _Outcome(work.future, work.do(connection), None)


def _apart(connection: sqlite3.Connection, work: _Work) -> _Outcome:
    """Does one thing, or leaves all as it was before it.

    Raises:
        sqlite3.Error: the whole transaction is lost.
    """
    connection.execute("SAVEPOINT one")
    try:
        value = work.do(connection)
    except Exception as error:
        if not connection.in_transaction:
            raise  # A full disk and the like: SQLite itself has rolled back, all of it.
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return _Outcome(work.future, None, _told(error))
    connection.execute("RELEASE one")
    return _Outcome(work.future, value, None)


def _read(connection: sqlite3.Connection, work: _Work) -> _Outcome:
    try:
        return _Outcome(work.future, work.do(connection), None)
    except Exception as error:
        return _Outcome(work.future, None, _told(error))


def _undo(connection: sqlite3.Connection) -> None:
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except Exception as error:
        log.warning("A transaction could not be rolled back: %s", _reason(error))


def _told(error: Exception) -> Exception:
    """An error of SQLite means that nothing was done: a failed commit changes nothing."""
    return _unavailable(error, PomeloError) if isinstance(error, sqlite3.Error) else error


def _unavailable(cause: Exception, kind: type[PomeloError]) -> PomeloError:
    error = kind("store_unavailable")
    error.__cause__ = cause
    return error


def _reason(error: Exception) -> str:
    """The message of a SQLite error; of an unexpected error only its type."""
    return str(error) if isinstance(error, sqlite3.Error) else type(error).__name__
