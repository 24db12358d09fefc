"""The sandbox's worker threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

from pomelo.providers.sandbox import Sandbox


async def test_test_tasks_take_no_thread_that_live_tasks_need() -> None:
    sandbox = Sandbox()
    go_on = threading.Event()

    def steps() -> Iterator[int]:
        go_on.wait(10)
        yield 1

    walks = [sandbox._in_thread(steps()) for _ in range(50)]
    tasks = [asyncio.ensure_future(anext(walk)) for walk in walks]
    try:
        async with asyncio.timeout(5):
            await asyncio.to_thread(lambda: None)
    finally:
        go_on.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    for walk in walks:
        await walk.aclose()
    await sandbox.aclose()
