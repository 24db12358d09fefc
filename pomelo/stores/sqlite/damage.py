"""Detects damage of a SQLite file: when it is opened, when a statement fails, and in the audit.

SQLite notices a bad page only when it reads it. So every file is checked when it is opened, for a limited
time, and completely by the audit. The remedy is always to restore a backup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pomelo.stores.base import StoreError

CHECK_SECONDS = 2.0
"""Maximum duration of the check when a file is opened, in seconds."""

REMEDY = "Stop Pomelo, keep a copy of the file, and restore a backup: docs/maintenance.md, Backups"

_MAX_FINDINGS = 20
_TABLES_WITH_REFERENCES = ("keys", "holds")
_AUDITED = frozenset(f"CHECK constraint failed in {table}" for table in ("wallets", "grants", "usage"))
"""Ignored here: the audit recomputes the numbers in these tables."""

_DAMAGE_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_REMEDIES = {
    sqlite3.SQLITE_FULL: "Free or mend the disk",
    sqlite3.SQLITE_IOERR: "Free or mend the disk",
    sqlite3.SQLITE_CANTOPEN: "Let this user read and write it, the files beside it and its folder",
    sqlite3.SQLITE_READONLY: "Let this user read and write it, the files beside it and its folder",
    sqlite3.SQLITE_BUSY: "End the other program that has locked it",
}
"""What to do about errors that don't mean that the file is damaged."""

_WAL_HEADER = struct.Struct(">8I")
_WAL_FRAME = struct.Struct(">4I")
_WAL_MAGIC = frozenset({0x377F0682, 0x377F0683})
_FRAME_HEADER = 24

log = logging.getLogger("pomelo.stores")


def message_of(error: object) -> str:
    """SQLite's message in one line. It has no contents of the file except names."""
    text = " ".join(str(error).split())
    return "a text in it can't be read" if text.startswith("Could not decode") else text[:200]


def damaged(name: Path | str, detail: object) -> StoreError:
    return StoreError(f"{name} is damaged: {detail}. {REMEDY}")


@contextlib.contextmanager
def store_errors(name: Path | str) -> Iterator[None]:
    """Raises a StoreError, which says what to do, in place of an error of the body, which opens the file of
    that name."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{name} can't be opened: {error.strerror}") from error
    except UnicodeDecodeError as error:  # SQLite raises it for some damage
        raise damaged(name, "a text in it can't be read") from error
    except sqlite3.Error as error:
        if (remedy := _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)) is not None:
            raise StoreError(f"{name} can't be used: {error}. {remedy}") from error
        raise StoreError(f"{name} is damaged or no Pomelo database: {message_of(error)}. {REMEDY}") from error


def reports_damage(error: BaseException | None) -> bool:
    """Whether an error of SQLite says that the file is damaged."""
    if not isinstance(error, sqlite3.Error):
        return False
    undecodable = isinstance(error, sqlite3.OperationalError) and str(error).startswith("Could not decode")
    return undecodable or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES


class DamageMonitor:
    """Receives the errors of an open file, from any thread, and logs the first one that reports damage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = ""
        """The message of the first error."""

    def receive(self, error: BaseException) -> None:
        """Checks an error and its cause."""
        for each in (error, error.__cause__):
            if not self._first and reports_damage(each):
                self._first = message_of(each)
                log.error("%s is damaged: %s. %s", self._path, self._first, REMEDY)

    def report(self, findings: list[str]) -> list[tuple[str, str]]:
        """Pairs of the file's name and a finding, the remedy first. Without findings, reports the damage that
        an earlier error showed. Empty: no damage."""
        if not findings and self._first:
            findings = [self._first]
        if not findings:
            return []
        return [(str(self._path), line) for line in (f"The file is damaged. {REMEDY}", *findings)]


# --- opening


def check_exists(path: Path) -> None:
    """Detects a file that has lost all its contents. A file that does not exist yet is fine.

    Raises:
        StoreError: the file is empty, or it is missing although its log exists.
    """
    try:
        if path.stat().st_size == 0:
            raise StoreError(
                f"{path} is damaged: it is empty. Restore a backup (docs/maintenance.md, Backups), or delete "
                "it to start anew, without the accounts, keys and credits that it had"
            )
    except FileNotFoundError:
        for log_file in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-journal")):
            if log_file.exists() and log_file.stat().st_size:
                raise StoreError(
                    f"{path} is missing, and its log {log_file.name} is there. Restore both from one backup "
                    "(docs/maintenance.md, Backups), or delete the log to start anew"
                ) from None


def create(path: Path, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Creates a file, completely or not at all, unless it exists: an empty file is always damaged.

    Raises:
        OSError, sqlite3.Error: it can't be created.
    """
    if path.exists():
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            fill(connection)
        with contextlib.suppress(FileExistsError):  # another process created it first
            os.link(temporary, path)
    finally:
        for leftover in (temporary, f"{temporary}-journal"):
            Path(leftover).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check(connection: sqlite3.Connection, path: Path, schema: Iterable[str]) -> None:
    """Checks a file that was just opened, for at most CHECK_SECONDS. `schema` are the statements that created
    its tables.

    Raises:
        StoreError: the file is damaged. sqlite3.Error: a statement failed, possibly because of damage.
    """
    timer = threading.Timer(CHECK_SECONDS, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        # The audit checks the numbers that have CHECK constraints.
        connection.execute("PRAGMA ignore_check_constraints = ON")
        findings = _check_integrity(connection, 1)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_INTERRUPT:
            raise
        findings = []
        log.info("%s is large and was looked over in part; `pomelo audit` checks all of it", path)
    finally:
        timer.cancel()
        timer.join()
        connection.execute("PRAGMA ignore_check_constraints = OFF")
    if findings:
        raise damaged(path, findings[0])
    _check_schema(connection, path, schema)


def _check_schema(connection: sqlite3.Connection, path: Path, schema: Iterable[str]) -> None:
    """Compares names and definitions: SQLite reports a wrong one only when a statement needs it."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        for statement in schema:
            empty.execute(statement)
        expected = _definitions(empty)
    actual = _definitions(connection)
    for name, sql in expected.items():
        if actual.get(name) != sql:
            raise damaged(path, f"the definition of {name} has changed")


def _definitions(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    return {f"{type_} {name}": f"{table} {' '.join((sql or '').split())}" for type_, name, table, sql in rows}


# --- the write-ahead log that a crash leaves


def last_commits(path: Path) -> list[int] | None:
    """The numbers of the log frames that end a transaction and have the salts of the log's header. None: the
    header is damaged. Call before the file is opened.

    Raises:
        OSError: the log can't be read.
    """
    try:
        file = path.with_name(f"{path.name}-wal").open("rb")
    except FileNotFoundError:
        return []
    with file:
        header = file.read(_WAL_HEADER.size)
        size = os.fstat(file.fileno()).st_size
        if size <= _WAL_HEADER.size:
            return []
        magic, _, page, _, *salts, first, second = _WAL_HEADER.unpack(header)
        if magic not in _WAL_MAGIC or (first, second) != _checksum(header[:24], big=bool(magic & 1)):
            return None
        commits = []
        frame = _FRAME_HEADER + page
        for number, offset in enumerate(range(_WAL_HEADER.size, size - frame + 1, frame), 1):
            file.seek(offset)
            _, committed, *frame_salts = _WAL_FRAME.unpack(file.read(_WAL_FRAME.size))
            if frame_salts == salts and committed:
                commits.append(number)
        return commits


def check_log(connection: sqlite3.Connection, path: Path, commits: list[int] | None) -> None:
    """Detects committed transactions that SQLite skipped because of a damaged frame in the log. A single one
    at the end may come from a crash: it was not acknowledged. `commits` are from `last_commits`, read before
    the file was opened.

    Raises:
        StoreError: there are such transactions, or the log's header is damaged.
    """
    name = f"{path.name}-wal"
    if commits is None:
        raise damaged(path, f"the header of its log {name} is invalid")
    if len(commits) < 2:
        return
    _, read, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if sum(number > read for number in commits) > 1:
        raise damaged(path, f"its log {name} has a bad frame before committed transactions")


def _checksum(data: bytes, *, big: bool) -> tuple[int, int]:
    first = second = 0
    for one, two in struct.iter_unpack(">2I" if big else "<2I", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


# --- the complete check


def check_completely(
    path: Path, connect: Callable[[Path], sqlite3.Connection], *, references: bool
) -> list[str]:
    """All findings about a file, however long the check takes. `references`: also check foreign keys.

    Raises:
        sqlite3.Error: the file can't be checked.
    """
    findings = []
    try:
        # A new connection: an open one may have cached pages that were intact.
        with contextlib.closing(connect(path)) as connection:
            findings += _check_integrity(connection, _MAX_FINDINGS)
            for name in _TABLES_WITH_REFERENCES if references else ():
                rows = connection.execute(f"PRAGMA foreign_key_check({name})").fetchmany(_MAX_FINDINGS)
                findings += [
                    f"a row of {table} refers to a missing row of {parent}" for table, _, parent, _ in rows
                ]
    except sqlite3.DatabaseError as error:
        if not reports_damage(error):
            raise
        findings.append(message_of(error))
    return findings


def _check_integrity(connection: sqlite3.Connection, limit: int) -> list[str]:
    rows = connection.execute(f"PRAGMA integrity_check({limit})").fetchall()
    lines = [" ".join(line.split()) for (text,) in rows for line in str(text).splitlines()]
    return [line for line in lines if line != "ok" and not line.startswith("***") and line not in _AUDITED]
