"""Opens the database file: its lock, its connections, its migrations. Blocking; for the store's threads.

SQLite before 3.51.3 can corrupt a write-ahead log that two connections write to. So a lock file excludes a
second process, and the connection for reading can neither write nor checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from pomelo.stores.base import StoreError
from pomelo.stores.schema import APPLICATION_ID, MIGRATIONS
from pomelo.stores.sqlite import damage
from pomelo.stores.sqlite.log_size import LogSize
from pomelo.stores.sqlite.moved import MovedFiles
from pomelo.stores.sqlite.transaction import Transaction

_MIN_SQLITE = (3, 37, 0)

_BUSY_TIMEOUT = 1000
"""Milliseconds that a transaction waits for another program's lock. All callers wait meanwhile."""


class WritableFile:
    """The file, open for writing, with its lock. Use it in one thread."""

    def __init__(
        self,
        path: Path,
        lock_wait: float,
        begin: Callable[[sqlite3.Connection], None],
        monitor: damage.DamageMonitor,
        log_size: LogSize,
    ) -> None:
        """Opens the file, creates or migrates it, and runs `begin` in the same transaction. `lock_wait` is
        how long to wait for another process, in seconds. `monitor` receives later errors.

        Raises:
            StoreError: another process uses the file; it is damaged, another program's or a newer version's.
        """
        self._log_size = log_size
        self._monitor = monitor
        if sqlite3.sqlite_version_info < _MIN_SQLITE:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; Pomelo needs 3.37 or later")
        with damage.store_errors(path), ExitStack() as opened:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            opened.callback(os.close, _lock(path, lock_wait))
            damage.check_exists(path)
            # SQLite gives its -wal and -shm files the mode of this file, which is 0600.
            damage.create(path, partial(_migrate, path=path))
            commits = damage.last_commits(path)
            self.connection = sqlite3.connect(path, isolation_level=None)
            opened.callback(self.connection.close)
            _prepare(self.connection, path, commits, begin)
            self._moved_files = MovedFiles(path, self.connection)
            self._opened = opened.pop_all()

    def failed(self, error: BaseException) -> None:
        """Receives the error of a failed operation: damage is logged."""
        self._monitor.receive(error)

    def before_batch(self) -> None:
        """Lets the batch fail if the file was removed or replaced."""
        self._moved_files.look()

    def between_batches(self) -> None:
        """Keeps the log small."""
        self._log_size.keep_small(self.connection)

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._opened.close()


def check_version(path: Path) -> None:
    """Checks that an existing file is a database that this version can open. Changes nothing and takes no
    lock: no process may write to it meanwhile.

    Raises:
        StoreError: it is damaged, another program's or a newer version's.
    """
    with damage.store_errors(path):
        if not path.exists():
            return
        damage.check_exists(path)
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as connection:
            _check_application(connection, path)
            _version(connection, path)


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that can only read, and creates no file. The file must stay open for writing meanwhile."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", isolation_level=None, uri=True)
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA schema_version")  # opens the file, which may be replaced later
    return connection


def _lock(path: Path, wait: float) -> int:
    """Excludes other processes until the returned descriptor is closed or this process ends. Waits for each
    process that holds the lock: many commands of a script take turns, a server keeps it."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until, last = time.monotonic() + wait, ""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            if holder and holder != last:  # empty while it is written
                until, last = time.monotonic() + wait, holder
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
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
    _check_application(connection, path)
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    version = _version(connection, path)
    schema = [statement for statements in MIGRATIONS[:version] for statement in statements]
    damage.check(connection, path, schema)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # see LogSize
    connection.execute("PRAGMA foreign_keys = ON")
    damage.check_log(connection, path, commits)
    _migrate(connection, path, begin)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT}")


def _check_application(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(
            f"{path} is the database of another program, or damaged. Set POMELO_DATA to another folder, or "
            "restore a backup: docs/maintenance.md, Backups"
        )


def _migrate(
    connection: sqlite3.Connection,
    path: Path,
    begin: Callable[[sqlite3.Connection], None] = lambda connection: None,
) -> None:
    """Runs the missing migrations and `begin` in one transaction."""
    with Transaction(connection):
        _run_migrations(connection, path)
        try:
            begin(connection)
        except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise damage.damaged(path, "its reservations can't be read") from error


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The number of migrations that were run.

    Raises:
        StoreError: this version of Pomelo does not have so many.
    """
    version: int = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} was written by a newer Pomelo (version {version}). Upgrade Pomelo")
    return version


def _run_migrations(connection: sqlite3.Connection, path: Path) -> None:
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
