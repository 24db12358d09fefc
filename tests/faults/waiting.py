"""Waiting for states that have no event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Returns when the condition is true, at the latest after `seconds`; returns how long that took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return time.monotonic() - began


async def first(read: Callable[[], Awaitable[T]], accept: Callable[[T], bool], seconds: float = 30.0) -> T:
    """Returns the first result of `read` that `accept` accepts, at the latest after `seconds`."""
    async with asyncio.timeout(seconds):
        while not accept(result := await read()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return result
