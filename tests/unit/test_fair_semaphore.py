"""A cancelled waiter of a fair semaphore leaves the queue, and takes no slot with it."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.in_flight import FairSemaphore


async def waiting(semaphore: FairSemaphore, count: int) -> list[asyncio.Task[None]]:
    """Takes the only slot, and starts waiters."""
    await semaphore.acquire("a")
    waiters = [asyncio.create_task(semaphore.acquire("a")) for _ in range(count)]
    await asyncio.sleep(0)
    return waiters


async def test_a_slot_passes_by_a_waiter_that_is_cancelled_before_its_release() -> None:
    semaphore = FairSemaphore(1)
    cancelled, next_one = await waiting(semaphore, 2)
    cancelled.cancel()
    semaphore.release("a")  # the waiter has not seen its cancellation yet
    async with asyncio.timeout(5):
        await next_one
    assert cancelled.cancelled()
    assert semaphore.full("a")


async def test_a_slot_is_free_after_its_only_waiter_was_cancelled() -> None:
    semaphore = FairSemaphore(1)
    (cancelled,) = await waiting(semaphore, 1)
    cancelled.cancel()
    semaphore.release("a")
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not semaphore.full("a")
    async with asyncio.timeout(5):
        await semaphore.acquire("a")
    assert semaphore.full("a")


async def test_a_cancelled_waiter_is_not_kept_in_the_queue() -> None:
    semaphore = FairSemaphore(1)
    (cancelled,) = await waiting(semaphore, 1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not semaphore._owners["a"].waiters
