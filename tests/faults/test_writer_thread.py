"""The thread that writes to a store's file continues after an unexpected error."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores.accounts import Grant
from pomelo.stores.sqlite import log_size, open_sqlite
from tests.faults.books import LIVE

MESSAGE = "a message that no log may have"


class FailingConnection(sqlite3.Connection):
    """A connection that can't empty the write-ahead log."""

    failures = 0

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql.startswith("PRAGMA wal_checkpoint("):
            FailingConnection.failures += 1
            raise RuntimeError(MESSAGE)
        return super().execute(sql, parameters)


async def test_an_unexpected_error_while_the_log_is_emptied_ends_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FailingConnection))
    monkeypatch.setattr(log_size, "LARGE", 0)
    async with asyncio.timeout(20), open_sqlite(tmp_path / "pomelo.db") as store:
        for number in range(3):
            await store.grant(Grant(f"grant-{number}", LIVE, 5, 1.0))
        assert (await store.balance(LIVE)).granted == 15
    assert FailingConnection.failures >= 3
    assert caplog.text.count("The work between two transactions failed") == 1
    assert "builtins.RuntimeError" in caplog.text
    assert MESSAGE not in caplog.text
