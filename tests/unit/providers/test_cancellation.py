"""What the code of a plug-in can't do to the task that runs it."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from pomelo.providers.cancellation import SelfCancelledError, await_bounded
from tests.waiting import cancel


async def test_a_value_after_a_cancellation_that_was_ignored_is_not_returned() -> None:
    began = asyncio.Event()

    async def ignore() -> int:
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return 7

    async def call() -> None:
        await await_bounded(ignore, asyncio.get_running_loop())

    task = asyncio.create_task(call())
    await began.wait()
    await cancel(task)


async def answer() -> int:
    return 7


async def stream() -> AsyncIterator[int]:
    yield 7


class Future:
    """An awaitable whose steps have no method `throw`."""

    def __await__(self) -> Any:
        return iter(())


# Python warns of a coroutine that was never awaited, and since 3.13 of a step of an async generator.
@pytest.mark.parametrize("method", [answer, lambda: stream().__anext__(), Future])
async def test_a_call_that_cancels_its_task_leaves_nothing_that_was_never_awaited(
    method: Callable[[], Awaitable[Any]],
) -> None:
    def call() -> Awaitable[Any]:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        return method()

    gc.collect()  # what other tests have left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SelfCancelledError):
            await await_bounded(call, asyncio.get_running_loop())
        gc.collect()
    assert [str(one.message) for one in caught if "never awaited" in str(one.message)] == []
