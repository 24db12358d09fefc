"""Store operations that start immediately and finish without their awaiter, in order for each task."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, NamedTuple, TypeVar

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError

T = TypeVar("T")

_WAIT_INITIAL = 0.05
_WAIT_MAX = 1.0
_MAX_UNDO_TIME = 30.0
"""Seconds for which undoing a reserve with unknown outcome is retried. A long outage must not leave a retry
running for each of them; `Ledger.reservations` finds the reservations that they left."""


class Outcome(Generic[T]):
    """The result of an operation. Cancelling an awaiter does not stop the operation."""

    def __init__(self, future: asyncio.Future[T]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(self._future).__await__()


class _Running(NamedTuple):
    runner: asyncio.Task[None]
    ends_task: bool


class OrderedTasks:
    """All started operations. Those of one task run in the order in which they were started.

    `timeout` is how many seconds an operation waits for an earlier one of its task that hangs. Create it in
    the event loop that runs the operations.
    """

    def __init__(self, timeout: float, unexpected: UnexpectedErrors) -> None:
        self._timeout = timeout
        self._unexpected = unexpected
        self._loop = asyncio.get_running_loop()
        self._last: dict[str, _Running] = {}
        self._all: set[asyncio.Task[None]] = set()
        self._closed = False

    def is_busy(self, task_id: str) -> bool:
        """Whether an operation of a task is running or waiting to run."""
        return task_id in self._last

    def start(
        self,
        task_id: str,
        operation: Callable[[], Awaitable[T]],
        *,
        ends_task: bool = False,
        undo: Callable[[], Awaitable[None]] | None = None,
    ) -> Outcome[T]:
        """Starts an operation. One that ends its task (`ends_task`) is retried after any error until its
        outcome is known, and its awaiter receives store_unavailable after the first attempt; other operations
        that would end the same task meanwhile are dropped. `undo` runs if the outcome of `operation` is
        unknown."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            _fail(future, PomeloError("store_unavailable"))
            return Outcome(future)
        before = self._last.get(task_id)
        runner = self._loop.create_task(self._run(before, operation, future, ends_task, undo))
        if before is None or not before.ends_task:
            self._last[task_id] = _Running(runner, ends_task)
        self._all.add(runner)
        runner.add_done_callback(self._all.discard)
        runner.add_done_callback(lambda done: self._forget(task_id, done))
        return Outcome(future)

    async def close(self, seconds: float) -> None:
        """Waits for all operations, and cancels those that are still running after that many seconds."""
        self._closed = True
        if self._all:
            await asyncio.wait(self._all, timeout=seconds)
        for runner in self._all:
            runner.cancel()
        if self._all:
            await asyncio.wait(self._all)

    def _forget(self, task_id: str, runner: asyncio.Task[None]) -> None:
        last = self._last.get(task_id)
        if last is not None and last.runner is runner:
            del self._last[task_id]

    async def _run(
        self,
        before: _Running | None,
        operation: Callable[[], Awaitable[T]],
        future: asyncio.Future[T],
        ends_task: bool,
        undo: Callable[[], Awaitable[None]] | None,
    ) -> None:
        try:
            if before is not None:
                done, _ = await asyncio.wait({before.runner}, timeout=self._timeout)
                if not done:
                    _fail(future, UnknownOutcomeError("store_unavailable"))
                    if before.ends_task or not ends_task:
                        return  # the task will be ended anyway, or nobody waits for this reserve any more
                    await asyncio.wait({before.runner})
            error = await self._attempt(operation, future)
            if error is None:
                return
            if ends_task:
                await self._retry(operation)
            elif undo is not None and isinstance(error, UnknownOutcomeError):
                await self._retry(undo, self._loop.time() + _MAX_UNDO_TIME)
        except asyncio.CancelledError:
            _fail(future, PomeloError("store_unavailable"))
            raise

    async def _attempt(
        self, operation: Callable[[], Awaitable[T]], future: asyncio.Future[T]
    ) -> PomeloError | None:
        """Runs an operation once. Returns why its outcome is unknown, or None if it is known."""
        try:
            value = await operation()
        except PomeloError as error:
            _fail(future, error)
            return error
        except LostReservationError as error:
            _fail(future, error)
        except Exception as error:
            self._unexpected.log("The store failed at a task", error)
            unknown = UnknownOutcomeError("store_unavailable")
            unknown.__cause__ = error
            _fail(future, unknown)
            return unknown
        else:
            if not future.done():
                future.set_result(value)
        return None

    async def _retry(self, operation: Callable[[], Awaitable[object]], end: float = math.inf) -> None:
        """Repeats an operation until its outcome is known, or until the time `end`."""
        wait = _WAIT_INITIAL
        while self._loop.time() < end:
            await asyncio.sleep(wait)
            if await self._attempt(operation, self._loop.create_future()) is None:
                return
            wait = min(2 * wait, _WAIT_MAX)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Reading it prevents asyncio's message about an exception that nobody retrieved.
        future.exception()
