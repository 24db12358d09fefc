"""Every statement of the SQLite store uses an index of the tables that grow, also for one account."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores.accounts import Grant
from pomelo.stores.acts import Act
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import KEY, MODEL, WALLET, record, request, settlement

SLOW = re.compile(r"SCAN (?!.*INDEX|CONSTANT ROW|q$)|.*TEMP B-TREE FOR.* ORDER BY")
"""A step of a plan that reads a whole table, or sorts what is listed. `q` is a table of one row."""


def key(key_id: str, created: float) -> KeyRecord:
    return KeyRecord(key_id, WALLET.account, WALLET.live, b"digest", (), created)


async def manage(store: Store) -> None:
    """Calls what changes and reads accounts and keys."""
    await store.add_account(WALLET.account, "pro", 1.0, Act("a", 1.0, "create_account", WALLET.account))
    await store.grant(Grant("grant", WALLET, 1_000, 1.0))
    await store.set_credit_limit(WALLET, 5)
    await store.set_plan(WALLET.account, "free")
    await store.set_disabled(WALLET.account, None)
    for number, name in enumerate(("first", "second", "third")):
        await store.add_key(key(name, float(number)))
    await store.replace_key("first", key("fourth", 4.0), 5.0)
    await store.revoke_key("second", 5.0)
    await store.set_budget("third", "5/day")
    await store.record_key_use({"third": 6.0})
    await store.rehash_key("third", b"digest", b"new", "secret")
    await store.keys_of_secret("secret", ["third"])
    await store.get_account(WALLET.account)
    await store.get_grant(WALLET, "grant")
    await store.list_grants(WALLET)
    await store.balance(WALLET)
    await store.list_accounts(after="a")


async def run_tasks(store: Store) -> None:
    """Ends tasks in every way."""
    for task in ("settled", "recovered", "voided"):
        await store.reserve(request(task, idempotency_key=KEY if task == "settled" else None))
    await store.note([record(task, cost=1) for task in ("settled", "recovered", "unknown")])
    await store.settle(settlement("settled", answer=b"answer"))
    await store.settle(settlement("settled"))
    await store.reserve(request("replayed", idempotency_key=KEY))
    await store.recover(WALLET, "recovered")
    await store.void(WALLET, "voided")


async def report(store: Store) -> None:
    """Calls what lists and sums, of one account and of all."""
    for account in (None, WALLET.account):
        await store.list_keys(account, limit=1)
        await store.list_keys(account, limit=1, after=(0.0, "first"))
        await store.list_acts(account, limit=1)
        await store.list_acts(account, since=0.5, limit=1, after=(2.0, "b"))
        for query in (
            UsageQuery(account),
            UsageQuery(account, live=True, model=MODEL, key_id="k" * 12, since=0.5, until=2e12, failed=True),
        ):
            _, after = await store.list_usage(query, limit=1)
            await store.list_usage(query, limit=1, after=after)
            await store.sum_usage(query, ["model"])
    async for _ in store.wallet_states():
        pass


async def test_no_statement_reads_a_whole_table_or_sorts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path):
        pass
    statements: set[str] = set()
    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_trace_callback(statements.add)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        async with open_sqlite(path) as store:
            statements.clear()  # what runs at the start may read everything
            for work in (manage, run_tasks, report):
                await work(store)
            found = sorted(each for each in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)", each))
    assert len(found) > 40
    with closing(sqlite3.connect(path)) as connection:
        for statement in found:
            explained = connection.execute(f"EXPLAIN QUERY PLAN {re.sub(r'-?Inf', '0', statement)}")
            plan = [step for *_, step in explained]
            assert not list(filter(SLOW.match, plan)), statement
            if f" account = '{WALLET.account}'" in statement:
                assert re.search(r"\((account|grant_id)=\?", str(plan)), statement
