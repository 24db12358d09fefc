"""Damage of a SQLite file: found when it is opened, when a statement meets it, and by the audit.

SQLite notices a bad page only when it reads it. So every file is checked when it is opened, for a
bounded time, and completely by the audit. The remedy is always to restore a backup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from pomelo.stores.base import StoreError

CHECK_SECONDS = 2.0
"""Seconds for which a file is checked at most when it is opened."""

REMEDY = "Stop Pomelo, keep a copy of the file, and restore a backup: docs/operations.md, Backups"

_MOST_FINDINGS = 20
_REFERRING = ("keys", "holds", "token_windows")
_AUDITED = frozenset(f"CHECK constraint failed in {table}" for table in ("wallets", "grants", "usage"))
"""Left to the audit, which recomputes the numbers in these tables."""

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_WAL_HEADER = struct.Struct(">8I")
_WAL_FRAME = struct.Struct(">4I")
_WAL_MAGIC = frozenset({0x377F0682, 0x377F0683})
_FRAME_HEADER = 24

log = logging.getLogger("pomelo.stores")


def said(error: object) -> str:
    """SQLite's message in one line. It has no contents of the file except names."""
    text = " ".join(str(error).split())
    return "a text in it can't be read" if text.startswith("Could not decode") else text[:200]


def refused(path: Path, detail: object) -> StoreError:
    """The error for a file that can't be used as it is."""
    return StoreError(f"{path} is damaged: {detail}. {REMEDY}")


def tells(error: BaseException | None) -> bool:
    """Whether an error of SQLite reports that the file is damaged."""
    if not isinstance(error, sqlite3.Error):
        return False
    undecodable = isinstance(error, sqlite3.OperationalError) and str(error).startswith("Could not decode")
    return undecodable or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


class Watch:
    """Receives the errors of an open file, from any thread, and logs the first that reports
    damage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen = ""
        """The message of the first one."""

    def see(self, error: BaseException | None) -> None:
        """Checks an error and its cause."""
        for one in (error, error.__cause__ if error is not None else None):
            if not self.seen and tells(one):
                self.seen = said(one)
                log.error("%s is damaged: %s. %s", self._path, self.seen, REMEDY)

    def reported(self, found: list[str]) -> list[tuple[str, str]]:
        """Pairs of the file's name and a finding, the remedy first. Without findings, reports
        damage that a statement met earlier. Empty: nothing is wrong."""
        if not found and self.seen:
            found = [self.seen]
        if not found:
            return []
        return [(str(self._path), line) for line in (f"The file is damaged. {REMEDY}", *found)]


# --- opening


def check_there(path: Path) -> None:
    """Refuses a file that has lost all its contents.

    Raises:
        StoreError: it has no bytes, or is gone while its log is there.
    """
    try:
        if path.stat().st_size == 0:
            raise StoreError(
                f"{path} is damaged: it is empty. Restore a backup (docs/operations.md, Backups), or delete "
                "it to start anew, without the accounts, keys and credits that it had"
            )
    except FileNotFoundError:
        for log_file in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-journal")):
            if log_file.exists() and log_file.stat().st_size:
                raise StoreError(
                    f"{path} is missing, and its log {log_file.name} is there. Restore both from one backup "
                    "(docs/operations.md, Backups), or delete the log to start anew"
                ) from None


def create(path: Path, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Creates a file, complete or not at all, unless it exists: so an empty file is always damaged.

    Raises:
        OSError, sqlite3.Error: it can't be made.
    """
    if path.exists():
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            fill(connection)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
    finally:
        for leftover in (temporary, f"{temporary}-journal"):
            Path(leftover).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check(connection: sqlite3.Connection, path: Path, tables: Iterable[str]) -> None:
    """Checks a file that was just opened, for at most CHECK_SECONDS.

    `tables` are the statements that created the tables it must have.

    Raises:
        StoreError: it is damaged; sqlite3.Error: SQLite itself says so.
    """
    timer = threading.Timer(CHECK_SECONDS, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        # Numbers that violate a CHECK constraint are left to the audit.
        connection.execute("PRAGMA ignore_check_constraints = ON")
        found = _integrity(connection, 1)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_INTERRUPT:
            raise
        found = []
        log.info("%s is large and was looked over in part; `pomelo audit` looks at all of it", path)
    finally:
        timer.cancel()
        timer.join()
        connection.execute("PRAGMA ignore_check_constraints = OFF")
    if found:
        raise refused(path, found[0])
    _check_schema(connection, path, tables)


def _check_schema(connection: sqlite3.Connection, path: Path, tables: Iterable[str]) -> None:
    """Compares names and definitions: SQLite reports a wrong one only when a statement needs it."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        for statement in tables:
            model.execute(statement)
        expected = _schema(model)
    there = _schema(connection)
    for name, sql in expected.items():
        if there.get(name) != sql:
            raise refused(path, f"{name} is not what it was made as")


def _schema(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    return {f"{kind} {name}": f"{table} {' '.join((sql or '').split())}" for kind, name, table, sql in rows}


# --- the log of a file, which a crash leaves


def last_commits(path: Path) -> list[int] | None:
    """The numbers of the frames that end a transaction in a file's log and have the salts of its
    header.

    None: the log's header is damaged. Call it before the file is opened.

    Raises:
        OSError: the log can't be read.
    """
    try:
        file = path.with_name(f"{path.name}-wal").open("rb")
    except FileNotFoundError:
        return []
    with file:
        head = file.read(_WAL_HEADER.size)
        size = os.fstat(file.fileno()).st_size
        if size <= _WAL_HEADER.size:
            return []
        magic, _, page, _, *salts, first, second = _WAL_HEADER.unpack(head)
        if magic not in _WAL_MAGIC or (first, second) != _checksum(head[:24], big=bool(magic & 1)):
            return None
        commits = []
        frame = _FRAME_HEADER + page
        for number, at in enumerate(range(_WAL_HEADER.size, size - frame + 1, frame), 1):
            file.seek(at)
            _, committed, *own = _WAL_FRAME.unpack(file.read(_WAL_FRAME.size))
            if own == salts and committed:
                commits.append(number)
        return commits


def check_log(connection: sqlite3.Connection, path: Path, commits: list[int] | None) -> None:
    """Refuses a file whose log has committed transactions that SQLite skipped because of a damaged
    frame. A single one at the end may come from a crash: it was not acknowledged.

    `commits` is what `last_commits` gave before the file was opened.

    Raises:
        StoreError: there are such transactions, or the log's header is damaged.
    """
    name = f"{path.name}-wal"
    if commits is None:
        raise refused(path, f"the head of its log {name} is no head")
    if len(commits) < 2:
        return
    _, read, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if sum(number > read for number in commits) > 1:
        raise refused(path, f"its log {name} has a bad frame in front of transactions that were committed")


def _checksum(data: bytes, *, big: bool) -> tuple[int, int]:
    first = second = 0
    for one, two in struct.iter_unpack(">2I" if big else "<2I", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


# --- looking at all of it


def looked_over(path: Path, opening: Callable[[Path], sqlite3.Connection], *, references: bool) -> list[str]:
    """All findings about a file, however long the check takes. `references`: also check foreign
    keys.

    Raises:
        sqlite3.Error: it can't be checked.
    """
    found = []
    try:
        # A new connection: an open one may have cached pages from before the damage.
        with contextlib.closing(opening(path)) as connection:
            found += _integrity(connection, _MOST_FINDINGS)
            if references:
                for name in _REFERRING:
                    rows = connection.execute(f"PRAGMA foreign_key_check({name})").fetchmany(_MOST_FINDINGS)
                    found += [f"a row of {table} refers to none of {parent}" for table, _, parent, _ in rows]
    except sqlite3.DatabaseError as error:
        if not tells(error):
            raise
        found.append(said(error))
    return found


def _integrity(connection: sqlite3.Connection, most: int) -> list[str]:
    rows = connection.execute(f"PRAGMA integrity_check({most})").fetchall()
    lines = [" ".join(line.split()) for (text,) in rows for line in str(text).splitlines()]
    return [line for line in lines if line != "ok" and not line.startswith("***") and line not in _AUDITED]
