"""The sandbox's worker threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

from pomelo.providers.sandbox import Sandbox


async def test_sandbox_tasks_do_not_occupy_the_threads_of_live_tasks() -> None:
    sandbox = Sandbox()
    proceed = threading.Event()

    def steps() -> Iterator[int]:
        proceed.wait(60)
        yield 1

    iterators = [sandbox._in_thread(steps()) for _ in range(50)]
    tasks = [asyncio.ensure_future(anext(iterator)) for iterator in iterators]
    try:
        async with asyncio.timeout(20):
            await asyncio.to_thread(lambda: None)
    finally:
        proceed.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    for iterator in iterators:
        await iterator.aclose()
    await sandbox.aclose()
