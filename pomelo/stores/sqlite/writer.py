"""The thread that writes: callers queue operations, and it commits the queued ones in one transaction.

Futures are resolved only after the commit: a result that a caller receives is on the disk.
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
"""Maximum number of operations in one transaction."""

log = logging.getLogger("pomelo.stores")

T = TypeVar("T")


class Target(Protocol):
    """The file that the thread writes to; opened, used and closed in that thread."""

    connection: sqlite3.Connection

    def failed(self, error: BaseException) -> None:
        """Receives the error of an operation that failed, possibly because of the file."""
        ...

    def between_batches(self) -> None:
        """Runs between two transactions. Raises nothing."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


class _Operation(NamedTuple):
    """A queued operation and its result. `reads`: it changes nothing."""

    run: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    reads: bool


class _Outcome(NamedTuple):
    future: asyncio.Future[Any]
    value: Any
    error: Exception | None


class Writer:
    """Queues operations for its thread. Create it with `start`, and use it in that event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.unexpected = UnexpectedErrors(log)
        self._loop = loop
        self._queue: SimpleQueue[_Operation | None] = SimpleQueue()
        self._closed = False
        self._ending = False
        self._ended: asyncio.Future[None] = loop.create_future()

    @classmethod
    async def start(cls, open_target: Callable[[], Target]) -> Writer:
        """Opens the target in a new thread.

        Raises:
            Exception: raised by `open_target`.
        """
        loop = asyncio.get_running_loop()
        writer = cls(loop)
        opened: asyncio.Future[None] = loop.create_future()
        # A daemon: the thread does not keep a process alive that ends without closing, as in a crash.
        threading.Thread(target=writer._run, args=(open_target, opened), name="sqlite", daemon=True).start()
        try:
            await asyncio.shield(opened)
        except asyncio.CancelledError:
            # The thread may still be opening the target, or waiting for its lock.
            await writer.close()
            raise
        return writer

    def do(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> asyncio.Future[T]:
        """Queues `work` immediately. It is done completely or not at all, in the order of the calls.

        Cancelling the future stops nothing, and it need not be awaited. It raises the errors of `work` that
        the store's roles declare, and PomeloError store_unavailable for all others: UnknownOutcomeError for
        unexpected ones. `reads`: the work changes nothing.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            _fail(future, PomeloError("store_unavailable"))
        else:
            self._queue.put(_Operation(work, future, reads))
        return future

    async def close(self) -> None:
        """Finishes the queued operations and closes the target. Later operations fail."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        # A cancelled exit must not leave the file open.
        await asyncio.shield(self._ended)

    # --- in the thread

    def _run(self, open_target: Callable[[], Target], opened: asyncio.Future[None]) -> None:
        try:
            target = open_target()
        except Exception as error:
            self._closed = True
            self._report([_Outcome(opened, None, error), _Outcome(self._ended, None, None)])
            return
        self._report([_Outcome(opened, None, None)])
        failed: Exception | None = None
        while not self._ending:
            if batch := self._gather():
                self._report(self._run_batch(target, batch))
                try:
                    target.between_batches()
                except Exception as error:  # nobody would run the next batch
                    self.unexpected.log("The work between two transactions failed", error)
        try:
            target.close()
        except (sqlite3.Error, OSError) as error:
            failed = error
        self._report([_Outcome(self._ended, None, failed)])

    def _run_batch(self, target: Target, batch: list[_Operation]) -> list[_Outcome]:
        """Runs a batch and returns the outcome of each operation. No error ends the thread."""
        try:
            outcomes = _commit(target.connection, batch)
        except Exception as error:
            outcomes = [_Outcome(operation.future, None, error) for operation in batch]
        for outcome in outcomes:
            if outcome.error is not None:
                target.failed(outcome.error)
        return [
            outcome
            if outcome.error is None or isinstance(outcome.error, DECLARED_ERRORS)
            else outcome._replace(error=self._translate(outcome.error))
            for outcome in outcomes
        ]

    def _translate(self, error: Exception) -> PomeloError:
        self.unexpected.log("The store failed", error)
        return _unavailable(error, UnknownOutcomeError)

    def _gather(self) -> list[_Operation]:
        """Waits for an operation, and takes all that are queued."""
        batch: list[_Operation] = []
        while len(batch) < BATCH and not (batch and self._queue.empty()):
            operation = self._queue.get()
            if operation is None:
                self._ending = True  # nothing is queued after it
                break
            batch.append(operation)
        return batch

    def _report(self, outcomes: list[_Outcome]) -> None:
        with suppress(RuntimeError):  # the loop is closed; nobody waits
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: list[_Outcome]) -> None:
    for future, value, error in outcomes:
        if future.done():
            continue  # its awaiter was cancelled
        if error is None:
            future.set_result(value)
        else:
            _fail(future, error)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    future.set_exception(error)
    # Reading it prevents asyncio's message about an exception that nobody retrieved.
    future.exception()


def _commit(connection: sqlite3.Connection, batch: list[_Operation]) -> list[_Outcome]:
    """Runs a batch in one transaction. An operation that fails does not affect the others."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")  # of an earlier batch that could not be rolled back
    if all(operation.reads for operation in batch):
        return [_read(connection, operation) for operation in batch]
    try:
        # Savepoints are a third of the statements, and each statement has to win the interpreter's lock back
        # from the loop's thread. Almost always nothing fails, so the first attempt does without them.
        outcomes = _transact(connection, batch, _run_plain)
    except Exception:
        _rollback(connection)
    else:
        return outcomes
    try:
        return _transact(connection, batch, _run_in_savepoint)
    except Exception as error:
        log.warning("%d operations were not committed: %s", len(batch), _reason(error))
        _rollback(connection)
        # What was read may have been part of this transaction: it is read again.
        return [
            _read(connection, operation)
            if operation.reads and not connection.in_transaction
            else _Outcome(operation.future, None, _translate_sqlite_error(error))
            for operation in batch
        ]


def _transact(
    connection: sqlite3.Connection,
    batch: list[_Operation],
    run: Callable[[sqlite3.Connection, _Operation], _Outcome],
) -> list[_Outcome]:
    connection.execute("BEGIN IMMEDIATE")
    outcomes = [run(connection, operation) for operation in batch]
    connection.execute("COMMIT")
    return outcomes


def _run_plain(connection: sqlite3.Connection, operation: _Operation) -> _Outcome:
    return _Outcome(operation.future, operation.run(connection), None)


def _run_in_savepoint(connection: sqlite3.Connection, operation: _Operation) -> _Outcome:
    """Runs one operation, or undoes it.

    Raises:
        sqlite3.Error: the whole transaction is lost.
    """
    connection.execute("SAVEPOINT one")
    try:
        value = operation.run(connection)
    except Exception as error:
        if not connection.in_transaction:
            raise  # SQLite has rolled back everything, for example because the disk is full
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return _Outcome(operation.future, None, _translate_sqlite_error(error))
    connection.execute("RELEASE one")
    return _Outcome(operation.future, value, None)


def _read(connection: sqlite3.Connection, operation: _Operation) -> _Outcome:
    try:
        return _Outcome(operation.future, operation.run(connection), None)
    except Exception as error:
        return _Outcome(operation.future, None, _translate_sqlite_error(error))


def _rollback(connection: sqlite3.Connection) -> None:
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except Exception as error:
        log.warning("A transaction could not be rolled back: %s", _reason(error))


def _translate_sqlite_error(error: Exception) -> Exception:
    """store_unavailable with a known outcome for an error of SQLite: a failed commit changes nothing."""
    return _unavailable(error, PomeloError) if isinstance(error, sqlite3.Error) else error


def _unavailable(cause: Exception, error_type: type[PomeloError]) -> PomeloError:
    error = error_type("store_unavailable")
    error.__cause__ = cause
    return error


def _reason(error: Exception) -> str:
    """The message of a SQLite error, or the type of an unexpected error."""
    return str(error) if isinstance(error, sqlite3.Error) else type(error).__name__
