"""Waits for conditions and states that have no event, and for cancelled tasks; measures waits on a busy machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


async def until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Returns when a condition is true, and how long that took; raises TimeoutError if it is not within
    `seconds`."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return time.monotonic() - began


async def first(read: Callable[[], Awaitable[T]], accept: Callable[[T], bool], seconds: float = 30.0) -> T:
    """Returns the first result of `read` that `accept` accepts; raises as `until`."""
    pause = 0.005
    async with asyncio.timeout(seconds):
        while not accept(result := await read()):
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.2)  # a long wait does not occupy the machine
    return result


async def soon(measure: Callable[[int], Awaitable[float]], seconds: float) -> None:
    """Asserts that one of a few measurements takes less than `seconds`, or a smaller share of a time: a busy machine
    can only delay. `measure` is called with the number of the measurement."""
    waits: list[float] = []
    while not waits or min(waits) >= seconds:
        assert len(waits) < 5, f"not less than {seconds}: {waits}"
        waits.append(await measure(len(waits)))


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancels a task, and asserts that it ends as cancelled."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
