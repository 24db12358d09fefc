"""The store in one SQLite file: one process, one connection, one thread that alone touches it.

SQLite before 3.51.3 can corrupt a write-ahead log that two connections write; a lock file keeps a second
process out. What a method returns is on the disk (WAL, synchronous=FULL).
"""

import asyncio
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from pomelo.errors import PomeloError
from pomelo.stores.base import KeyRecord, Store, StoreError, UnknownAccountError
from pomelo.stores.schema import APPLICATION_ID, MIGRATIONS

LOCK_WAIT = 2.0
"""Seconds to wait for another process: the command line holds the store for a moment only."""

_MINIMUM = (3, 37, 0)
_COLUMNS = "key_id, account, live, digest, models, created, expires, revoked"

T = TypeVar("T")


@asynccontextmanager
async def open_sqlite(path: Path, *, lock_wait: float = LOCK_WAIT) -> AsyncIterator[Store]:
    """Opens the file, makes or migrates it where needed, and closes it on leaving.

    Raises:
        StoreError: another process has it; it isn't ours, is damaged, or is of a newer version.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="sqlite") as worker:
        connection, lock = await loop.run_in_executor(worker, _open, path, lock_wait)
        try:
            yield SqliteStore(connection, worker)
        finally:
            # Behind whatever is queued, in a shield: a cancelled exit must not leave the file open.
            await asyncio.shield(loop.run_in_executor(worker, _close, connection, lock))


class SqliteStore:
    """See `pomelo.stores.base` for the roles. Made by `open_sqlite` alone."""

    def __init__(self, connection: sqlite3.Connection, worker: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._worker = worker

    async def get_key(self, key_id: str) -> KeyRecord | None:
        """See KeyStore."""
        return await self._do(lambda connection: _get_key(connection, key_id))

    async def add_key(self, record: KeyRecord) -> None:
        """See KeyStore."""
        await self._do(lambda connection: _add_key(connection, record))

    async def list_keys(self, account: str | None = None) -> list[KeyRecord]:
        """See KeyStore."""

        def rows(connection: sqlite3.Connection) -> list[KeyRecord]:
            found = connection.execute(
                f"SELECT {_COLUMNS} FROM keys WHERE ?1 IS NULL OR account = ?1 ORDER BY created, key_id",  # noqa: S608
                (account,),
            )
            return [_key(row) for row in found]

        return await self._do(rows)

    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        """See KeyStore."""

        def write(connection: sqlite3.Connection) -> KeyRecord | None:
            _revoke(connection, key_id, at)
            return _get_key(connection, key_id)

        return await self._do(write)

    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        """See KeyStore."""

        def write(connection: sqlite3.Connection) -> bool:
            if not _revoke(connection, key_id, at):
                return False
            _add_key(connection, successor)
            return True

        return await self._do(write)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` as one transaction in the store's thread. Cancelled, it may still be done."""
        loop = asyncio.get_running_loop()
        try:
            done = loop.run_in_executor(self._worker, _transact, self._connection, work)
        except RuntimeError as error:  # The store was closed while a caller was on its way.
            raise PomeloError("store_unavailable") from error
        try:
            return await done
        except sqlite3.Error as error:
            raise PomeloError("store_unavailable") from error


def _transact(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _get_key(connection: sqlite3.Connection, key_id: str) -> KeyRecord | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE key_id = ?", (key_id,)).fetchone()  # noqa: S608
    return None if row is None else _key(row)


def _add_key(connection: sqlite3.Connection, record: KeyRecord) -> None:
    try:
        connection.execute(
            f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                record.key_id,
                record.account,
                record.live,
                record.digest,
                json.dumps(record.models),
                record.created,
                record.expires,
                record.revoked,
            ),
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            raise UnknownAccountError(record.account) from error
        raise


def _revoke(connection: sqlite3.Connection, key_id: str, at: float) -> bool:
    changed = connection.execute(
        "UPDATE keys SET revoked = ? WHERE key_id = ? AND revoked IS NULL", (at, key_id)
    )
    return changed.rowcount == 1


def _key(row: tuple[Any, ...]) -> KeyRecord:
    key_id, account, live, digest, models, created, expires, revoked = row
    return KeyRecord(
        key_id, account, bool(live), digest, tuple(json.loads(models)), created, expires, revoked
    )


# --- opening, all in the store's thread


def _open(path: Path, lock_wait: float) -> tuple[sqlite3.Connection, int]:
    if sqlite3.sqlite_version_info < _MINIMUM:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; Pomelo needs 3.37 or later")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(path, lock_wait)
        # SQLite gives its -wal and -shm files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StoreError(f"{path} can't be opened: {error.strerror}") from error
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        os.close(lock)
        raise StoreError(f"{path} is damaged or no Pomelo database: {error}. Restore it") from error
    except BaseException:
        os.close(lock)
        raise
    return connection, lock


def _lock(path: Path, wait: float) -> int:
    """Keeps other processes out until the descriptor is closed, which the end of the process does too."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise StoreError(
                f"{path} is used by another process{f' ({holder})' if holder else ''}. "
                "Stop it, or set POMELO_DATA to another folder"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()}".encode(), 0)
        return lock


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    marked = connection.execute("PRAGMA application_id").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if marked != APPLICATION_ID and not (empty and marked == 0):
        raise StoreError(f"{path} is the database of another program. Set POMELO_DATA to another folder")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    _transact(connection, lambda c: _migrate(c, path))


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations"
        " (version INTEGER NOT NULL PRIMARY KEY, applied REAL NOT NULL) STRICT"
    )
    version = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} was written by a newer Pomelo (version {version}). Upgrade Pomelo")
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO migrations (version, applied) VALUES (?, ?)", (number, time.time()))


def _close(connection: sqlite3.Connection, lock: int) -> None:
    try:
        connection.close()
    finally:
        os.close(lock)
