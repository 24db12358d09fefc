"""Waits for conditions, and for cancelled tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Returns when a condition is true; raises TimeoutError if it is not within `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (the condition has no event)
            await asyncio.sleep(0.01)


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancels a task, and asserts that it ends as cancelled."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
