"""Tasks on a store on Redis whose server fails, and what must be true of them afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.fleet import Fleet
from pomelo.stores.ledger import Reserved, ReserveRequest, Settlement
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.usage import UsageQuery, UsageRecord
from tests.limits import counters, limits
from tests.load.process_usage import clock
from tests.unit.refusals import refused
from tests.waiting import first

WALLET = Wallet("default", True)
ALL = UsageQuery()
CREDITS = 10**12

LATE = 0.3
"""Tolerance for a busy machine, in seconds."""


def record(task_id: str, cost: int = 0, at: float = 0.0) -> UsageRecord:
    return UsageRecord(task_id, "r", "default", True, "k", "rest", "gpt-4", "text", cost=cost, at=at)


def request(task_id: str) -> ReserveRequest:
    return ReserveRequest(record(task_id), 10, 10, counters(tokens=5))


def settlement(task_id: str, cost: int = 7) -> Settlement:
    return Settlement(record(task_id, cost=cost, at=5.0), counters(tokens=5))


async def run(store: Store, task_id: str, cost: int = 7) -> None:
    assert isinstance(await store.reserve(request(task_id)), Reserved)
    assert (await store.settle(settlement(task_id, cost))).record.cost == cost


@asynccontextmanager
async def open_on(url: str, folder: Path, **timing: float) -> AsyncIterator[Store]:
    async with open_redis(url, f"sqlite:{folder / 'usage.db'}", timing=Timing(**timing)) as opened:
        assert isinstance(opened, Fleet)
        opened.drain_usage()
        await opened.grant(Grant("g", WALLET, CREDITS, 1.0))
        yield opened


async def fails_within_a_second(call: Awaitable[Any]) -> None:
    begun = clock()
    with refused("store_unavailable"):
        await call
    assert clock() - begun < 1.0 + LATE


async def wait_until_available(store: Store) -> None:
    async def is_available() -> bool:
        with suppress(PomeloError):
            await store.balance(WALLET)
            return True
        return False

    await first(is_available, bool)


async def wait_until_released(store: Store) -> None:
    await first(store.drafts, lambda drafts: not drafts)


async def audit(store: Store, tasks: set[str], cost: int = 7) -> None:
    """Each task was charged once, and nothing else was charged."""
    kept, after = await store.list_usage(ALL, limit=len(tasks) + 10)
    assert after == ""
    assert sorted(found.task_id for found in kept) == sorted(tasks)
    found = await store.balance(WALLET)
    assert (found.granted, found.spent, found.held) == (CREDITS, sum(r.cost for r in kept), 0)
    assert found.spent == cost * len(tasks)
    assert (await limits(store, WALLET)).concurrency == 0
