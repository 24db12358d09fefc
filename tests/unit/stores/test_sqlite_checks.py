"""The complete check of a SQLite file, of the store or an archive, which may take minutes."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores.archive import open_archive, sqlite
from pomelo.stores.sqlite import checks, damage
from pomelo.stores.sqlite.store import open_sqlite
from pomelo.stores.usage import UsageQuery
from tests.unit.refusals import refused
from tests.waiting import until


def slow_down(
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[], object],
    module: Any = checks,
    name: str = "connect_read_only",
) -> threading.Event:
    """Lets each step of a check `wait`. Returns an event that is set when the first one has begun. The function
    `name` of a module opens its connection."""
    open_connection = getattr(module, name)
    begun = threading.Event()

    def step() -> int:
        begun.set()
        wait()
        return 0

    def connect(path: Path) -> sqlite3.Connection:
        connection: sqlite3.Connection = open_connection(path)
        connection.set_progress_handler(step, 1)
        return connection

    monkeypatch.setattr(module, name, connect)
    return begun


async def test_reports_are_read_while_the_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    begun = slow_down(monkeypatch, lambda: may_end.wait(20))
    async with open_sqlite(tmp_path / "pomelo.db") as store:
        checking = asyncio.ensure_future(store.damage())
        await until(begun.is_set)
        assert await store.list_usage(UsageQuery(), limit=9) == ([], "")
        assert len(await store.list_accounts()) == 1
        assert not checking.done()
        may_end.set()
        assert await checking == []


async def test_closing_ends_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = slow_down(monkeypatch, lambda: time.sleep(0.1))  # it would take minutes
    async with asyncio.timeout(20):
        async with open_sqlite(tmp_path / "pomelo.db") as store:
            found = [asyncio.ensure_future(store.damage()) for _ in range(2)]
            await until(begun.is_set)
        for checking in found:
            with refused("store_unavailable"):
                await checking
        with refused("store_unavailable"):
            await store.damage()


async def test_closing_an_archive_ends_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(20):
        async with open_archive(f"sqlite:{tmp_path / 'usage.db'}") as archive:
            begun = slow_down(
                monkeypatch, lambda: time.sleep(0.5), sqlite, "_connect"
            )  # it would take a minute
            checking = asyncio.ensure_future(archive.damage())
            await until(begun.is_set)
        with refused("store_unavailable"):
            await checking
    assert caplog.records == []


async def test_closing_ends_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = threading.Event()

    def count(connection: sqlite3.Connection) -> object:
        begun.set()  # the statement takes half a minute
        numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 200000000)"
        return connection.execute(f"{numbers} SELECT count(*) FROM n").fetchone()

    async with open_sqlite(tmp_path / "pomelo.db") as store:
        counting = asyncio.ensure_future(store._report(count))
        await until(begun.is_set)
    for report in (counting, store.list_accounts()):
        with refused("store_unavailable"):
            await report
    assert caplog.messages == []


class Unreadable(sqlite3.Connection):
    """A connection to a file that can't be read completely, which is not damage."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql.startswith("PRAGMA integrity_check"):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return super().execute(sql, parameters)


def test_a_file_that_can_not_be_checked_is_neither_intact_nor_damaged(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    with closing(sqlite3.connect(path, factory=Unreadable)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            damage.check(connection, path, ())
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            damage.check_completely(path, lambda _: connection, references=False)
