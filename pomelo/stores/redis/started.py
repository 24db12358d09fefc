"""Work that begins at once and ends without its awaiter; in order where it is of one task."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

from pomelo.errors import PomeloError
from pomelo.stores.redis.link import UnknownOutcomeError

T = TypeVar("T")

_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


class Started(Generic[T]):
    """What was started. Awaiting it waits for the outcome; cancelling an awaiter stops nothing."""

    def __init__(self, outcome: "asyncio.Future[T]") -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(self._outcome).__await__()


class Running:
    """All work that was started. Each task's is done in the order in which it was started.

    `limit` is how many seconds the outcome is waited for where work before it hangs. Made inside the
    loop that does the work.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._last: dict[str, asyncio.Task[None]] = {}
        self._all: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(
        self,
        task_id: str,
        work: Callable[[], Awaitable[T]],
        *,
        lasting: bool = False,
        undo: Callable[[], Awaitable[None]] | None = None,
    ) -> Started[T]:
        """Starts `work`. If it is `lasting`, it is done again until the store can be reached; its awaiter
        gets store_unavailable after the first time. `undo` is done where it is unknown whether `work` was."""
        outcome: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            _fail(outcome, PomeloError("store_unavailable"))
            return Started(outcome)
        before = self._last.get(task_id)
        task = self._loop.create_task(self._do(before, work, outcome, lasting, undo))
        self._last[task_id] = task
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

    def _forget(self, task_id: str, task: "asyncio.Task[None]") -> None:
        if self._last.get(task_id) is task:
            del self._last[task_id]

    async def _do(
        self,
        before: "asyncio.Task[None] | None",
        work: Callable[[], Awaitable[T]],
        outcome: "asyncio.Future[T]",
        lasting: bool,
        undo: Callable[[], Awaitable[None]] | None,
    ) -> None:
        try:
            if before is not None:
                done, _ = await asyncio.wait({before}, timeout=self._limit)
                if not done:
                    _fail(outcome, PomeloError("store_unavailable"))
                    await asyncio.wait({before})
                    if undo is not None:
                        return  # Nobody waits for a take any more.
            try:
                value = await work()
            except UnknownOutcomeError as error:
                _fail(outcome, error)
                again = work if lasting else undo
            except PomeloError as error:
                _fail(outcome, error)
                again = work if lasting else None
            else:
                if not outcome.done():
                    outcome.set_result(value)
                return
            if again is not None:
                await _until_done(again)
        except asyncio.CancelledError:
            _fail(outcome, PomeloError("store_unavailable"))
            raise
        except Exception as error:
            _fail(outcome, error)


async def _until_done(work: Callable[[], Awaitable[object]]) -> None:
    pause = _PAUSE
    while True:
        await asyncio.sleep(pause)
        try:
            await work()
        except PomeloError:
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return


def _fail(outcome: "asyncio.Future[Any]", error: Exception) -> None:
    if not outcome.done():
        outcome.set_exception(error)
        # Looked at once, it is not reported as never retrieved when nobody awaits it.
        outcome.exception()
