"""The process and its event loop: futures, cancellation, periodic work, and the limit of file descriptors."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Self, TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors

try:
    import resource
except ImportError:  # Windows has no limit of descriptors
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

_MAX_DESCRIPTORS = 1 << 20

_GC_THRESHOLDS = (5_000, 20, 50)
"""Net allocations before a collection of the youngest generation, and collections of each generation before
one of the next."""


def is_cancelled() -> bool:
    """Whether the current asyncio task itself was cancelled. In an `except asyncio.CancelledError` it is
    False if only a future that the task awaited was cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def uncancel() -> None:
    """Reverts the cancellation of the current asyncio task, for one that was cancelled from within."""
    task = asyncio.current_task()
    while task is not None and task.uncancel():
        pass


def resolve(future: asyncio.Future[T], value: T) -> None:
    """Sets the future's result to the value."""
    if not future.done():  # its awaiter may have been cancelled
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Sets the error as the future's exception."""
    if not future.done():  # its awaiter may have been cancelled
        future.set_exception(error)
        # Reading it prevents asyncio's message about an exception that nobody retrieved.
        future.exception()


async def shielded(future: asyncio.Future[T]) -> T:
    """Waits for a future that continues if the caller is cancelled.

    Python 3.14 logs an error of a future that `asyncio.shield` has left; this does not.
    """
    if not future.done():
        waiter = asyncio.get_running_loop().create_future()
        future.add_done_callback(partial(_wake, waiter))
        await waiter
    return future.result()


def _wake(waiter: asyncio.Future[None], future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()  # the caller may be cancelled, so that nobody else retrieves it
    if not waiter.done():
        waiter.set_result(None)


class CancelScope:
    """Cancels an asyncio task at `when`, on the event loop's clock, or on demand.

    As a context manager it raises TimeoutError on leaving, as `asyncio.timeout_at` does. Without one, call
    `start`, and once `ended_by` where the task leaves the scope. Every call needs some, so it has no
    coroutines, and a later time sets the timer again only when it fires.
    """

    __slots__ = ("_cancelling", "_fires", "_task", "_timer", "expired", "when")

    def __init__(self, when: float = math.inf) -> None:
        self.expired = False
        """Whether it has cancelled the task."""
        self.when = when
        """The time at which it cancels the task; `reschedule` changes it."""
        self._fires = -math.inf
        """The time of the timer: inf without a timer, -inf when the scope may set no more timers."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> Self:
        """Begins with the current asyncio task, which is the one to cancel."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._fires = math.inf
        if self.when < math.inf:
            self.reschedule(self.when)
        return self

    def reschedule(self, when: float) -> None:
        """Changes the time, after the start."""
        self.when = when
        if when < self._fires:
            if self._timer is not None:
                self._timer.cancel()
            self._fires = when
            self._timer = self._task.get_loop().call_at(when, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self.when > self._fires:
            self._fires = math.inf
            self.reschedule(self.when)
        else:
            self.expire()

    def expire(self) -> None:
        """Cancels the task, unless the scope has done so, was stopped or was left."""
        if self._fires > -math.inf:
            self.stop()
            self.expired = True
            self._task.cancel()

    def stop(self) -> None:
        """Cancels the task no more. Idempotent."""
        self._fires = -math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def ended_by(self, error: BaseException | None) -> bool:
        """Whether this scope, and nothing else, cancelled the task, and `error` came of it; undoes the
        cancellation. Call it once."""
        self.stop()
        task = self._task
        del self._task  # a cancelled task references its frames, which reference this
        if not self.expired:
            return False
        others = task.uncancel() > self._cancelling
        return isinstance(error, TimeoutError) or (isinstance(error, asyncio.CancelledError) and not others)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.ended_by(error):
            raise TimeoutError from error


async def periodically(
    work: Callable[[], Awaitable[object]],
    seconds: float,
    description: str,
    unexpected_errors: UnexpectedErrors,
    *,
    immediately: bool = False,
) -> None:
    """Runs `work`, then waits `seconds`, until the current asyncio task is cancelled.

    An exception of `work` does not end it: a PomeloError is logged where it is raised, any other exception
    is logged here with `description`, and the next round tries again. `immediately` starts the first round
    without a wait.
    """
    if not immediately:
        await asyncio.sleep(seconds)
    while True:
        try:
            await work()
        except PomeloError:
            pass
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            # Something that `work` awaited was cancelled, not this task.
            unexpected_errors.log(description, error)
        except Exception as error:
            unexpected_errors.log(description, error)
        await asyncio.sleep(seconds)


def defer_garbage_collection() -> None:
    """Leaves what exists now out of all later collections, and makes these less frequent.

    Call this when the program has started. What it has loaded by then lives as long as the process, and a
    full collection that visits it pauses every request. Almost all that a request leaves is freed by its
    reference count; cycles wait longer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def descriptor_limit() -> int:
    """Returns the maximum number of open descriptors of this process; about a million if it is unlimited."""
    if resource is None:
        return _MAX_DESCRIPTORS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> int:
    """Raises the limit of descriptors as far as the system allows, up to about a million, and returns it.

    The limit applies to the whole process and its children: call this at the start of a program.
    """
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
        if limit > descriptor_limit():
            with suppress(ValueError, OSError):  # macOS allows less than it reports
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return descriptor_limit()


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` concurrently with the body, and cancels it on leaving."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await stop(task)


async def stop(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task, if there is one, and waits for its end."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
