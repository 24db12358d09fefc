"""The thread that writes: it commits batches, one at a time. What comes meanwhile is the next batch.

Outcomes are reported only after the commit: a result that a caller receives is on the disk. While they are
reported, no other batch is being written: the file is in the state that the batch's operations have seen.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sized
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import fail, resolve, shielded
from pomelo.stores.base import DECLARED_ERRORS
from pomelo.stores.ledger import UnknownOutcomeError
from pomelo.stores.sqlite.journal import Batch, Done, End, EndedBeforeError, Operation
from pomelo.stores.sqlite.wallets import LoadedWallet

BATCH = 256
"""Maximum number of ends, and of operations, in one transaction."""

COUNTS_DELAY = 0.05
"""Seconds until the counts of a wallet are written if no end of its tasks writes them before."""

MAX_INTERVAL = 0.005
"""Seconds between the beginnings of two batches of ends, while several tasks run. Ends that come in between
share a commit, which costs more than all else that is done for an end."""

QUIET = 0.003
"""Seconds without a beginning or an end of a task after which a batch does not wait for more."""

MAX_IN_VAIN = 6
"""If a batch waits although all tasks have ended, and no other begins, the callers may be waiting for it. The
next 2 batches don't wait for that, after the next wait in vain 4, and so on to 2 to the power of this."""

_LOG_INTERVAL = 5.0
"""Seconds between two log lines about the same failure."""

_REFUSALS = (EndedBeforeError, *DECLARED_ERRORS)
"""What an operation raises because of what is stored, or asked for, not because it can't be written."""

log = logging.getLogger("pomelo.stores")

S = TypeVar("S")
T = TypeVar("T")


def nothing(_: object) -> None:
    """Reads and returns nothing."""


class Target(Protocol):
    """The file that the thread writes to; opened, used and closed in that thread."""

    connection: sqlite3.Connection

    def failed(self, error: BaseException) -> None:
        """Receives the error of an operation that failed, possibly because of the file."""
        ...

    def before_batch(self) -> None:
        """Runs before each transaction, which fails with what it raises."""
        ...

    def between_batches(self) -> None:
        """Runs between two transactions. Raises nothing."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


class Writer:
    """Collects what its thread writes. Create it with `start`, and use it in that event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.unexpected = UnexpectedErrors(log)
        self.closed = False
        """Whether callers are refused. What was queued before is still written."""
        self.failing = False
        """Whether the last attempt to write failed."""
        self._lost = False
        """Whether the log said that an operation failed, and nothing was written since then."""
        self._logged = "", 0.0
        """The last failure in the log, and when it was written there."""
        self._loop = loop
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._ends: list[End] = []
        self._operations: list[Operation] = []
        self._changed: dict[LoadedWallet, None] = {}
        """Wallets whose counts the file does not have."""
        self._changed_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._repeated: deque[End | Operation] = deque()
        """The parts of failed batches, one by one."""
        self._writing: Batch | None = None
        self._tasks: Sized = ()
        """All tasks whose end is not written."""
        self._collecting = False
        """Whether `_collect` is scheduled."""
        self._in_vain = 0
        """Consecutive waits, after all tasks had ended, in which no other began."""
        self._skips = 0
        """The number of batches that don't wait once all tasks have ended."""
        self._begun = 0.0
        """When the last batch was handed to the thread."""
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
            await shielded(opened)
        except asyncio.CancelledError:
            # The thread may still be opening the target, or waiting for its lock.
            await writer.close()
            raise
        return writer

    # --- what is written

    def do(self, work: Callable[[sqlite3.Connection], T], *, reads: bool = False) -> asyncio.Future[T]:
        """Queues `work` immediately. It is done completely or not at all, and sees what was queued before.

        Cancelling the future stops nothing, and it need not be awaited. It raises the errors of `work` that
        the store's roles declare, and PomeloError store_unavailable for all others: UnknownOutcomeError for
        unexpected ones. `reads`: the work changes nothing.
        """
        return self.do_then(work, lambda value: value, reads=reads)

    def do_then(
        self, work: Callable[[sqlite3.Connection], S], then: Callable[[S], T], *, reads: bool = False
    ) -> asyncio.Future[T]:
        """As `do`; returns what `then` makes of the result, in the event loop, before more is written."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self.closed:
            fail(future, PomeloError("store_unavailable"))
        else:
            self.then(lambda value: resolve(future, then(value)), future, work, reads=reads)
        return future

    def then(
        self,
        act: Callable[[Any], None],
        future: asyncio.Future[Any],
        work: Callable[[sqlite3.Connection], Any] = nothing,
        *,
        reads: bool = True,
    ) -> None:
        """Queues `work`, also while the writer is being closed, and calls `act` with its result: it resolves
        the future. Without `work`, `act` follows what was queued before."""

        def done(value: Any, error: Exception | None) -> None:
            if error is not None:
                fail(future, error)
            else:
                self.act(lambda: act(value), future)

        self.queue(work, done, reads=reads)

    def act(self, act: Callable[[], None], future: asyncio.Future[Any]) -> None:
        """Calls `act`, which resolves the future; its errors are raised from the future."""
        try:
            act()
        except Exception as error:
            fail(future, self.translate(error))

    def queue(self, work: Callable[[sqlite3.Connection], Any], done: Done, *, reads: bool) -> None:
        """As `then`; calls `done` with the outcome."""
        self._operations.append(Operation(work, done, reads))
        self._flush()

    def end(self, end: End, tasks: Sized) -> None:
        """Queues the end of a task. `tasks` are all whose end is not written. A task that is alone is written
        immediately; others share a commit with those that end soon."""
        self._ends.append(end)
        self._tasks = tasks
        if self._may_skip():
            self._flush()
        elif self._writing is None and not self._collecting:
            self._collecting = True
            self._loop.call_soon(self._collect)

    def _may_skip(self) -> bool:
        """Whether all tasks have ended, and no batch waits for others to begin."""
        if len(self._tasks) == len(self._ends) and self._skips and self._writing is None:
            self._skips -= 1
            return True
        return len(self._tasks) <= 1

    def _collect(self, seen: tuple[int, int] = (0, 0)) -> None:
        """Hands the ends to the thread MAX_INTERVAL after the last batch, or once no task begins or ends.
        `seen`: the numbers of tasks and ends when it was called before."""
        now = len(self._tasks), len(self._ends)
        wait = self._begun + MAX_INTERVAL - time.monotonic()
        if seen[0] == seen[1] > 0:  # it has waited although all tasks had ended
            self._in_vain = min(self._in_vain + 1, MAX_IN_VAIN) if now == seen else 0
            self._skips = 2**self._in_vain if self._in_vain else 0
        if wait <= 0 or now == seen or not self._ends or self._may_skip():
            self._collecting = False
            self._flush()
        else:
            self._loop.call_later(min(wait, QUIET), self._collect, now)

    def counts_changed(self, wallet: LoadedWallet) -> None:
        """Writes a wallet's counts with the next end of its tasks, or COUNTS_DELAY later."""
        self._changed[wallet] = None
        if self._timer is None and not self.closed:
            self._timer = self._loop.call_later(COUNTS_DELAY, self._counts_due)

    def is_written(self, wallet: LoadedWallet) -> bool:
        """Whether the file has the wallet's counts."""
        return wallet not in self._changed and (self._writing is None or wallet not in self._writing.wallets)

    async def close(self) -> None:
        """Writes what is queued and closes the target. Later operations fail."""
        if not self.closed:
            self.closed = True
            self._flush()
        # A cancelled exit must not leave the file open.
        await shielded(self._ended)

    # --- batches

    def _counts_due(self) -> None:
        self._timer = None
        if self._changed:
            self._changed_due = True
            self._flush()

    def _flush(self) -> None:
        """Hands the next batch to the thread, unless it is writing one."""
        if self._writing is not None:
            return
        batch = self._next_batch()
        if batch is not None:
            self._writing = batch
            self._begun = time.monotonic()
            self._queue.put(batch)
        elif self.closed:
            self._queue.put(None)

    def _next_batch(self) -> Batch | None:
        repeated = bool(self._repeated)
        if repeated:
            part = self._repeated.popleft()
            ends, operations = ([part], []) if isinstance(part, End) else ([], [part])
            due = False
        else:
            ends, operations = self._ends[:BATCH], self._operations[:BATCH]
            del self._ends[:BATCH], self._operations[:BATCH]
            due, self._changed_due = self._changed_due or self.closed, False
        due = due or any(not operation.reads for operation in operations)
        if not ends and not operations and not (due and self._changed):
            return None
        wallets = self._changed if due else ()
        batch = Batch(ends, operations, wallets, repeated=repeated, certainly=self.failing)
        for wallet in batch.wallets:
            self._changed.pop(wallet, None)
        return batch

    def _written(self, batch: Batch, outcomes: list[tuple[Any, Exception | None]] | Exception) -> None:
        """Reports the outcome of a batch, and continues with the next."""
        if isinstance(outcomes, Exception):
            self._failed(batch, outcomes)
        else:
            if batch.writes:
                self.failing = False
                if self._lost:
                    self._lost = False
                    log.warning("The database can be written again")
            for wallet in batch.wallets:
                wallet.stored = True
            for end in batch.ends:
                end.done(None, None)
            for operation, (value, error) in zip(batch.operations, outcomes, strict=True):
                operation.done(value, None if error is None else self.translate(error))
        self._writing = None
        if self._operations or self._repeated or self._changed_due or self.closed:
            self._flush()
        elif self._ends and not self._collecting:
            self._collecting = True
            self._collect()

    def _failed(self, batch: Batch, error: Exception) -> None:
        """Repeats the parts of a batch one by one, so that one that fails does not affect the others. If the
        file is locked, all that write have failed."""
        if not self.closed:
            for wallet in batch.wallets:
                self.counts_changed(wallet)
        operations = batch.operations
        refused = isinstance(error, _REFUSALS)
        if not batch.repeated:
            self.failing = self.failing or (batch.writes and not refused)
            if not _is_locked(error):
                # Operations first: one may have noted a task that ends.
                self._repeated.extend((*operations, *batch.ends))
                return
            # Each part that writes would wait as long again. One that reads needs no lock.
            self._repeated.extend(operation for operation in operations if operation.reads)
            operations = [operation for operation in operations if not operation.reads]
        error = self.translate(error)
        self._lost = self._lost or not refused
        for end in batch.ends:
            end.done(None, error)
        for operation in operations:
            operation.done(None, error)

    def translate(self, error: Exception) -> Exception:
        """The error to raise: store_unavailable in place of all that the roles don't declare. The outcome is
        known after an error of SQLite: a failed commit changes nothing."""
        if isinstance(error, _REFUSALS):
            return error
        known = isinstance(error, sqlite3.Error)
        if not known:
            self.unexpected.log("The store failed", error)
        text, now = str(error) if known else type(error).__name__, time.monotonic()
        if text != self._logged[0] or now - self._logged[1] >= _LOG_INTERVAL:
            self._logged = text, now
            log.warning("An operation failed: %s", text)
        translated = (PomeloError if known else UnknownOutcomeError)("store_unavailable")
        translated.__cause__ = error
        return translated

    # --- in the thread

    def _run(self, open_target: Callable[[], Target], opened: asyncio.Future[None]) -> None:
        try:
            target = open_target()
        except Exception as error:
            self._report(fail, opened, error)
            self._report(resolve, self._ended, None)
            return
        self._report(resolve, opened, None)
        while (batch := self._queue.get()) is not None:
            outcomes: list[tuple[Any, Exception | None]] | Exception
            try:
                target.before_batch()
                outcomes = batch.commit(target.connection)
            except Exception as error:  # no error ends the thread
                outcomes = error
            for failure in _errors(outcomes):
                target.failed(failure)
            self._report(self._written, batch, outcomes)
            try:
                target.between_batches()
            except Exception as error:
                self.unexpected.log("The work between two transactions failed", error)
        try:
            target.close()
        except (sqlite3.Error, OSError) as error:
            self._report(fail, self._ended, error)
        self._report(resolve, self._ended, None)

    def _report(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            return  # the loop is closed; nobody waits


def _is_locked(error: Exception) -> bool:
    """Whether another program has locked the file, so that no part of the batch can be written."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _errors(outcomes: list[tuple[Any, Exception | None]] | Exception) -> list[Exception]:
    if isinstance(outcomes, Exception):
        return [outcomes]
    return [error for _, error in outcomes if error is not None]
