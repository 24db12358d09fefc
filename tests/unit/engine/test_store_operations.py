"""Operations on a store in the background: which tasks they concern, and how many are retried concurrently."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.engine.ledger import Ledger
from pomelo.engine.store_operations import MAX_CONCURRENT_RETRIES, StoreOperations
from pomelo.errors import PomeloError
from tests.unit.clock import Clock
from tests.unit.engine.failing_store import FailingStore, failing_ledger, reserve
from tests.waiting import until


def test_a_task_is_in_progress_until_its_last_release() -> None:
    operations = StoreOperations(Clock(), lambda result: None)
    operations.acquire("a")
    operations.acquire("a")
    operations.release("a")
    assert operations.concerns("a")
    operations.release("a")
    assert not operations.concerns("a")


async def with_failed_voids() -> tuple[FailingStore, Clock, Ledger]:
    """A ledger with more voids to retry than may run at a time. Its store works again."""
    clock = Clock()
    store, ledger = failing_ledger("void", monotonic=clock)
    for number in range(3 * MAX_CONCURRENT_RETRIES):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    store.errors.clear()
    return store, clock, ledger


async def test_retries_that_hang_are_not_joined_by_more() -> None:
    store, clock, ledger = await with_failed_voids()
    store.waits["void"] = asyncio.Event()
    store.calls.clear()
    clock.now += 100
    for _ in range(3):
        ledger.operations.retry_pending()
        await asyncio.sleep(0)
    assert len(store.calls) == MAX_CONCURRENT_RETRIES
    store.waits["void"].set()
    await ledger.operations.idle()
    assert store.reserved == {}


async def test_a_retry_that_succeeds_starts_the_next() -> None:
    store, clock, ledger = await with_failed_voids()
    clock.now += 100
    ledger.operations.retry_pending()
    await until(lambda: not ledger.operations._in_progress)
    assert store.reserved == {}


async def test_the_last_retries_go_on_after_one_that_fails_and_that_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, _, ledger = await with_failed_voids()
    store.errors["void img_0"] = PomeloError("store_unavailable")
    await ledger.operations.close()
    assert [*store.reserved] == ["img_0"]
    (line,) = caplog.records
    assert line.levelname == "ERROR"
    assert line.getMessage() == "The store did not confirm the end of task img_0"
