"""Periodic background work that continues after failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pomelo.cancellation import is_cancelled
from pomelo.errors import PomeloError
from pomelo.traces import Unforeseen


async def periodically(
    work: Callable[[], Awaitable[object]],
    seconds: float,
    what: str,
    unforeseen: Unforeseen,
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
            unforeseen.tell(what, error)
        except Exception as error:
            unforeseen.tell(what, error)
        await asyncio.sleep(seconds)
