"""Store operations that must succeed: they run even if nobody awaits them, and are retried until their
outcome is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import is_cancelled
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError

WAIT_INITIAL, WAIT_MAX = 0.5, 8.0
"""Seconds before the first retry of an operation, and the longest wait; each wait is twice the one before."""

MAX_CONCURRENT_RETRIES = 64

log = logging.getLogger("pomelo.engine")

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Operation:
    """An idempotent operation that ends a task. `fallback` replaces the retries if the operation is known to
    have failed without effect; with `once` it is not retried. `due` is on the monotonic clock."""

    task_id: str
    work: Callable[[], Awaitable[Any]]
    once: bool
    fallback: Callable[[], object] | None
    wait: float = WAIT_INITIAL / 2
    due: float = 0.0


class StoreOperations:
    """Runs store operations in the background. `monotonic` is in seconds; `on_success` gets the result of
    each operation that ends a task."""

    def __init__(self, monotonic: Callable[[], float], on_success: Callable[[object], None]) -> None:
        self.unexpected = UnexpectedErrors(log)
        self._monotonic = monotonic
        self._on_success = on_success
        self._running: set[asyncio.Future[Any]] = set()
        self._in_progress: dict[str, int] = {}
        """Operations in progress, by task id."""
        self._pending: dict[str, _Operation] = {}
        """Failed operations that wait for a retry, by task id, in the order in which they failed."""
        self._retrying = 0

    def concerns(self, task_id: str) -> bool:
        """Whether an operation for the task is in progress or waits for a retry."""
        return task_id in self._in_progress or task_id in self._pending

    def acquire(self, task_id: str) -> None:
        """Marks the task as in progress until `release`."""
        self._in_progress[task_id] = self._in_progress.get(task_id, 0) + 1

    def release(self, task_id: str) -> None:
        """Ends one `acquire`."""
        left = self._in_progress.pop(task_id) - 1
        if left:
            self._in_progress[task_id] = left

    def start(self, work: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Starts `work` immediately; `idle` waits for it."""
        try:
            awaitable = work()
        except Exception as error:
            awaitable = _raise(error)
        running = awaitable if isinstance(awaitable, asyncio.Future) else asyncio.ensure_future(awaitable)
        if not running.done():
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        return running

    async def finished(self, running: asyncio.Future[T]) -> T:
        """The result of an operation that goes on if this is cancelled.

        Raises:
            PomeloError, LostReservationError: as `outcome`.
        """
        try:
            if not running.done():
                waiter: asyncio.Future[None] = running.get_loop().create_future()
                running.add_done_callback(partial(_wake, waiter))
                await waiter
            return running.result()
        except BaseException as error:
            if (unknown := self._unexpected(error)) is None:
                raise
            raise unknown from error

    def run_in_background(
        self,
        task_id: str,
        work: Callable[[], Awaitable[T]],
        *,
        once: bool = False,
        fallback: Callable[[], object] | None = None,
    ) -> asyncio.Future[T]:
        """Starts an idempotent operation that ends a task immediately, whether or not its future is awaited.

        After any error but LostReservationError it is retried until its outcome is known, unless `once`. A
        `fallback` is called instead of the retries if the operation is known to have failed without effect.
        """
        return self._run(_Operation(task_id, work, once, fallback))

    async def outcome(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of a store operation.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError for any error that the store's contract does
                not list.
            LostReservationError: the store raised it.
        """
        try:
            return await work()
        except BaseException as error:
            if (unknown := self._unexpected(error)) is None:
                raise
            raise unknown from error

    def retry_pending(self) -> None:
        """Retries the operations that are due, at most MAX_CONCURRENT_RETRIES concurrently; a retry that
        succeeds starts the next. So one that always fails delays no other, and a failing store is not
        overloaded."""
        now = self._monotonic()
        due = (operation for operation in self._pending.values() if operation.due <= now)
        for operation in list(islice(due, max(0, MAX_CONCURRENT_RETRIES - self._retrying))):
            self._retry(operation)

    async def idle(self) -> None:
        """Waits for all operations, and retries the pending ones once more. What still fails is ended by the
        store when it is opened next."""
        await self._settled()
        pending = list(self._pending.values())
        for at in range(0, len(pending), MAX_CONCURRENT_RETRIES):
            batch = [one for one in pending[at : at + MAX_CONCURRENT_RETRIES] if one.task_id in self._pending]
            for operation in batch:
                self._retry(operation)
            await self._settled()
            if batch and all(operation.task_id in self._pending for operation in batch):
                return

    async def close(self) -> None:
        """As `idle`, at the end of the process. Logs what still fails: it may be charged too little."""
        try:
            await self.idle()
        finally:
            for task_id in self._pending:
                extra = {"unlimited": True}
                log.error("The store did not confirm the end of task %s", task_id, extra=extra)

    async def _settled(self) -> None:
        while self._running:
            await asyncio.wait(self._running)

    def _run(self, operation: _Operation) -> asyncio.Future[Any]:
        running = self.start(operation.work)
        self.acquire(operation.task_id)

        def done(future: asyncio.Future[Any]) -> None:
            try:
                error = asyncio.CancelledError() if future.cancelled() else future.exception()
                if error is None:
                    self._on_success(future.result())
                elif not isinstance(error, LostReservationError):
                    self._failed(operation, error)
            finally:
                self.release(operation.task_id)

        if running.done():
            done(running)
        else:
            running.add_done_callback(done)
        return running

    def _failed(self, operation: _Operation, error: BaseException) -> None:
        if not isinstance(error, PomeloError):
            error = self._unknown_outcome(error)
        if isinstance(error, UnknownOutcomeError):
            operation.fallback = None  # It may have taken effect: only repeating it shows the outcome.
        if operation.fallback is not None:
            operation.fallback()
        elif not operation.once:
            operation.wait = min(2 * operation.wait, WAIT_MAX)
            operation.due = self._monotonic() + operation.wait
            self._pending[operation.task_id] = operation

    def _retry(self, operation: _Operation) -> None:
        del self._pending[operation.task_id]
        self._retrying += 1

        def done(future: asyncio.Future[Any]) -> None:
            self._retrying -= 1
            if operation.task_id not in self._pending:
                self.retry_pending()

        self._run(operation).add_done_callback(done)

    def _unexpected(self, error: BaseException) -> UnknownOutcomeError | None:
        """The error to raise in place of one that the store's contract does not list; None if it lists the
        error, or if this task was cancelled, and not something inside the store."""
        if isinstance(error, PomeloError | LostReservationError):
            return None
        ended = (
            is_cancelled() if isinstance(error, asyncio.CancelledError) else not isinstance(error, Exception)
        )
        return None if ended else self._unknown_outcome(error)

    def _unknown_outcome(self, error: BaseException) -> UnknownOutcomeError:
        self.unexpected.log("The store failed", error)
        return UnknownOutcomeError("store_unavailable")


def _wake(waiter: asyncio.Future[None], running: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _raise(error: Exception) -> Any:
    raise error
