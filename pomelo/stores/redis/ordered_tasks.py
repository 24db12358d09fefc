"""Work that begins at once and ends without its awaiter; in order where it is of one task."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, NamedTuple, TypeVar

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError

T = TypeVar("T")

_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_UNDO_FOR = 30.0
"""Seconds for which undoing a take of unknown outcome is retried. A long outage must not leave a
retry running for each take. `Ledger.reservations` finds what such a take left."""


class Started(Generic[T]):
    """What was started. Awaiting it waits for the outcome; cancelling an awaiter stops nothing."""

    def __init__(self, outcome: asyncio.Future[T]) -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(self._outcome).__await__()


class _Started(NamedTuple):
    task: asyncio.Task[None]
    lasting: bool


class OrderedTasks:
    """All work that was started. Each task's is done in the order in which it was started.

    `limit` is how many seconds the outcome is waited for where work before it hangs. Made inside the
    loop that does the work.
    """

    def __init__(self, limit: float, unforeseen: UnexpectedErrors) -> None:
        self._limit = limit
        self._unforeseen = unforeseen
        self._loop = asyncio.get_running_loop()
        self._last: dict[str, _Started] = {}
        self._all: set[asyncio.Task[None]] = set()
        self._closed = False

    def works_on(self, task_id: str) -> bool:
        """Whether work for a task is running or waiting to run."""
        return task_id in self._last

    def start(
        self,
        task_id: str,
        work: Callable[[], Awaitable[T]],
        *,
        lasting: bool = False,
        undo: Callable[[], Awaitable[None]] | None = None,
    ) -> Started[T]:
        """Starts `work`. `lasting` work ends its task: it is retried after any error until its
        outcome is known, and its awaiter gets store_unavailable after the first attempt. Other work
        that would end the same task meanwhile is dropped: one end is enough. `undo` runs if it is
        unknown whether `work` was done."""
        outcome: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            _fail(outcome, PomeloError("store_unavailable"))
            return Started(outcome)
        before = self._last.get(task_id)
        task = self._loop.create_task(self._do(before, work, outcome, lasting, undo))
        if before is None or not before.lasting:
            self._last[task_id] = _Started(task, lasting)
        self._all.add(task)
        task.add_done_callback(self._all.discard)
        task.add_done_callback(lambda done: self._forget(task_id, done))
        return Started(outcome)

    async def close(self, seconds: float) -> None:
        """Waits for all work; what isn't done after so many seconds is given up."""
        self._closed = True
        if self._all:
            await asyncio.wait(self._all, timeout=seconds)
        for task in self._all:
            task.cancel()
        if self._all:
            await asyncio.wait(self._all)

    def _forget(self, task_id: str, task: asyncio.Task[None]) -> None:
        last = self._last.get(task_id)
        if last is not None and last.task is task:
            del self._last[task_id]

    async def _do(
        self,
        before: _Started | None,
        work: Callable[[], Awaitable[T]],
        outcome: asyncio.Future[T],
        lasting: bool,
        undo: Callable[[], Awaitable[None]] | None,
    ) -> None:
        try:
            if before is not None:
                done, _ = await asyncio.wait({before.task}, timeout=self._limit)
                if not done:
                    _fail(outcome, UnknownOutcomeError("store_unavailable"))
                    if before.lasting or not lasting:
                        return  # The task will be ended, and nobody waits for a take any more.
                    await asyncio.wait({before.task})
            error = await self._try(work, outcome)
            if error is None:
                return
            if lasting:
                await self._until_done(work)
            elif undo is not None and isinstance(error, UnknownOutcomeError):
                await self._until_done(undo, self._loop.time() + _UNDO_FOR)
        except asyncio.CancelledError:
            _fail(outcome, PomeloError("store_unavailable"))
            raise

    async def _try(self, work: Callable[[], Awaitable[T]], outcome: asyncio.Future[T]) -> PomeloError | None:
        """Does work once. Returns why its outcome is unknown, or None if it is known."""
        try:
            value = await work()
        except PomeloError as error:
            _fail(outcome, error)
            return error
        except LostReservationError as error:
            _fail(outcome, error)
        except Exception as error:
            self._unforeseen.log("The store failed at a task", error)
            unknown = UnknownOutcomeError("store_unavailable")
            unknown.__cause__ = error
            _fail(outcome, unknown)
            return unknown
        else:
            if not outcome.done():
                outcome.set_result(value)
        return None

    async def _until_done(self, work: Callable[[], Awaitable[object]], end: float = math.inf) -> None:
        """Repeats work until its outcome is known, or until the time `end`."""
        pause = _PAUSE
        while self._loop.time() < end:
            await asyncio.sleep(pause)
            if await self._try(work, self._loop.create_future()) is None:
                return
            pause = min(2 * pause, _LONGEST_PAUSE)


def _fail(outcome: asyncio.Future[Any], error: Exception) -> None:
    if not outcome.done():
        outcome.set_exception(error)
        # Looked at once, it is not reported as never retrieved when nobody awaits it.
        outcome.exception()
