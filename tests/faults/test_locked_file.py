"""Another program locks the database: callers are refused soon, and nothing is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import Settlement
from pomelo.stores.sqlite import open_sqlite
from tests.app import run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body
from tests.unit.accounts.audited_store import ACME, add_account, draft, reserve

TASKS = [f"task_{number}" for number in range(30)]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program writes to the file, and does not commit."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", isolation_level=None, uri=True)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def code(outcome: object) -> str:
    return outcome.code if isinstance(outcome, PomeloError) else "ok"


async def test_one_wait_for_a_lock_refuses_all_that_wait_and_reads_are_served(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        for task_id in TASKS:
            await reserve(store, task_id)
        with locked(path):
            # One by one, they would wait for a minute and a half.
            async with asyncio.timeout(20):
                settling = asyncio.gather(
                    *(store.settle(Settlement(draft(each, cost=7))) for each in TASKS), return_exceptions=True
                )
                assert await store.get_account("acme") is not None
                assert {code(outcome) for outcome in await settling} == {"store_unavailable"}
                with pytest.raises(PomeloError):
                    await reserve(store, "task_new")
        await asyncio.gather(*(store.settle(Settlement(draft(each, cost=7))) for each in TASKS))
        balance = await store.balance(ACME)
        assert (balance.held, balance.spent) == (0, 7 * len(TASKS))


async def test_callers_whose_keys_must_be_read_get_store_unavailable(tmp_path: Path) -> None:
    async with run_app(tmp_path) as app:
        accounts = [(await app.account("all"), protocol) for protocol in PROTOCOLS for _ in range(8)]
        body = text_body("Hello")
        with locked(tmp_path / "data" / "pomelo.db"):
            async with asyncio.timeout(20):
                for _ in range(2):
                    calls = (app.ask(protocol, account.test, body) for account, protocol in accounts)
                    codes = {outcome.code for outcome in await asyncio.gather(*calls)}
                    assert codes == {"store_unavailable"}
