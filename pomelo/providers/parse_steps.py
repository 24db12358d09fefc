"""Awaits the code of a plug-in in the caller's own task, and bounds what it can do to that task.

A plug-in can cancel the task that runs it, ignore a cancellation, or wait while it is closed. A task of its
own would contain that, but would cost every event of every provider. So its coroutine is driven here step by
step, as `await` does, and the task's count of cancellations is compared before and after each step.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any

CLOSING = 1.0
"""Seconds that a provider's code may go on after it was cancelled, or asked to close."""


class SelfCancelledError(Exception):
    """The code cancelled the task that it ran in. It was closed, and the cancellation undone."""


class NotEndedError(Exception):
    """The code was still running CLOSING seconds after it was cancelled or asked to close, and was closed."""


@types.coroutine
def bounded(
    make: Callable[[], Awaitable[Any]], loop: asyncio.AbstractEventLoop, *, closing: bool = False
) -> Generator[Any, Any, Any]:
    """What `await make()` gives or raises. `loop` is the running one: looking it up takes a system call.

    Once the task is cancelled, the code has CLOSING seconds to end; with `closing`, from the start.

    Raises:
        SelfCancelledError, NotEndedError: what each says.
        asyncio.CancelledError: the task was cancelled, also where the code ignored that and gave something.
    """
    task = asyncio.current_task(loop)
    assert task is not None
    before = task.cancelling()
    limit = _Limit(task, -1) if closing else None
    thrown: BaseException | None = None
    try:
        try:
            steps = _steps(make())
        finally:
            if task.cancelling() > before:
                yield from _undo(task, before)
        while True:
            count = task.cancelling()
            try:
                waits_for = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as end:
                if task.cancelling() > count:
                    yield from _undo(task, count)
                if task.cancelling() > before:
                    raise asyncio.CancelledError from None
                return end.value
            except BaseException:
                if task.cancelling() > count:
                    yield from _undo(task, count)
                raise
            if task.cancelling() > count:
                _close(steps)
                yield from _undo(task, count)
            if thrown is not None and task.cancelling() > before and (limit is None or limit.over):
                limit = _Limit(task, before)
            thrown = None
            try:
                yield waits_for
            except BaseException as error:
                thrown = error
                if limit is not None and limit.take():
                    _close(steps)
                    raise NotEndedError from None
    finally:
        if limit is not None:
            limit.stop()


def _steps(awaitable: Awaitable[Any]) -> Any:
    steps = awaitable.__await__()
    return steps if hasattr(steps, "throw") else _coroutine(awaitable)


async def _coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _undo(task: asyncio.Task[Any], count: int) -> Generator[Any, Any, None]:
    """Undoes the cancellations that the last step made.

    Raises:
        SelfCancelledError: always.
    """
    own = task.cancelling() - count
    with suppress(asyncio.CancelledError):
        yield  # uncancel() alone leaves the CancelledError pending
    for _ in range(own):
        task.uncancel()
    raise SelfCancelledError


def _close(steps: Any) -> None:
    with suppress(BaseException):
        # Python 3.11 does nothing in an async generator's step on close().
        steps.throw(GeneratorExit())


class _Limit:
    """Wakes a task with a cancellation of its own when the time for closing is over, if it still has more
    than `most` cancellations then: the code may have handled one that was of a timeout within it."""

    __slots__ = ("_cancelled", "_most", "_task", "_timer", "over")

    def __init__(self, task: asyncio.Task[Any], most: int) -> None:
        self._task = task
        self._most = most
        self._cancelled = False
        self.over = False
        self._timer = asyncio.get_running_loop().call_later(CLOSING, self._cancel)

    def _cancel(self) -> None:
        self.over = True
        if self._task.cancelling() > self._most:
            self._cancelled = True
            self._task.cancel()

    def take(self) -> bool:
        """Whether the time is over; takes back the cancellation that said so."""
        if self._cancelled:
            self._cancelled = False
            self._task.uncancel()
            return True
        return False

    def stop(self) -> None:
        """The code has ended."""
        self._timer.cancel()
        self.take()
