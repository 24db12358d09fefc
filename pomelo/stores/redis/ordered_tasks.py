"""Store operations that start immediately and finish without their awaiter, in order for each task.

Most operations are one command: it is sent when the operation is started, and its reply is the result. Only
an operation that needs more (a retry, another command, the end of an earlier operation) gets a task of its
own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import fail, resolve
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError
from pomelo.stores.redis.connection import Attempt

T = TypeVar("T")

_WAIT_INITIAL = 0.05
_WAIT_MAX = 1.0
_MAX_UNDO_TIME = 30.0
"""Seconds for which a void, and undoing a reserve with unknown outcome, are retried. A long outage must not
leave a retry running for each of them; `Ledger.reservations` finds the reservations that they left."""


class Operation(NamedTuple, Generic[T]):
    """What an operation does.

    `send` sends its command, or returns None if something else must be done first. `decode` returns the
    result from the reply, and raises any error if that reply is not the end. `complete` does the whole
    operation with retries; it continues with the attempt that `send` has begun, if there is one.
    """

    send: Callable[[], Attempt | None]
    decode: Callable[[Any], T]
    complete: Callable[[Attempt | None], Awaitable[T]]


@dataclass(slots=True, eq=False)
class _Running(Generic[T]):
    """A started operation. `outcome` is its caller's, who may cancel it; that does not stop the operation."""

    task_id: str
    operation: Operation[T]
    outcome: asyncio.Future[T]
    ends_task: bool
    gives_up: bool
    undo: Callable[[], Awaitable[None]] | None
    runner: asyncio.Task[None] | None = None
    finished: asyncio.Future[None] | None = None
    """Done when the operation has ended, if anything waits for that."""

    def ending(self) -> asyncio.Future[None]:
        """The future `finished`, while the operation runs."""
        if self.finished is None:
            self.finished = self.outcome.get_loop().create_future()
        return self.finished


class OrderedTasks:
    """All started operations. Those of one task run in the order in which they were started.

    `timeout` is how many seconds an operation waits for an earlier one of its task that hangs. Create it in
    the event loop that runs the operations.
    """

    def __init__(self, timeout: float, unexpected: UnexpectedErrors) -> None:
        self._timeout = timeout
        self._unexpected = unexpected
        self._loop = asyncio.get_running_loop()
        self._last: dict[str, _Running[Any]] = {}
        self._all: set[_Running[Any]] = set()
        self._closed = False

    def is_busy(self, task_id: str) -> bool:
        """Whether an operation of a task is running or waiting to run."""
        return task_id in self._last

    def start(
        self,
        task_id: str,
        operation: Operation[T],
        *,
        ends_task: bool = False,
        gives_up: bool = False,
        undo: Callable[[], Awaitable[None]] | None = None,
    ) -> asyncio.Future[T]:
        """Starts an operation. Cancelling its future does not stop it.

        One that ends its task (`ends_task`) is retried after any error until its outcome is known, and its
        awaiter receives store_unavailable after the first attempt; other operations that would end the same
        task meanwhile are dropped. `undo` runs if the outcome of `operation` is unknown, and ends its task.
        It is retried for a limited time, and so is an operation that `gives_up`.
        """
        outcome: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            fail(outcome, PomeloError("store_unavailable"))
            return outcome
        running = _Running(task_id, operation, outcome, ends_task, gives_up, undo)
        self._all.add(running)
        before = self._last.get(task_id)
        if before is None or not before.ends_task:
            self._last[task_id] = running
        if before is not None:
            self._run_in_task(running, before)
        elif (attempt := _send(operation)) is not None:
            attempt.reply.add_done_callback(partial(self._replied, running, attempt))
        else:
            self._run_in_task(running)
        return outcome

    async def close(self, seconds: float) -> None:
        """Waits for all operations, and cancels those that are still running after that many seconds."""
        self._closed = True
        if self._all:
            await asyncio.wait([running.ending() for running in self._all], timeout=seconds)
        runners = []
        for running in list(self._all):
            if running.runner is None:
                fail(running.outcome, PomeloError("store_unavailable"))
                self._end(running)
            else:
                running.runner.cancel()
                runners.append(running.runner)
        if runners:
            await asyncio.wait(runners)

    def _replied(self, running: _Running[Any], attempt: Attempt, reply: asyncio.Future[Any]) -> None:
        try:
            result = running.operation.decode(reply.result())
        except (Exception, asyncio.CancelledError):
            if running in self._all:  # not closed meanwhile
                self._run_in_task(running, attempt=attempt)
            return
        if not running.outcome.done():
            running.outcome.set_result(result)
        self._end(running)

    def _run_in_task(
        self, running: _Running[Any], before: _Running[Any] | None = None, attempt: Attempt | None = None
    ) -> None:
        earlier = None if before is None else before.ending()
        ends_task = before is not None and before.ends_task
        running.runner = self._loop.create_task(self._run(running, attempt, earlier, ends_task))
        running.runner.add_done_callback(lambda _: self._end(running))

    def _end(self, running: _Running[Any]) -> None:
        self._all.discard(running)
        if self._last.get(running.task_id) is running:
            del self._last[running.task_id]
        if running.finished is not None and not running.finished.done():
            running.finished.set_result(None)

    async def _run(
        self,
        running: _Running[T],
        attempt: Attempt | None,
        earlier: asyncio.Future[None] | None,
        earlier_ends_task: bool,
    ) -> None:
        operation, outcome = running.operation, running.outcome
        try:
            if earlier is not None:
                done, _ = await asyncio.wait({earlier}, timeout=self._timeout)
                if not done:
                    fail(outcome, UnknownOutcomeError("store_unavailable"))
                    if earlier_ends_task or not running.ends_task:
                        return  # the task will be ended anyway, or nobody waits for this reserve any more
                    await asyncio.wait({earlier})
            error = await self._attempt(partial(operation.complete, attempt), outcome)
            if error is None:
                return
            if running.ends_task:
                await self._retry(partial(operation.complete, None), running.gives_up)
            elif running.undo is not None and isinstance(error, UnknownOutcomeError):
                running.ends_task = True
                await self._retry(running.undo, True)
        except asyncio.CancelledError:
            fail(outcome, PomeloError("store_unavailable"))
            raise

    async def _attempt(
        self, operation: Callable[[], Awaitable[T]], future: asyncio.Future[T]
    ) -> PomeloError | None:
        """Runs an operation once. Returns why its outcome is unknown, or None if it is known."""
        try:
            value = await operation()
        except PomeloError as error:
            fail(future, error)
            return error
        except LostReservationError as error:
            fail(future, error)
        except Exception as error:
            self._unexpected.log("The store failed at a task", error)
            unknown = UnknownOutcomeError("store_unavailable")
            unknown.__cause__ = error
            fail(future, unknown)
            return unknown
        else:
            resolve(future, value)
        return None

    async def _retry(self, operation: Callable[[], Awaitable[object]], gives_up: bool) -> None:
        """Repeats an operation until its outcome is known."""
        wait, end = _WAIT_INITIAL, self._loop.time() + (_MAX_UNDO_TIME if gives_up else math.inf)
        while self._loop.time() < end:
            await asyncio.sleep(wait)
            if await self._attempt(operation, self._loop.create_future()) is None:
                return
            wait = min(2 * wait, _WAIT_MAX)


def _send(operation: Operation[Any]) -> Attempt | None:
    try:
        return operation.send()
    except Exception:
        return None  # `complete` raises it again, and handles it
