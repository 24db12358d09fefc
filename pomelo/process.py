"""The process and its event loop: cancellation, periodic work, and the limit of file descriptors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_MAX_DESCRIPTORS = 1 << 20


def is_cancelled() -> bool:
    """Whether the current task itself was cancelled. False in an `except asyncio.CancelledError` that is due
    to a future which the task awaited: raised on, that would end a task which nobody cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def uncancel() -> None:
    """Undoes the cancellation of the current task, which something within it has cancelled."""
    task = asyncio.current_task()
    while task is not None and task.uncancel():
        pass


async def periodically(
    work: Callable[[], Awaitable[object]],
    seconds: float,
    what: str,
    unforeseen: UnexpectedErrors,
    *,
    immediately: bool = False,
) -> None:
    """Runs `work`, then waits `seconds`, until the current asyncio task is cancelled.

    No exception of `work` ends it. A PomeloError was logged where it was raised; any other
    exception is logged here under `what`. The next round tries again. `immediately`: the first
    round does not wait.
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
            unforeseen.log(what, error)
        except Exception as error:
            unforeseen.log(what, error)
        await asyncio.sleep(seconds)


def descriptor_limit() -> int:
    """How many descriptors this process may have open; a million where nothing limits them."""
    if resource is None:
        return _MAX_DESCRIPTORS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> int:
    """Raises the limit as far as the system lets this process, up to a million, and returns it.

    The limit applies to the whole process and its children: call this at the start of a program.
    """
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
        if wanted > descriptor_limit():
            with suppress(ValueError, OSError):  # macOS allows less than it reports
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()
