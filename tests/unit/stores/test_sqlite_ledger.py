"""What the rows of wallets and reservations have, and for how long."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import Counter, ReserveRequest, Settlement
from pomelo.stores.schema import MIGRATIONS
from pomelo.stores.sqlite import ledger
from pomelo.stores.usage import UsageRecord

WALLET = Wallet("default", False)
IMAGES = Counter("images", 2, None, 86_400.0)
STREAMS = (Counter("streams:ann", 1), Counter("streams:bob", 0))
"""What a task counts while it runs: of one key a stream, of another key none."""


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        for statement in [statement for step in MIGRATIONS for statement in step]:
            opened.execute(statement)
        yield opened


def record(task_id: str, cost: int = 0) -> UsageRecord:
    return UsageRecord(task_id, "req", WALLET.account, WALLET.live, "k", "rest", "m", "text", cost=cost)


def reserve(connection: sqlite3.Connection, now: float, *counters: Counter) -> None:
    ledger.reserve(connection, now, ReserveRequest(record("a"), 10, 10, counters))


def stored(connection: sqlite3.Connection) -> str:
    """The counts in the row of the wallet."""
    row = connection.execute("SELECT counters FROM wallets WHERE account = 'default' AND live = 0").fetchone()
    return str(row[0])


@pytest.mark.parametrize("end", ["settled", "voided", "recovered"])
def test_a_count_of_running_tasks_is_deleted_with_the_last_of_them(
    connection: sqlite3.Connection, end: str
) -> None:
    reserve(connection, 100.0, *STREAMS)
    assert stored(connection) == '{"streams:ann":[1,null,null],"streams:bob":[0,null,null]}'
    if end == "settled":
        ledger.settle(connection, 101.0, Settlement(record("a", 10), STREAMS))
    elif end == "voided":
        ledger.void(connection, 101.0, WALLET, "a", refund=False)
    else:
        ledger.recover(connection, 101.0, WALLET, "a")
    assert stored(connection) == "{}"


def test_a_window_is_deleted_by_the_first_change_after_its_end(connection: sqlite3.Connection) -> None:
    reserve(connection, 100.0, IMAGES, Counter("calls", 1, None, 60.0))
    ledger.void(connection, 160.0, WALLET, "a", refund=False)
    assert stored(connection) == '{"images":[2,100.0,86500.0]}'
    reserve(connection, 86_500.0)
    assert stored(connection) == "{}"
