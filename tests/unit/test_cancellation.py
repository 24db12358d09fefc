"""Cancellation of a task itself differs from that of a future it awaits, and can be reverted."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.process import is_cancelled, uncancel


async def test_a_cancelled_future_does_not_cancel_the_task_that_awaits_it() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    assert not is_cancelled()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancellation_of_the_task_is_seen_and_reverted(times: int) -> None:
    seen = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(is_cancelled())
            uncancel()
            seen.append(is_cancelled())

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
    await task
    assert seen == [True, False]


def test_outside_a_task_everything_counts_as_cancelled() -> None:
    seen: list[bool] = []
    loop = asyncio.new_event_loop()

    def work() -> None:
        uncancel()
        seen.append(is_cancelled())
        loop.stop()

    try:
        loop.call_soon(work)
        loop.run_forever()
    finally:
        loop.close()
    assert seen == [True]
