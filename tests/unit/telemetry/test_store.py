"""The time and the failures of operations on the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import LostReservationError
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.store import TimedLedgerStore
from tests.waiting import until

WALLET = Wallet("acme", live=True)


class Futures:
    """A store whose operations end when a test says so."""

    def __init__(self) -> None:
        self.pending: list[asyncio.Future[Any]] = []

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        future = asyncio.get_running_loop().create_future()
        self.pending.append(future)
        return future

    async def limit_status(self, wallet: Wallet, counters: Any = ()) -> str:
        await self.void(wallet, "")
        return "status"

    async def balance(self, wallet: Wallet) -> str:
        return "balance"


def figures(metrics: Metrics) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the number of operations, and of those that failed, by name."""
    counted = {name: sum(found.counts) for (name,), found in metrics.store_operations.values.items()}
    return counted, {name: count for (name,), count in metrics.store_errors.values.items() if count}


@pytest.fixture(name="store")
async def _store() -> tuple[Any, Futures, Metrics]:
    inner, metrics = Futures(), Metrics()
    timed: Any = TimedLedgerStore(inner, metrics)  # type: ignore[arg-type]
    return timed, inner, metrics


async def test_an_operation_is_counted_at_its_end_even_if_nobody_awaits_it(
    store: tuple[Any, Futures, Metrics],
) -> None:
    timed, inner, metrics = store
    timed.void(WALLET, "task_1")
    assert figures(metrics) == ({}, {})
    inner.pending[0].set_result(None)
    await asyncio.sleep(0)
    assert figures(metrics) == ({"void": 1}, {})


@pytest.mark.parametrize("operation", ["void", "limit_status"])
@pytest.mark.parametrize(
    ("error", "failures"),
    [(None, 0), (PomeloError("store_unavailable"), 1), (OSError(), 1), (LostReservationError("task_1"), 0)],
    ids=["success", "store_unavailable", "an unexpected error", "a lost reservation"],
)
async def test_failures_are_counted_and_passed_on(
    store: tuple[Any, Futures, Metrics], operation: str, error: Exception | None, failures: int
) -> None:
    timed, inner, metrics = store
    began = time.perf_counter()
    awaitable = timed.void(WALLET, "task_1") if operation == "void" else timed.limit_status(WALLET)
    running = asyncio.ensure_future(awaitable)
    await until(lambda: bool(inner.pending))
    if error is None:
        inner.pending[0].set_result(None)
        assert await running == (None if operation == "void" else "status")
    else:
        inner.pending[0].set_exception(error)
        with pytest.raises(type(error)):
            await running
    await asyncio.sleep(0)
    assert figures(metrics) == ({operation: 1}, {operation: failures} if failures else {})
    assert 0 < metrics.store_operations.values[operation,].sum < time.perf_counter() - began


async def test_an_operation_that_the_store_cancels_is_a_failure(store: tuple[Any, Futures, Metrics]) -> None:
    timed, inner, metrics = store
    timed.void(WALLET, "task_1")
    inner.pending[0].cancel()
    await asyncio.sleep(0)
    assert figures(metrics) == ({"void": 1}, {"void": 1})


async def test_other_methods_are_those_of_the_store(store: tuple[Any, Futures, Metrics]) -> None:
    timed, _, metrics = store
    assert await timed.balance(WALLET) == "balance"
    assert figures(metrics) == ({}, {})
