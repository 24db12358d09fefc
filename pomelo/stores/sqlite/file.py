"""Opening the file: its lock, its connections, and the steps to today's tables. All in the store's threads.

SQLite before 3.51.3 can corrupt a write-ahead log that two connections write; a lock file keeps a second
process out, and the connection for reading can neither write nor checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pomelo.stores.base import StoreError
from pomelo.stores.schema import APPLICATION_ID, MIGRATIONS
from pomelo.stores.sqlite import damage
from pomelo.stores.sqlite.log_size import LogSize

_MINIMUM = (3, 37, 0)

_DISK = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
)
"""Errors that say nothing of the file: all is well with it once the disk is."""


class WritingFile:
    """The file, open for writing, and the lock on it."""

    def __init__(
        self,
        path: Path,
        lock_wait: float,
        begin: Callable[[sqlite3.Connection], None],
        watch: damage.Watch,
        log_size: LogSize | None = None,
    ) -> None:
        """Opens the file, creates or migrates it, and runs `begin` in the same transaction. `watch`
        receives later errors.

        Raises:
            StoreError: another process has it; it isn't ours, is damaged, or is of a newer version.
        """
        self._log_size = log_size or LogSize(path)
        if sqlite3.sqlite_version_info < _MINIMUM:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; Pomelo needs 3.37 or later")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(path, lock_wait)
        except OSError as error:
            raise StoreError(f"{path} can't be opened: {error.strerror}") from error
        try:
            damage.check_there(path)
            # SQLite gives its -wal and -shm files the mode of this one, which is 0600.
            damage.create(path, partial(_migrated, path=path))
            commits = damage.last_commits(path)
            self.connection = sqlite3.connect(path, isolation_level=None)
            try:
                _prepare(self.connection, path, commits, begin)
            except BaseException:
                self.connection.close()
                raise
        except OSError as error:
            os.close(self._lock)
            raise StoreError(f"{path} can't be opened: {error.strerror}") from error
        except UnicodeDecodeError as error:  # SQLite raises it for some damage
            os.close(self._lock)
            raise damage.refused(path, "a text in it can't be read") from error
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK:
                raise StoreError(f"{path} can't be used: {error}. Free or mend the disk") from error
            detail = f"damaged or no Pomelo database: {damage.said(error)}"
            raise StoreError(f"{path} is {detail}. {damage.REMEDY}") from error
        except BaseException:
            os.close(self._lock)
            raise
        self._watch = watch

    def failed(self, error: BaseException) -> None:
        """See Written: damage is logged."""
        self._watch.see(error)

    def between(self) -> None:
        """Keeps the log small. Call it between two transactions."""
        self._log_size.keep_small(self.connection)

    def close(self) -> None:
        """Closes the file and lets others in."""
        try:
            self.connection.close()
        finally:
            os.close(self._lock)


def open_reading(path: Path) -> sqlite3.Connection:
    """A connection that can only read. The file must be open for writing as long."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


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


def _prepare(
    connection: sqlite3.Connection,
    path: Path,
    commits: list[int] | None,
    begin: Callable[[sqlite3.Connection], None],
) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(
            f"{path} is the database of another program, or damaged. Set POMELO_DATA to another folder, or "
            "restore a backup: docs/operations.md, Backups"
        )
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    version = _version(connection, path)
    made = [statement for statements in MIGRATIONS[:version] for statement in statements]
    damage.check(connection, path, made)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # `between` does it, between commits.
    connection.execute("PRAGMA foreign_keys = ON")
    damage.check_log(connection, path, commits)
    _migrated(connection, path, begin)


def _migrated(
    connection: sqlite3.Connection,
    path: Path,
    begin: Callable[[sqlite3.Connection], None] = lambda connection: None,
) -> None:
    """Runs the missing migrations and `begin` in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        _migrate(connection, path)
        try:
            begin(connection)
        except (ValueError, TypeError, LookupError, AssertionError) as error:
            raise damage.refused(path, "what it says of running tasks can't be read") from error
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The number of migrations that were run.

    Raises:
        StoreError: it is higher than this Pomelo knows.
    """
    version: int = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} was written by a newer Pomelo (version {version}). Upgrade Pomelo")
    return version


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations"
        " (version INTEGER NOT NULL PRIMARY KEY, applied REAL NOT NULL) STRICT"
    )
    version = _version(connection, path)
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO migrations (version, applied) VALUES (?, ?)", (number, time.time()))
