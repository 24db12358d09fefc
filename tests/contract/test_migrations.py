"""Files of earlier versions, as those versions wrote them, opened by this one."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.stores.base import KeyRecord, Store, StoreError
from pomelo.stores.ledger import AccountRecord, Balance, Wallet
from pomelo.stores.schema import MIGRATIONS
from pomelo.stores.sqlite import open_sqlite

# Recorded from version 1, not made of MIGRATIONS: those of a release stay as they are.
VERSION_1 = """
    PRAGMA application_id = 1347243087;
    CREATE TABLE migrations (version INTEGER NOT NULL PRIMARY KEY, applied REAL NOT NULL) STRICT;
    CREATE TABLE accounts (name TEXT NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE keys (
        key_id TEXT NOT NULL PRIMARY KEY,
        account TEXT NOT NULL REFERENCES accounts (name),
        live INTEGER NOT NULL CHECK (live IN (0, 1)),
        digest BLOB NOT NULL,
        models TEXT NOT NULL,
        created REAL NOT NULL,
        expires REAL,
        revoked REAL
    ) STRICT, WITHOUT ROWID;
    INSERT INTO migrations VALUES (1, 1790000000.5);
    INSERT INTO accounts VALUES ('default'), ('acme');
    INSERT INTO keys VALUES
        ('k1', 'default', 1, x'00ff', '["gpt-4"]', 1790000001.5, NULL, NULL),
        ('k2', 'default', 0, x'01', '[]', 1790000002.5, 1890000000.5, 1790000003.5),
        ('k3', 'acme', 0, x'02', '[]', 1790000004.5, NULL, NULL);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with closing(sqlite3.connect(tmp_path / "pomelo.db")) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(VERSION_1)
    return tmp_path / "pomelo.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(path) as opened:
        yield opened


async def test_a_file_of_version_1_keeps_its_keys(store):
    assert await store.list_keys() == [
        KeyRecord("k1", "default", True, b"\x00\xff", ("gpt-4",), 1790000001.5),
        KeyRecord("k2", "default", False, b"\x01", (), 1790000002.5, 1890000000.5, 1790000003.5),
        KeyRecord("k3", "acme", False, b"\x02", (), 1790000004.5),
    ]


async def test_its_accounts_are_on_the_plan_that_has_what_they_had(store):
    accounts = await store.list_accounts()
    assert [(account.name, account.plan) for account in accounts] == [("acme", "pro"), ("default", "pro")]
    assert all(account.created > 1.7e9 for account in accounts)


async def test_its_default_account_gets_test_credits_once(path):
    for _ in range(2):
        async with open_sqlite(path) as store:
            assert await store.balance(Wallet("default", False)) == Balance(100_000_000)
            assert len(await store.list_grants(Wallet("default", False))) == 1
            assert await store.balance(Wallet("acme", False)) == Balance()
            assert await store.wallets() == [Wallet("default", False)]


async def test_an_account_can_be_added_to_it(store):
    assert await store.add_account("bee", "free", 2.0)
    assert await store.get_account("bee") == AccountRecord("bee", "free", 2.0)


async def test_a_migration_that_fails_leaves_the_file_as_it_was(path):
    with closing(sqlite3.connect(path)) as old:
        old.execute("CREATE TABLE usage (mine TEXT)")
        before = list(old.iterdump())
    with pytest.raises(StoreError):
        async with open_sqlite(path):
            pass
    with closing(sqlite3.connect(path)) as old:
        assert list(old.iterdump()) == before


async def test_it_ends_up_with_the_tables_of_a_new_file(path, tmp_path):
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
