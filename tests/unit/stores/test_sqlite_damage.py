"""What is reported of a damaged file, and what is read of its write-ahead log to see whether it is damaged."""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.stores.base import StoreError
from pomelo.stores.records import encode_record
from pomelo.stores.schema import APPLICATION_ID
from pomelo.stores.sqlite import damage, open_sqlite, store
from pomelo.stores.sqlite.damage import DamageMonitor, last_commits, message_of, reports_damage
from pomelo.stores.sqlite.file import check_version, connect_read_only
from pomelo.stores.usage import UsageRecord


def failure(code: int = 0, message: str = "database disk image is malformed") -> sqlite3.Error:
    """An error of SQLite with this code."""
    error = sqlite3.DatabaseError(message)
    if code:
        error.sqlite_errorcode = code
    return error


UNDECODABLE = "Could not decode to UTF-8 column 'name' with text 'secret'"


def test_a_message_is_one_line_without_contents_of_the_file() -> None:
    assert message_of(failure(message="a  b\n c")) == "a b c"
    assert message_of(failure(message="x" * 300)) == "x" * 200
    assert message_of(sqlite3.OperationalError(UNDECODABLE)) == "a text in it can't be read"


@pytest.mark.parametrize(
    ("error", "damaged"),
    [
        (failure(sqlite3.SQLITE_CORRUPT), True),
        (failure(sqlite3.SQLITE_NOTADB), True),
        (failure(sqlite3.SQLITE_CORRUPT_INDEX), True),
        (failure(sqlite3.SQLITE_FULL), False),
        (failure(sqlite3.SQLITE_IOERR_READ), False),
        (failure(), False),
        (sqlite3.OperationalError(UNDECODABLE), True),
        (sqlite3.DatabaseError(UNDECODABLE), False),
        (ValueError(UNDECODABLE), False),
        (None, False),
    ],
)
def test_only_some_errors_report_damage(error: BaseException | None, damaged: bool) -> None:
    assert reports_damage(error) is damaged


def test_the_first_damage_is_logged_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pomelo.db"
    monitor = DamageMonitor(path)
    monitor.receive(failure(sqlite3.SQLITE_FULL, "disk full"))
    assert (monitor.report([]), caplog.messages) == ([], [])
    assert monitor.report(["x"]) == [(str(path), f"The file is damaged. {damage.REMEDY}"), (str(path), "x")]
    wrapped = ValueError()
    wrapped.__cause__ = failure(sqlite3.SQLITE_CORRUPT, "page 7 is bad")
    monitor.receive(wrapped)
    monitor.receive(failure(sqlite3.SQLITE_CORRUPT, "page 8 is bad"))
    assert caplog.messages == [f"{path} is damaged: page 7 is bad. {damage.REMEDY}"]
    assert [line for _, line in monitor.report([])][1:] == ["page 7 is bad"]
    assert [line for _, line in monitor.report(["a", "b"])][1:] == ["a", "b"]


def test_a_file_that_has_lost_its_contents_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    damage.check_exists(path)
    path.touch()
    with pytest.raises(StoreError, match="is damaged: it is empty"):
        damage.check_exists(path)
    path.write_bytes(b"x")
    damage.check_exists(path)
    path.unlink()
    for log in ("pomelo.db-wal", "pomelo.db-journal"):
        (tmp_path / log).touch()
        damage.check_exists(path)
        (tmp_path / log).write_bytes(b"x")
        with pytest.raises(StoreError, match=rf"is missing, and its log {log} is there"):
            damage.check_exists(path)
        (tmp_path / log).unlink()


def test_a_file_is_created_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"

    def fill(connection: sqlite3.Connection) -> None:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert not path.exists()
        connection.execute("CREATE TABLE t (n)")
        if fails:
            raise KeyError

    fails = True
    with pytest.raises(KeyError):
        damage.create(path, fill)
    assert list(tmp_path.iterdir()) == []
    fails = False
    damage.create(path, fill)
    assert [each.name for each in tmp_path.iterdir()] == ["pomelo.db"]
    before = path.read_bytes()
    damage.create(path, fill)  # it exists, so nothing is filled
    assert path.read_bytes() == before


def test_a_file_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"

    def fill(connection: sqlite3.Connection) -> None:
        path.write_bytes(b"theirs")

    damage.create(path, fill)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("pomelo.db", b"theirs")]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA application_id = 7", "is the database of another program, or damaged"),
        ("INSERT INTO migrations VALUES (999, 1.0)", r"was written by a newer Pomelo \(version 999\)"),
        ("DROP TABLE migrations", "is damaged or no Pomelo database: no such table: migrations"),
    ],
)
def test_a_file_that_this_version_cannot_open_is_named(tmp_path: Path, statement: str, message: str) -> None:
    path = tmp_path / "pomelo.db"
    check_version(path)  # nothing is there
    path.touch()
    with pytest.raises(StoreError, match="is damaged: it is empty"):
        check_version(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("CREATE TABLE migrations (version INTEGER, applied REAL)")
    check_version(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)
    with pytest.raises(StoreError, match=message):
        check_version(path)


async def test_an_unreadable_file_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "can't be used: unable to open database file. Let this user read and write it"
    with pytest.raises(StoreError, match=message):
        check_version(tmp_path)
    monkeypatch.setattr(store, "connect_read_only", lambda path: connect_read_only(tmp_path))
    with pytest.raises(StoreError, match=message):
        async with open_sqlite(tmp_path / "pomelo.db"):
            pytest.fail("it was opened")


def log_of(path: Path, transactions: int) -> tuple[int, list[int]]:
    """Writes transactions of many frames, and leaves their log; returns the size of a page, and the numbers
    of the frames that end one."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE texts (text TEXT)")
        ends = []
        log = path.with_name(f"{path.name}-wal")
        for number in range(transactions + 1):
            ends.append((log.stat().st_size - 32) // (page + 24))
            if number < transactions:
                connection.execute("INSERT INTO texts VALUES (?)", ("x" * 10 * page,))
        saved = path.with_name("saved")
        shutil.copy(log, saved)
        shutil.copy(path, path.with_name("saved.db"))
    saved.rename(log)
    path.with_name("saved.db").rename(path)
    return page, ends


def test_a_transaction_of_many_frames_is_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    assert last_commits(path) == []
    _, ends = log_of(path, 3)
    assert ends[2] - ends[1] > 10
    assert last_commits(path) == ends


def truncate(size: int) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, frame: int) -> None:
        del data[size:]

    return change


def flip(offset: int) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, frame: int) -> None:
        data[offset] ^= 1

    return change


def test_an_incomplete_frame_and_frames_of_an_earlier_log_are_no_commits(tmp_path: Path) -> None:
    path, log = tmp_path / "pomelo.db", tmp_path / "pomelo.db-wal"
    page, ends = log_of(path, 3)
    data = log.read_bytes()
    log.write_bytes(data[:-1])
    assert last_commits(path) == ends[:-1]
    at = 32 + (ends[1] - 1) * (page + 24)  # the frame that ends the second transaction
    for salt in range(8, 16):
        changed = bytearray(data)
        changed[at + salt] ^= 1
        log.write_bytes(changed)
        assert last_commits(path) == [ends[0], *ends[2:]]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (truncate(0), []),
        (truncate(31), []),
        (truncate(32), []),
        (truncate(33), []),
        (flip(3), None),
        (flip(11), None),
        (flip(23), None),
        (flip(27), None),
        (flip(31), None),
    ],
)
def test_a_log_whose_header_is_damaged_is_noticed(
    tmp_path: Path, change: Callable[[bytearray, int], None], found: list[int] | None
) -> None:
    path, log = tmp_path / "pomelo.db", tmp_path / "pomelo.db-wal"
    page, _ = log_of(path, 1)
    data = bytearray(log.read_bytes())
    change(data, page + 24)
    log.write_bytes(data)
    assert last_commits(path) == found


def test_a_log_in_the_other_byte_order_is_read(tmp_path: Path) -> None:
    path, log = tmp_path / "pomelo.db", tmp_path / "pomelo.db-wal"
    _, ends = log_of(path, 2)
    data = bytearray(log.read_bytes())
    (magic,) = struct.unpack_from(">I", data)
    struct.pack_into(">I", data, 0, magic ^ 1)
    assert last_commits(path) == ends
    log.write_bytes(data)
    assert last_commits(path) is None  # by its checksum
    first, second = damage._checksum(bytes(data[:24]), big=not magic & 1)
    struct.pack_into(">2I", data, 24, first, second)
    log.write_bytes(data)
    assert last_commits(path) == ends


def opened(path: Path) -> None:
    """Opens a file as the store does after a crash."""
    commits = last_commits(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        damage.check_log(connection, path, commits)


def test_committed_transactions_behind_a_bad_frame_are_noticed(tmp_path: Path) -> None:
    path, log = tmp_path / "pomelo.db", tmp_path / "pomelo.db-wal"
    page, ends = log_of(path, 4)
    data = log.read_bytes()
    database = path.read_bytes()

    def write(bad: int, content: bytes) -> None:
        """Writes the file with a bad frame after the transaction of that number."""
        changed = bytearray(content)
        if bad < len(ends):
            changed[32 + ends[bad - 1] * (page + 24) + 24 + 5] ^= 1
        path.write_bytes(database)
        log.write_bytes(changed)
        path.with_name("pomelo.db-shm").unlink(missing_ok=True)

    write(len(ends), data)
    opened(path)
    write(len(ends) - 1, data)  # the last one may come from a crash
    opened(path)
    for bad in range(1, len(ends) - 1):
        write(bad, data)
        with pytest.raises(StoreError, match=r"pomelo\.db-wal has a bad frame before committed transactions"):
            opened(path)
    write(len(ends), data[:3] + bytes([data[3] ^ 1]) + data[4:])
    with pytest.raises(StoreError, match=r"the header of its log pomelo\.db-wal is invalid"):
        opened(path)


def test_values_that_break_a_constraint_are_left_to_the_audit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pomelo.stores")
    path = tmp_path / "pomelo.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("CREATE TABLE t (n CHECK (n > 0))")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("INSERT INTO t VALUES (0)")
        damage.check(connection, path, ["CREATE TABLE t (n CHECK (n > 0))"])
        assert caplog.messages == []
        assert connection.execute("PRAGMA ignore_check_constraints").fetchone() == (0,)
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("INSERT INTO t VALUES (0)")
        with pytest.raises(StoreError, match=r"pomelo\.db is damaged"):
            damage.check(connection, path, ["CREATE TABLE other (n)"])


RECORD = encode_record(UsageRecord("t", "req", "acme", True, "k", "rest", "m", "text")).decode()


def garbage(path: Path) -> None:
    path.write_bytes(b"nothing " * 1000)


def log_is_a_folder(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (n)")
    path.with_name("pomelo.db-wal").mkdir()


def empty(path: Path) -> None:
    path.touch()


def wrong_reservation(path: Path, record: str = "nothing", counted: str = "{}") -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO accounts (name) VALUES ('acme')")
        connection.execute(
            "INSERT INTO holds (task_id, account, live, amount, record, counted)"
            " VALUES ('t', 'acme', 1, 5, CAST(? AS BLOB), ?)",
            (record, counted),
        )


def undecodable_account(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO accounts (name) VALUES (CAST(x'ff' AS TEXT))")
        connection.execute(
            "INSERT INTO holds (task_id, account, live, amount, record, counted)"
            " SELECT 't', name, 1, 5, CAST('{}' AS BLOB), '{}' FROM accounts WHERE name != 'default'"
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (garbage, "is damaged or no Pomelo database: file is not a database"),
        (log_is_a_folder, "can't be opened: Is a directory"),
        (empty, "is damaged: it is empty"),
        (wrong_reservation, "is damaged: its reservations can't be read"),
        (undecodable_account, "a text in it can't be read"),
    ],
)
async def test_a_file_that_can_not_be_opened_is_released(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "pomelo.db"
    if spoil in (wrong_reservation, undecodable_account):
        async with open_sqlite(path):
            pass
    spoil(path)
    for _ in range(2):  # otherwise the second one finds it in use
        with pytest.raises(StoreError, match=re.escape(message)):
            async with open_sqlite(path, lock_wait=0.0):
                pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("record", "counted"),
    [
        ("{}", "{}"),
        ("[]", "{}"),
        ("7", "{}"),
        (RECORD, "nothing"),
        (RECORD, "[]"),
        (RECORD, '{"budget:k": 5}'),
        (RECORD, '{"budget:k": [5]}'),
    ],
)
async def test_a_reservation_of_a_wrong_form_is_damage(tmp_path: Path, record: str, counted: str) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path):
        pass
    wrong_reservation(path, record, counted)
    with pytest.raises(StoreError, match="is damaged: its reservations can't be read"):
        async with open_sqlite(path):
            pytest.fail("it was opened")


async def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 9))
    with pytest.raises(StoreError, match=r"is too old; Pomelo needs 3\.37 or later"):
        async with open_sqlite(tmp_path / "pomelo.db"):
            pytest.fail("it was opened")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 0))
    async with open_sqlite(tmp_path / "pomelo.db"):
        pass
