"""Files of earlier versions are opened by this one."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.audit import audit
from pomelo.stores.accounts import AccountRecord, Balance, Grant, Wallet
from pomelo.stores.base import Store, StoreError
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import (
    Count,
    Counter,
    IdempotencyKey,
    LostReservationError,
    Refused,
    Reserved,
    ReserveRequest,
    Settlement,
)
from pomelo.stores.schema import ARCHIVE_MIGRATIONS, MIGRATIONS
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.usage import UsageRecord
from tests.contract.earlier_files import left_by, open_at
from tests.contract.ledger_rig import wallets
from tests.limits import counters


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file as version 1 left it."""
    return left_by(1, tmp_path)


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(path) as opened:
        yield opened


async def test_a_file_of_version_1_keeps_its_keys(store: Store) -> None:
    assert await store.list_keys() == [
        KeyRecord("k1", "default", True, b"\x00\xff", ("gpt-4",), 1790000001.5),
        KeyRecord("k2", "default", False, b"\x01", (), 1790000002.5, 1890000000.5, 1790000003.5),
        KeyRecord("k3", "acme", False, b"\x02", (), 1790000004.5),
    ]


async def test_accounts_of_version_1_get_the_plan_with_their_former_limits(store: Store) -> None:
    accounts = await store.list_accounts()
    assert [(account.name, account.plan) for account in accounts] == [("acme", "pro"), ("default", "pro")]
    assert all(account.created > 1.7e9 for account in accounts)


async def test_the_default_account_of_version_1_gets_test_credits_once(path: Path) -> None:
    for _ in range(2):
        async with open_sqlite(path) as store:
            assert await store.balance(Wallet("default", False)) == Balance(100_000_000)
            assert len(await store.list_grants(Wallet("default", False))) == 1
            assert await store.balance(Wallet("acme", False)) == Balance()
            assert await wallets(store) == [Wallet("default", False)]


async def test_an_account_can_be_added_to_a_file_of_version_1(store: Store) -> None:
    assert await store.add_account("bee", "free", 2.0)
    assert await store.get_account("bee") == AccountRecord("bee", "free", 2.0)


async def test_a_failed_migration_leaves_the_file_unchanged(path: Path) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.execute("CREATE TABLE usage (mine TEXT)")
        before = list(old.iterdump())
    with pytest.raises(StoreError):
        async with open_sqlite(path):
            pass
    with closing(sqlite3.connect(path)) as old:
        assert list(old.iterdump()) == before


async def test_a_migrated_file_has_the_tables_of_a_new_file(path: Path, tmp_path: Path) -> None:
    async with open_sqlite(path), open_sqlite(tmp_path / "new" / "pomelo.db"):
        pass
    tables = []
    for file in (path, tmp_path / "new" / "pomelo.db"):
        with closing(sqlite3.connect(file)) as opened:
            found = opened.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
            tables.append([(name, " ".join((sql or "").split())) for name, sql in found])
            assert opened.execute("SELECT max(version) FROM migrations").fetchone() == (len(MIGRATIONS),)
            assert opened.execute("PRAGMA foreign_key_check").fetchall() == []
            assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [t for t in tables[0] if t[0] != "migrations"] == [t for t in tables[1] if t[0] != "migrations"]


def test_released_migrations_do_not_change() -> None:
    for released, digest in (
        (MIGRATIONS[:4], "9e5717589fb83e16"),
        (MIGRATIONS[:5], "c6c9f490a583131c"),
        (MIGRATIONS[:6], "728233f95050fc57"),
        (ARCHIVE_MIGRATIONS[:2], "0207ce59b24e213c"),
        (ARCHIVE_MIGRATIONS[:3], "72af5fda90775567"),
    ):
        statements = [" ".join(statement.split()) for step in released for statement in step]
        assert hashlib.sha256("\n".join(statements).encode()).hexdigest().startswith(digest)


# --- version 4: limits in columns of their own


ACME = Wallet("acme", True)

AT_4 = 1_795_663_008.1435897
"""When version 4 ended: four tasks of acme run, and a minute has begun 30 s earlier."""

COUNTERS_4 = (*counters(), Counter('tokens:claude-"3"', 0, None, 60.0))


def record(task_id: str, **changes: Any) -> UsageRecord:
    """A record of the account acme."""
    return UsageRecord(task_id, "req", "acme", True, "k1", "rest", "gpt-4", "text", **changes)


@pytest.fixture
async def migrated(tmp_path: Path) -> AsyncIterator[Store]:
    """The store in a file that version 4 left when its process died."""
    async with open_at(left_by(4, tmp_path), AT_4) as opened:
        yield opened


async def counts_4(store: Store) -> list[int]:
    """What acme has used of COUNTERS_4."""
    counts = (await store.limit_status(ACME, COUNTERS_4)).counts
    return [counts[counter.name].used for counter in COUNTERS_4]


async def test_open_windows_of_version_4_still_count_and_its_tasks_do_not(migrated: Store) -> None:
    status = await migrated.limit_status(ACME, COUNTERS_4)
    assert status.available == 1_000_000 - 320 - 25
    assert await counts_4(migrated) == [4, 0, 332, 50]
    starts = (1795662978.1435897, 1795662978.1435897, 1795662987.8935897)
    windowed = [status.counts[counter.name] for counter in COUNTERS_4 if counter.window]
    assert [count.reset for count in windowed] == [start + 60.0 - AT_4 for start in starts]
    other = await migrated.limit_status(Wallet("acme", False), COUNTERS_4)
    assert set(other.counts.values()) == {Count()}  # its windows have ended


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ((5, 1, 1, 333), None),
        ((4, 0, 1, 332), "requests"),
        ((5, 0, 1, 332), "concurrency"),
        ((5, 1, 1, 332), "tokens:gpt-4"),
    ],
)
async def test_new_tasks_count_in_the_windows_of_version_4(
    migrated: Store, limits: tuple[int, int, int, int], refused: str | None
) -> None:
    answer = await migrated.reserve(ReserveRequest(record("new"), 0, 0, counters(*limits)))
    if refused is None:
        assert isinstance(answer, Reserved)
        assert await counts_4(migrated) == [5, 1, 333, 50]
    else:
        assert isinstance(answer, Refused)
        assert answer.counter == refused


async def test_grants_of_version_4_stay_and_can_be_corrected(migrated: Store) -> None:
    grants = await migrated.list_grants(ACME)
    assert sum(grant.amount for grant in grants) == 1_000_000
    assert await migrated.grant(Grant("back", ACME, -345, 2.0)) == Balance(1_000_000 - 345, 345, 0)
    assert await migrated.set_credit_limit(ACME, 5) == Balance(1_000_000 - 345, 345, 0, 5)
    assert [grant for grant in await migrated.list_grants(ACME) if grant.amount > 0] == grants
    assert await migrated.list_acts(limit=9) == []
    assert not (await audit(migrated)).findings


@pytest.mark.parametrize("task_id", ["task_1", "task_2", "task_3", "task_4"])
async def test_tasks_of_version_4_can_not_be_ended_twice(migrated: Store, task_id: str) -> None:
    actual = tuple(Counter(counter.name, 9, None, 60.0) for counter in COUNTERS_4[2:])
    with pytest.raises(LostReservationError):
        await migrated.settle(Settlement(record(task_id, cost=7), actual))
    await migrated.void(ACME, task_id, refund=True)
    assert await migrated.note([record(task_id)]) == [task_id]
    assert await counts_4(migrated) == [4, 0, 332, 50]
    assert await migrated.balance(ACME) == Balance(1_000_000, 320 + 25, 0)


async def test_tasks_of_version_4_are_recovered_and_its_minute_goes_on(tmp_path: Path) -> None:
    path = left_by(4, tmp_path)
    for _ in range(2):
        async with open_at(path, AT_4) as store:
            assert await store.reservations() == []
            assert await store.balance(ACME) == Balance(1_000_000, 320 + 25, 0)
            assert await counts_4(store) == [4, 0, 332, 50]
            assert not (await audit(store)).findings
    async with open_at(path, AT_4 + 60) as store:
        key = IdempotencyKey("order-7", b"other")
        await store.reserve(ReserveRequest(record("new"), 0, 0, counters(tokens=3), key))
    with closing(sqlite3.connect(path)) as left:  # neither ended windows nor what running tasks take is kept
        (stored,) = left.execute("SELECT counters FROM wallets WHERE account = 'acme' AND live").fetchone()
        assert set(json.loads(stored)) == {"requests", "tokens:gpt-4"}
