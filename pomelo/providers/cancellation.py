"""Awaits the code of a plug-in in the current asyncio task, and limits what it can do to that task.

A plug-in can cancel the task that runs it, ignore a cancellation, or wait while it is closed. A task of its
own would contain that, but would cost time for each event of each provider. So its coroutine is driven here
step by step, as `await` does, and the task's count of cancellations is compared before and after each step.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any

CLOSE_TIMEOUT = 1.0
"""Seconds that a provider's code may run after it was cancelled, or asked to close."""


class SelfCancelledError(Exception):
    """The code cancelled the task that it ran in. It was closed, and the cancellation undone."""


class StillRunningError(Exception):
    """The code was still running CLOSE_TIMEOUT seconds after it was cancelled or asked to close. It was
    closed."""


@types.coroutine
def await_bounded(
    call: Callable[[], Awaitable[Any]], loop: asyncio.AbstractEventLoop, *, closing: bool = False
) -> Generator[Any, Any, Any]:
    """Return or raise what `await call()` does. `loop` is the running one: looking it up takes a system call.

    Once the task is cancelled, the code has CLOSE_TIMEOUT seconds to end; with `closing`, from the start.

    Raises:
        SelfCancelledError: the code cancelled the task.
        StillRunningError: the code did not end in time.
        asyncio.CancelledError: the task was cancelled, even if the code ignored that and returned a value.
    """
    task = asyncio.current_task(loop)
    assert task is not None
    before = task.cancelling()
    limit = _CloseTimer(task, -1) if closing else None
    thrown: BaseException | None = None
    steps: Any = None
    try:
        try:
            steps = _steps(call())
        finally:
            if task.cancelling() > before:
                if steps is not None:
                    _close(steps)
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
                limit = _CloseTimer(task, before)
            thrown = None
            try:
                yield waits_for
            except BaseException as error:
                thrown = error
                if limit is not None and limit.take():
                    _close(steps)
                    raise StillRunningError from None
    finally:
        if limit is not None:
            limit.stop()


def _steps(awaitable: Awaitable[Any]) -> Any:
    steps = awaitable.__await__()
    return steps if hasattr(steps, "throw") else _coroutine(awaitable)


async def _coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _undo(task: asyncio.Task[Any], count: int) -> Generator[Any, Any, None]:
    """Undo the cancellations that the last step made.

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
        # In Python 3.11, close() does nothing in a step of an async generator.
        steps.throw(GeneratorExit())


class _CloseTimer:
    """Cancels a task once CLOSE_TIMEOUT has passed, if the task has more than `cancellations` then: the code
    may have handled one, of a timeout inside it."""

    __slots__ = ("_cancellations", "_cancelled", "_task", "_timer", "over")

    def __init__(self, task: asyncio.Task[Any], cancellations: int) -> None:
        self._task = task
        self._cancellations = cancellations
        self._cancelled = False
        self.over = False
        self._timer = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self._cancel)

    def _cancel(self) -> None:
        self.over = True
        if self._task.cancelling() > self._cancellations:
            self._cancelled = True
            self._task.cancel()

    def take(self) -> bool:
        """Return whether the timer has cancelled the task, and undo that cancellation."""
        if self._cancelled:
            self._cancelled = False
            self._task.uncancel()
            return True
        return False

    def stop(self) -> None:
        self._timer.cancel()
        self.take()
