"""The archive in a SQLite file, which several processes of one machine may have open."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.process import shielded
from pomelo.stores.archive.base import Archive, FailureLog
from pomelo.stores.base import StoreError
from pomelo.stores.schema import ARCHIVE_MIGRATIONS
from pomelo.stores.sqlite import damage, usage
from pomelo.stores.sqlite.checks import interrupt
from pomelo.stores.sqlite.transaction import Transaction
from pomelo.stores.usage import UsageRecord

_APPLICATION_ID = 0x504D4C41
"""Identifies a SQLite file as an archive of Pomelo."""

_BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process that writes."""

T = TypeVar("T")


@asynccontextmanager
async def open_sqlite_archive(path: Path) -> AsyncIterator[Archive]:
    """Opens an archive, creates or migrates it if needed, and closes it on exit.

    Raises:
        StoreError: the file is damaged or another program's, or can't be opened.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="archive") as thread:
        connection = await loop.run_in_executor(thread, _open, path)
        archive = _SqliteArchive(connection, thread, path)
        try:
            yield archive
        finally:
            await shielded(asyncio.ensure_future(archive.close()))


class _SqliteArchive:
    """One connection, in one thread."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path) -> None:
        self._connection = connection
        self._thread = thread
        self._path = path
        self._monitor = damage.DamageMonitor(path)
        self._failures = FailureLog()
        self._checked: sqlite3.Connection | None = None
        """The connection of the last check."""
        reports = usage.Reports(self._run)
        self.list_usage = reports.list_usage
        self.sum_usage = reports.sum_usage

    async def close(self) -> None:
        """Ends a check, and closes the file."""
        closed = asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        await interrupt(lambda: self._checked, closed)
        await closed

    async def add(self, records: Sequence[UsageRecord]) -> None:
        def write(connection: sqlite3.Connection) -> None:
            if connection.in_transaction:  # of an earlier call that could not be rolled back
                connection.execute("ROLLBACK")
            with Transaction(connection):
                usage.insert_new_records(connection, records)

        await self._run(write)
        self._failures.worked()

    async def get(self, task_id: str) -> UsageRecord | None:
        return await self._run(lambda connection: usage.find_record(connection, task_id))

    async def damage(self) -> list[tuple[str, str]]:
        def connect(path: Path) -> sqlite3.Connection:
            self._checked = _connect(path)
            return self._checked

        findings = await self._run(lambda _: damage.check_completely(self._path, connect, references=False))
        return self._monitor.report(findings)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work, self._connection)
        except (sqlite3.Error, RuntimeError) as error:  # RuntimeError: the archive was closed
            self._monitor.receive(error)
            interrupted = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT  # by `close`
            # Damage is logged already.
            if isinstance(error, sqlite3.Error) and not interrupted and not damage.reports_damage(error):
                self._failures.failed(str(error))
            raise PomeloError("store_unavailable") from error


def check_sqlite_archive(path: Path) -> None:
    """Checks that an archive can be opened, without changing anything: a file that does not exist is fine if
    it can be created.

    Raises:
        StoreError: it can't be opened.
    """
    with damage.store_errors(f"The archive {path}"):
        damage.check_exists(path)
        folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
        for needed, access in ((folder, os.W_OK | os.X_OK), (path, os.R_OK | os.W_OK)):
            if needed.exists() and not os.access(needed, access):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.exists():
            # Without a lock, for which other processes might have to wait.
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as connection:
                _check_application(connection, path)
                _version(connection, path)


def _open(path: Path) -> sqlite3.Connection:
    with damage.store_errors(f"The archive {path}"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        damage.check_exists(path)
        # SQLite gives its journal the mode of this file, which is 0600.
        damage.create(path, _create_tables)
        connection = _connect(path)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None)


def _create_tables(connection: sqlite3.Connection) -> None:
    with Transaction(connection):
        for statements in ARCHIVE_MIGRATIONS:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(ARCHIVE_MIGRATIONS) - 1}")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The number of the last migration that was run.

    Raises:
        StoreError: this version of Pomelo does not have it.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version >= len(ARCHIVE_MIGRATIONS):
        raise StoreError(f"{path} was written by a newer Pomelo (version {version}). Upgrade Pomelo")
    return version


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Runs the missing migrations in one transaction; another process may have run some meanwhile."""
    with Transaction(connection):
        for number in range(_version(connection, path) + 1, len(ARCHIVE_MIGRATIONS)):
            for statement in ARCHIVE_MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")


def _check_application(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise StoreError(
            f"{path} is no archive of Pomelo, or damaged. Set POMELO_ARCHIVE to another file, or restore a "
            "backup: docs/maintenance.md, Backups"
        )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _check_application(connection, path)
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    version = _check(connection, path)
    # No write-ahead log: SQLite before 3.51.3 can corrupt one that several processes write to.
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = FULL")
    # The foreign key refers to the table of wallets, which an archive does not have.
    connection.execute("PRAGMA foreign_keys = OFF")
    if version < len(ARCHIVE_MIGRATIONS) - 1:
        _migrate(connection, path)


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """Checks for damage. Returns the number of the last migration that was run."""
    while True:
        version = _version(connection, path)
        migrations = ARCHIVE_MIGRATIONS[: version + 1]
        schema = [statement for statements in migrations for statement in statements]
        try:
            damage.check(connection, path, schema)
        except StoreError:
            if _version(connection, path) == version:
                raise
            # another process ran migrations meanwhile
        else:
            return version
