"""Iterations of the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


async def iterations(count: int = 5) -> None:
    """Runs `count` iterations: by default those that ready tasks need."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """The seconds that each iteration of the loop takes within the context."""
    loop = asyncio.get_running_loop()
    taken: list[float] = []

    async def watch() -> None:
        before = loop.time()
        while True:
            await asyncio.sleep(0)
            taken.append(loop.time() - before)
            before = loop.time()

    watching = asyncio.create_task(watch())
    try:
        yield taken
    finally:
        watching.cancel()
