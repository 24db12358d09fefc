"""Background work that is done again and again, and that no failure ends."""

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
    """Does `work` every so many seconds, until the task that this runs in is cancelled.

    Nothing that `work` raises ends it. A PomeloError was logged where it was met; what nobody foresaw is
    logged here under `what`. The next round tries again. `immediately`: the first round does not wait.
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
            # Something that it waited for was cancelled, not this task.
            unforeseen.tell(what, error)
        except Exception as error:
            unforeseen.tell(what, error)
        await asyncio.sleep(seconds)
