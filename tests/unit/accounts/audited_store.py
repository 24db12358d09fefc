"""Fills a store with accounts and tasks, and corrupts a SQLite file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pomelo.catalog.pricing import Prices, Usage, cost
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest, Settlement
from pomelo.stores.usage import UsageRecord

PRICES = Prices(
    {
        PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS: 2_500_000,
        PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 10_000_000,
    }
)
ACME, ACME_TEST = Wallet("acme", True), Wallet("acme", False)
"""Both modes of the default account of `add_account`."""


async def add_account(store: Store, name: str = "acme", micros: int = 1_000_000) -> None:
    """Adds an account with credits in both modes."""
    assert await store.add_account(name, "pro", 1.0)
    for live in (True, False):
        await store.grant(Grant(f"{name}-{live}", Wallet(name, live), micros, 1.0))


def draft(task_id: str, wallet: Wallet = ACME, **changes: Any) -> UsageRecord:
    """The usage record of a text task."""
    values: dict[str, Any] = {
        "request_id": f"req_{task_id}",
        "account": wallet.account,
        "live": wallet.live,
        "key_id": "k" * 12,
        "wire": "rest",
        "model": "gpt-4",
        "task_type": "text",
        "provider": "openai",
        "provider_model": "gpt-4.1",
        "prices": PRICES.encoded,
        "price_version": "2026-11-22",
        "at": 1000.0,
    }
    return UsageRecord(task_id, **(values | changes))


async def reserve(store: Store, task_id: str, wallet: Wallet = ACME, maximum: int = 5_000) -> None:
    """Begins a task: reserves its maximum cost."""
    await store.reserve(ReserveRequest(draft(task_id, wallet), minimum=1, maximum=maximum))


async def run(store: Store, task_id: str, wallet: Wallet = ACME, **changes: Any) -> UsageRecord:
    """Reserves and settles a task; returns its usage record."""
    counts = {"input_tokens": 100, "output_tokens": 50} | {
        name: changes[name] for name in Usage.__slots__ if name in changes
    }
    record = draft(task_id, wallet, **(counts | changes))
    record = replace(record, cost=cost(Usage(**counts), PRICES))
    await store.reserve(ReserveRequest(replace(record, cost=0), minimum=1, maximum=5_000))
    return (await store.settle(Settlement(record))).record


def corrupt(path: Path, *statements: str) -> None:
    """Runs SQL statements on a store's file without checking its constraints."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            changed = connection.execute(statement)
            assert changed.rowcount, f"nothing was changed by {statement}"
