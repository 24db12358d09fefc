"""The files of a database are removed or replaced while it is open: nothing is acknowledged that would be lost."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.sqlite.moved import MovedFiles
from pomelo.stores.usage import UsageQuery
from tests.unit.accounts.audited_store import add_account, run
from tests.waiting import first

_numbers = itertools.count()


def put_aside(file: Path) -> None:
    file.rename(file.with_name(f"{file.name}-aside"))


def replace(file: Path) -> None:
    put_aside(file)
    shutil.copy(file.with_name(f"{file.name}-aside"), file)


async def runs(store: Store) -> bool:
    """Whether a task is settled."""
    try:
        await run(store, f"task_{next(_numbers)}")
    except PomeloError as error:
        return error.code != "store_unavailable"
    return True


def lines(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("ending", ["", "-wal", ".lock"])
@pytest.mark.parametrize("change", [put_aside, replace])
async def test_nothing_is_written_to_a_file_that_is_no_longer_there(
    ending: str, change: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        assert await runs(store)
        file = path.with_name(path.name + ending)
        change(file)
        await first(lambda: runs(store), lambda ran: not ran)
        assert not await runs(store)
        assert lines(caplog, f"{path}, its log or its lock was removed or replaced") == 1
        file.with_name(f"{file.name}-aside").rename(file)
        await first(lambda: runs(store), bool)
        assert lines(caplog, f"{path} is back") == 1
        settled = len((await store.list_usage(UsageQuery(), limit=10_000))[0])
    async with open_sqlite(path) as store:
        assert len((await store.list_usage(UsageQuery(), limit=10_000))[0]) == settled


async def test_reports_read_the_file_that_is_written_and_create_none(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        await run(store, "task_1")
        put_aside(path)
        assert len((await store.list_usage(UsageQuery(), limit=10))[0]) == 1
        assert not path.exists()


def test_a_file_is_not_taken_for_removed_while_its_folder_can_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "data" / "pomelo.db"
    path.parent.mkdir()
    path.touch()
    with closing(sqlite3.connect(":memory:")) as connection:
        files = MovedFiles(path, connection)
        put_aside(path.parent)
        path.parent.touch()
        with pytest.raises(NotADirectoryError):
            path.stat()
        files._next_look = 0.0
        files.look()
        assert connection.execute("PRAGMA query_only").fetchone() == (0,)
