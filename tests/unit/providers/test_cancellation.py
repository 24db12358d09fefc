"""What the code of a plug-in can't do to the task that runs it."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.providers.cancellation import await_bounded


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
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
