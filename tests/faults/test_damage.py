"""A damaged store file is refused at startup or reported by the audit, with what to do about it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.accounts.audit import audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.errors import PomeloError
from pomelo.stores.archive.sqlite import open_archive
from pomelo.stores.base import KeyRecord, StoreError
from pomelo.stores.ledger import IdempotencyKey, ReserveRequest, Settlement, UsageQuery
from pomelo.stores.sqlite import damage, open_sqlite
from tests.integration.commands import addresses, pomelo, staying
from tests.unit.accounts.audited_store import PRICES, add_account, draft, reserve, run

PAGE = 4096
SEED = 20


async def fill(path: Path) -> None:
    """Makes a store with rows in each of its tables and no page that is free."""
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        for number in range(10):
            await add_account(store, f"account-{number}")
            key = KeyRecord(f"key{number:09d}", f"account-{number}", True, bytes([number]) * 32, (), 1.0)
            await store.add_key(key)
        await asyncio.gather(*[run(store, f"task_{number:026d}") for number in range(120)])
        for number in range(20):
            once = IdempotencyKey(f"{number:064d}", b"f" * 32)
            await store.reserve(
                ReserveRequest(draft(f"once_{number}"), minimum=1, maximum=5_000, idempotency_key=once)
            )
            counts = {"input_tokens": 10, "output_tokens": 5}
            record = replace(draft(f"once_{number}", **counts), cost=cost(Usage(**counts), PRICES))
            await store.settle(Settlement(record, answer=b"an answer " * 40))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")


async def fill_archive(path: Path) -> None:
    """Makes an archive with records."""
    async with open_archive(f"sqlite:{path}") as archive:
        await archive.add([draft(f"task_{number}", at=float(number)) for number in range(200)])


@pytest.fixture(scope="module")
async def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a store's file."""
    path = tmp_path_factory.mktemp("whole") / "pomelo.db"
    await fill(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
async def archived(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an archive."""
    path = tmp_path_factory.mktemp("whole") / "usage.db"
    await fill_archive(path)
    return path.read_bytes()


# --- kinds of damage


def bad_pages(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Each page in turn, replaced by zeros, random bytes or the contents of another page."""
    chance = random.Random(SEED)
    count = len(whole) // PAGE
    for number in range(count):
        other = (number + chance.randrange(1, count)) % count
        for name, page in (
            ("zeros", bytes(PAGE)),
            ("garbage", chance.randbytes(PAGE)),
            ("another's", whole[other * PAGE :][:PAGE]),
        ):
            yield f"page {number + 1}: {name}", whole[: number * PAGE] + page + whole[(number + 1) * PAGE :]


def bad_heads(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """The header of each page, and that of the file, overwritten with random bytes."""
    chance = random.Random(SEED)
    for number in range(len(whole) // PAGE):
        at = number * PAGE + (0 if number else 100)
        yield f"page {number + 1}: head", whole[:at] + chance.randbytes(12) + whole[at + 12 :]
    yield "the file's head", chance.randbytes(100) + whole[100:]
    yield "the file's mark", b"SQLite format 2\0" + whole[16:]


def cut(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Only the first part of the file."""
    chance = random.Random(SEED)
    for size in [1, 15, 99, 100, 511, PAGE, 2 * PAGE, len(whole) - PAGE, len(whole) - 1] + [
        chance.randrange(1, len(whole)) for _ in range(11)
    ]:
        yield f"cut to {size}", whole[:size]


def flipped(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Random bit flips, in 20 files."""
    chance = random.Random(SEED)
    for number in range(20):
        bent = bytearray(whole)
        for _ in range(20):
            bent[chance.randrange(len(bent))] ^= 1 << chance.randrange(8)
        yield f"flips {number}", bytes(bent)


async def store_says(path: Path) -> str:
    """The error from opening a store's file or from the audit; empty if the file is intact."""
    try:
        async with open_sqlite(path) as store:
            found = (await audit(store)).findings
            return f"{found[0].subject}: {found[0].detail}" if found else ""
    except StoreError as error:
        return str(error)


async def archive_says(path: Path) -> str:
    """The same of an archive."""
    try:
        async with open_archive(f"sqlite:{path}") as archive:
            return " ".join(part for found in await archive.damage() for part in found)
    except StoreError as error:
        return str(error)


@pytest.mark.parametrize("spoil", [bad_pages, bad_heads, cut, flipped])
@pytest.mark.parametrize("which", ["database", "archived"])
async def test_no_damage_is_silent(
    which: str,
    spoil: Callable[[bytes], Iterator[tuple[str, bytes]]],
    database: bytes,
    archived: bytes,
    tmp_path: Path,
) -> None:
    whole = database if which == "database" else archived
    says: Callable[[Path], Awaitable[str]] = store_says if which == "database" else archive_says
    silent, count = [], 0
    for name, bent in spoil(whole):
        if bent == whole:
            continue
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        path = folder / ("pomelo.db" if which == "database" else "usage.db")
        path.write_bytes(bent)
        said = await says(path)
        assert "\n" not in said
        if not said:
            silent.append(name)
        elif "another program" not in said and "no archive" not in said and "newer" not in said:
            assert path.name in said or "acme" in said or "task_" in said, said
            assert "backup" in said or "microcredits" in said or "billed" in said, said
        shutil.rmtree(folder)
    logging.getLogger(__name__).info("%s of %s: %d files", spoil.__name__, which, count)
    assert count >= 15
    assert silent == []


@pytest.mark.parametrize("which", ["pomelo.db", "usage.db"])
async def test_an_empty_file_is_refused_and_not_initialised(which: str, tmp_path: Path) -> None:
    path = tmp_path / which
    path.write_bytes(b"")
    says = store_says if which == "pomelo.db" else archive_says
    for _ in range(2):
        said = await says(path)
        assert str(path) in said
        assert "is empty. Restore a backup" in said
        assert "or delete it to start anew" in said
        assert path.read_bytes() == b""
    path.unlink()
    assert await says(path) == ""


async def test_a_log_without_its_file_is_refused_and_not_initialised(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    (tmp_path / "pomelo.db-wal").write_bytes(b"what was committed last")
    said = await store_says(path)
    assert f"{path} is missing, and its log pomelo.db-wal is there. Restore both" in said
    (tmp_path / "pomelo.db-wal").unlink()
    assert await store_says(path) == ""


async def test_a_new_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DiskFullError(sqlite3.OperationalError):
        sqlite_errorcode = sqlite3.SQLITE_FULL

    def fails(connection: sqlite3.Connection, path: Path) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise DiskFullError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("pomelo.stores.sqlite.file._migrate", fails)
        assert "Free or mend the disk" in await store_says(tmp_path / "pomelo.db")
    assert os.listdir(tmp_path) == ["pomelo.db.lock"]  # noqa: PTH208
    assert await store_says(tmp_path / "pomelo.db") == ""


@pytest.mark.parametrize("change", ["sql = replace(sql, 'request_id', 'request_ib')", "name = 'usaga'"])
@pytest.mark.parametrize("which", ["database", "archived"])
async def test_a_table_with_an_altered_definition_is_refused(
    which: str, change: str, database: bytes, archived: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(database if which == "database" else archived)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(f"UPDATE sqlite_schema SET {change} WHERE name = 'usage'")
    said = await (store_says if which == "database" else archive_says)(path)
    assert f"{path} is damaged" in said or "it is damaged" in said
    assert damage.REMEDY in said


# --- the log that a crash leaves


@pytest.fixture
async def crashed(tmp_path: Path) -> Path:
    """A store's file and log as left by a process that dies after it has settled 20 tasks."""
    path, copy = tmp_path / "pomelo.db", tmp_path / "crashed"
    async with open_sqlite(path):
        pass
    copy.mkdir()
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        for number in range(20):
            await run(store, f"task_{number}")
        for name in ("pomelo.db", "pomelo.db-wal"):
            shutil.copy(tmp_path / name, copy / name)
    return copy / "pomelo.db"


async def test_an_intact_log_of_a_crash_is_recovered(crashed: Path) -> None:
    commits = damage.last_commits(crashed)
    assert commits is not None
    assert len(commits) >= 40
    async with open_sqlite(crashed) as store:
        records, _ = await store.list_usage(UsageQuery(), limit=100)
        assert len(records) == 20
        assert not (await audit(store)).findings


@pytest.mark.parametrize("at", [0, 8, 16, 28, 32, 36, 40, 60, 5_000, 20_000])
async def test_a_damaged_log_of_a_crash_loses_nothing_silently(crashed: Path, at: int) -> None:
    log = crashed.with_name("pomelo.db-wal")
    bent = bytearray(log.read_bytes())
    bent[at] ^= 0x10
    log.write_bytes(bent)
    said = await store_says(crashed)
    assert "pomelo.db-wal" in said
    assert "damaged" in said


async def test_what_a_crash_cut_off_was_never_acknowledged(crashed: Path) -> None:
    log = crashed.with_name("pomelo.db-wal")
    whole = log.read_bytes()
    commits = damage.last_commits(crashed)
    assert commits is not None
    frame = 24 + PAGE
    log.write_bytes(whole[: 32 + (commits[-1] - 1) * frame + 1000])  # within the last transaction
    assert await store_says(crashed) == ""
    async with open_sqlite(crashed) as store:
        assert len((await store.list_usage(UsageQuery(), limit=100))[0]) in (19, 20)


# --- damage while the store is open


async def test_damage_that_a_statement_meets_is_logged_once_and_reported_by_the_audit(
    database: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(database)
    async with open_sqlite(path) as store:
        before = path.read_bytes()
        path.write_bytes(before[:PAGE] + b"\xff" * (len(before) - PAGE))
        for _ in range(3):
            with pytest.raises(PomeloError) as caught:
                await store.list_usage(UsageQuery(), limit=500)
            assert caught.value.code == "store_unavailable"
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert line.startswith(f"{path} is damaged: ")
        assert damage.REMEDY in line
        found = (await audit(store)).findings
        assert (found[0].check, found[0].subject) == ("database", str(path))
        assert damage.REMEDY in found[0].detail
        assert len(found) > 1


async def test_damage_that_a_write_meets_is_logged_too(
    database: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(database)
    async with open_sqlite(path) as store:

        def meets(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_schema SET rootpage = 2 WHERE name = 'keys'")
            connection.execute("PRAGMA schema_version = 77")
            connection.execute("INSERT INTO keys SELECT * FROM keys").fetchall()

        with pytest.raises(PomeloError):
            await store._writer.do(meets)
        assert sum("is damaged" in record.getMessage() for record in caplog.records) == 1
        assert await store.list_accounts() != []


async def test_a_large_file_is_checked_for_a_bounded_time(
    database: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(database)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        row = connection.execute("SELECT * FROM usage LIMIT 1").fetchone()
        marks = ", ".join("?" * (len(row) - 1))
        connection.execute("BEGIN")
        connection.executemany(
            f"INSERT INTO usage VALUES (?, {marks})",
            ((f"more_{number}", *row[1:]) for number in range(150_000)),
        )
        connection.execute("COMMIT")
    monkeypatch.setattr(damage, "CHECK_SECONDS", 0.05)
    with caplog.at_level(logging.INFO):
        async with open_sqlite(path) as store:
            assert (await store.get_account("acme")) is not None
    assert any("looked over in part" in record.getMessage() for record in caplog.records)


# --- what the operator sees


async def test_serve_and_the_audit_report_damage_to_the_operator(database: bytes, tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = await pomelo(tmp_path, "keys", "create")
    assert made.status == 0, made.error
    path = data / "pomelo.db"
    whole = path.read_bytes()
    path.write_bytes(whole[: 5 * PAGE] + bytes(PAGE) + whole[6 * PAGE :])
    for command in ("serve", "audit"):
        ended = await pomelo(tmp_path, command, **addresses())
        assert ended.status == 1
        assert str(path) in ended.error
        assert "restore a backup" in ended.error
        assert len(ended.error.splitlines()) == 1
    path.write_bytes(database)
    async with staying(tmp_path, "serve", **addresses()) as server:
        await server.until("gRPC")
        with path.open("r+b") as file:
            file.seek(PAGE)
            file.write(b"\xff" * (len(database) - PAGE))
        ended = await pomelo(tmp_path, "audit")
        assert ended.status == 1
        assert "store_unavailable" not in ended.out + ended.error
        assert "database" in ended.out
        assert str(path) in ended.out
        assert damage.REMEDY in ended.out


async def test_a_running_task_does_not_fail_the_check(database: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(database)
    async with open_sqlite(path) as store:
        await reserve(store, "running")
        assert not (await audit(store)).findings


async def test_damage_of_an_open_archive_is_reported_too(archived: bytes, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    path.write_bytes(archived)
    async with open_archive(f"sqlite:{path}") as archive:
        assert await archive.damage() == []
        path.write_bytes(archived[:PAGE] + b"\xff" * (len(archived) - PAGE))
        found = await archive.damage()
        assert {name for name, _ in found} == {str(path)}
        assert damage.REMEDY in found[0][1]
        assert len(found) > 1


async def test_a_backup_that_is_made_while_tasks_run_is_complete(tmp_path: Path) -> None:
    path, backup = tmp_path / "pomelo.db", tmp_path / "backup" / "pomelo.db"
    backup.parent.mkdir(mode=0o700)

    def copy() -> None:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target, pages=3, sleep=0.001)

    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        copying = asyncio.gather(*[asyncio.to_thread(copy)])
        count = 0
        while not copying.done() or count < 50:
            await run(store, f"task_{count}")
            count += 1
        await copying
    assert await store_says(backup) == ""
