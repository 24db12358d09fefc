"""The process and its event loop: cancellation, periodic work, and the limit of file descriptors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors

try:
    import resource
except ImportError:  # Windows has no limit of descriptors
    resource = None  # type: ignore[assignment]

_MAX_DESCRIPTORS = 1 << 20


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


class CancelScope:
    """Cancels the asyncio task that made it, at a time or on demand, as `asyncio.timeout` does, but without a
    context manager. `deadline` is on the event loop's clock, None for none.

    Call `ended_by` once, where the task leaves the scope, with the exception that ends it.
    """

    __slots__ = ("_cancellations", "_left", "_task", "_timer", "expired")

    def __init__(self, deadline: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._cancellations = task.cancelling()
        self._timer = None if deadline is None else loop.call_at(deadline, self.expire)
        self._left = False
        self.expired = False

    def expire(self) -> None:
        """Cancels the task, unless it was done or the scope was stopped. Idempotent."""
        if not self._left:
            self.stop()
            self.expired = True
            self._task.cancel()

    def stop(self) -> None:
        """Cancels the task no more. Idempotent."""
        self._left = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def ended_by(self, error: BaseException | None) -> bool:
        """Whether this scope, and nothing else, cancelled the task, and `error` came of it; undoes the
        cancellation."""
        self._left = True
        if self._timer is not None:
            self.stop()
        if not self.expired:
            return False
        others = self._task.uncancel() > self._cancellations
        return isinstance(error, TimeoutError) or (isinstance(error, asyncio.CancelledError) and not others)


async def periodically(
    work: Callable[[], Awaitable[object]],
    seconds: float,
    description: str,
    unexpected_errors: UnexpectedErrors,
    *,
    immediately: bool = False,
) -> None:
    """Runs `work`, then waits `seconds`, until the current asyncio task is cancelled.

    An exception of `work` does not end it: a PomeloError was logged when it was raised, any other exception
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
