"""Where usage records stay when they have left Redis. An archive keeps one record of each task."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from pomelo import install_command
from pomelo.errors import PomeloError
from pomelo.stores import records
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import UsageQuery, UsageRecord, UsageTotal
from pomelo.stores.schema import ARCHIVE_MIGRATIONS
from pomelo.stores.sqlite import damage, usage

_APPLICATION_ID = 0x504D4C41
"""Marks a file as an archive of ours."""

_BUSY = 5.0
"""Seconds to wait for another process that writes."""

T = TypeVar("T")


class Archive(Protocol):
    """Keeps usage records. Every method raises PomeloError store_unavailable when it can't be reached."""

    async def add(self, found: Sequence[UsageRecord]) -> None:
        """Keeps records, in their order, but those of tasks of which it has one. What it kept is durable."""
        ...

    async def get(self, task_id: str) -> UsageRecord | None:
        """A task's record."""
        ...

    async def list_usage(self, query: UsageQuery, limit: int, after: str) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        ...

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        ...

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore."""
        ...


def open_archive(url: str) -> AbstractAsyncContextManager[Archive]:
    """An archive, opened on entering and closed on leaving: `sqlite:PATH` or `postgresql://…`.

    Raises:
        StoreError: there is no such kind of archive; on entering: it can't be opened.
    """
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        return open_file_archive(Path(rest))
    if kind in ("postgresql", "postgres"):
        try:
            from pomelo.stores.archive.postgres import open_postgres_archive
        except ModuleNotFoundError as error:
            raise StoreError(
                f"An archive in Postgres needs another package: {install_command('postgres')}"
            ) from error
        return open_postgres_archive(url)
    raise StoreError(f"There is no archive of the kind {kind!r}. Use sqlite:PATH or postgresql://…")


@asynccontextmanager
async def open_file_archive(path: Path) -> AsyncIterator[Archive]:
    """An archive in a SQLite file, which several processes of one machine may have open.

    Raises:
        StoreError: it isn't ours, or can't be opened.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="archive") as worker:
        connection = await loop.run_in_executor(worker, _open, path)
        try:
            yield FileArchive(connection, worker, path)
        finally:
            await asyncio.shield(loop.run_in_executor(worker, connection.close))


class FileArchive:
    """See `open_file_archive`. One connection, in one thread."""

    def __init__(self, connection: sqlite3.Connection, worker: ThreadPoolExecutor, path: Path) -> None:
        self._connection = connection
        self._worker = worker
        self._path = path
        self._watch = damage.Watch(path)

    async def add(self, found: Sequence[UsageRecord]) -> None:
        """See Archive."""

        def write(connection: sqlite3.Connection) -> None:
            if connection.in_transaction:  # an earlier one could not be rolled back
                connection.execute("ROLLBACK")
            connection.execute("BEGIN IMMEDIATE")
            try:
                for record in found:
                    records.insert_record_once(connection, record)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

        await self._do(write)

    async def get(self, task_id: str) -> UsageRecord | None:
        """See Archive."""
        return await self._do(lambda connection: records.find_record(connection, task_id))

    async def list_usage(self, query: UsageQuery, limit: int, after: str) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        page = usage.UsagePage(query, limit, after)
        while (found := await self._do(page.step)) is None:
            pass
        return found

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        sums = usage.UsageSum(query, by, limit, after)
        while (found := await self._do(sums.step)) is None:
            pass
        return found

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore."""
        found = await self._do(lambda _: damage.looked_over(self._path, _connect, references=False))
        return self._watch.reported(found)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._worker, work, self._connection)
        except (sqlite3.Error, RuntimeError) as error:  # RuntimeError: the thread was closed.
            self._watch.see(error)
            raise PomeloError("store_unavailable") from error


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        damage.check_there(path)
        # SQLite gives its journal the mode of this one, which is 0600.
        damage.create(path, _fill)
        connection = _connect(path)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except OSError as error:
        raise StoreError(f"The archive {path} can't be opened: {error.strerror}") from error
    except UnicodeDecodeError as error:  # SQLite raises it for some damage
        raise damage.refused(path, "a text in it can't be read") from error
    except sqlite3.Error as error:
        detail = f"{error}. Free or mend the disk"
        if damage.tells(error):
            detail = f"it is damaged: {damage.said(error)}. {damage.REMEDY}"
        raise StoreError(f"The archive {path} can't be used: {detail}") from error
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY, isolation_level=None)


def _fill(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statements in ARCHIVE_MIGRATIONS:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(ARCHIVE_MIGRATIONS) - 1}")
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The number of the last migration that was run.

    Raises:
        StoreError: it is higher than this Pomelo knows.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version >= len(ARCHIVE_MIGRATIONS):
        raise StoreError(f"{path} was written by a newer Pomelo (version {version}). Upgrade Pomelo")
    return version


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Runs the missing migrations in one transaction; another process may be faster."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for number in range(_version(connection, path) + 1, len(ARCHIVE_MIGRATIONS)):
            for statement in ARCHIVE_MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise StoreError(
            f"{path} is no archive of Pomelo, or damaged. Set POMELO_ARCHIVE to another file, or restore a "
            "backup: docs/operations.md, Backups"
        )
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    version = _check(connection, path)
    # Not a write-ahead log: SQLite before 3.51.3 can corrupt one that several processes write.
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = FULL")
    # The table names the wallets' one, which is in Redis.
    connection.execute("PRAGMA foreign_keys = OFF")
    if version < len(ARCHIVE_MIGRATIONS) - 1:
        _migrate(connection, path)


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """Looks for damage. Returns the number of the last migration that was run."""
    while True:
        version = _version(connection, path)
        made = ARCHIVE_MIGRATIONS[: version + 1]
        try:
            damage.check(connection, path, [statement for statements in made for statement in statements])
        except StoreError:
            if _version(connection, path) == version:
                raise
            # Another process ran migrations meanwhile.
        else:
            return version
