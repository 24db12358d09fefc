"""A damaged store file is refused at startup or reported by the audit, with what to do about it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pomelo.accounts.audit import audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.errors import PomeloError
from pomelo.stores.archive import open_archive
from pomelo.stores.base import StoreError
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import IdempotencyKey, ReserveRequest, Settlement
from pomelo.stores.sqlite import damage, open_sqlite
from pomelo.stores.usage import UsageQuery
from tests.faults.file_damage import PAGE, bad_heads, bad_pages, cut, flipped
from tests.integration.commands import free_addresses, pomelo, start_command
from tests.unit.accounts.audited_store import PRICES, add_account, draft, reserve, run
from tests.unit.refusals import refused


async def fill(path: Path) -> None:
    """Creates a store with rows in each table and without free pages."""
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        for number in range(10):
            await add_account(store, f"account-{number}")
            key = KeyRecord(f"key{number:09d}", f"account-{number}", True, bytes([number]) * 32, (), 1.0)
            await store.add_key(key)
        await asyncio.gather(*[run(store, f"task_{number:026d}") for number in range(120)])
        for number in range(20):
            once, idempotency_key = draft(f"once_{number}"), IdempotencyKey(f"{number:064d}", b"f" * 32)
            await store.reserve(ReserveRequest(once, 1, 5_000, idempotency_key=idempotency_key))
            price = cost(Usage(input_tokens=10, output_tokens=5), PRICES)
            record = replace(once, input_tokens=10, output_tokens=5, cost=price)
            await store.settle(Settlement(record, answer=b"an answer " * 40))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")


async def fill_archive(path: Path) -> None:
    async with open_archive(f"sqlite:{path}") as archive:
        await archive.add([draft(f"task_{number}", at=float(number)) for number in range(200)])


async def store_error(path: Path) -> str:
    """The error from opening a store's file or from the audit; empty if the file is intact."""
    try:
        async with open_sqlite(path) as store:
            found = (await audit(store)).findings
            return f"{found[0].subject}: {found[0].detail}" if found else ""
    except StoreError as error:
        return str(error)


async def archive_error(path: Path) -> str:
    """The same for an archive."""
    try:
        async with open_archive(f"sqlite:{path}") as archive:
            return " ".join(part for found in await archive.damage() for part in found)
    except StoreError as error:
        return str(error)


@dataclass(frozen=True)
class File:
    """An intact file of a store or an archive, and how to look for damage in a copy."""

    intact: bytes
    name: str
    error: Callable[[Path], Awaitable[str]]


@pytest.fixture(scope="module")
async def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, File]:
    """A file of each type."""
    folder = tmp_path_factory.mktemp("intact")
    await fill(folder / "pomelo.db")
    await fill_archive(folder / "usage.db")
    return {
        "database": File((folder / "pomelo.db").read_bytes(), "pomelo.db", store_error),
        "archived": File((folder / "usage.db").read_bytes(), "usage.db", archive_error),
    }


@pytest.fixture(params=["database", "archived"])
def file(request: pytest.FixtureRequest, files: Mapping[str, File]) -> File:
    return files[request.param]


@pytest.fixture
def path(files: Mapping[str, File], tmp_path: Path) -> Path:
    """A copy of a store's file."""
    copy = tmp_path / "pomelo.db"
    copy.write_bytes(files["database"].intact)
    return copy


@pytest.mark.parametrize("damage_file", [bad_pages, bad_heads, cut, flipped])
async def test_no_damage_is_unreported(
    file: File, damage_file: Callable[[bytes], Iterator[tuple[str, bytes]]], tmp_path: Path
) -> None:
    unreported, count = [], 0
    for name, damaged in damage_file(file.intact):
        if damaged == file.intact:
            continue
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        path = folder / file.name
        path.write_bytes(damaged)
        message = await file.error(path)
        assert "\n" not in message
        if not message:
            unreported.append(name)
        elif "another program" not in message and "no archive" not in message and "newer" not in message:
            assert path.name in message or "acme" in message or "task_" in message, message
            assert "backup" in message or "microcredits" in message or "billed" in message, message
        shutil.rmtree(folder)
    logging.getLogger(__name__).info("%s of %s: %d files", damage_file.__name__, file.name, count)
    assert count >= 15
    assert unreported == []


async def test_an_empty_file_is_refused_and_not_initialised(file: File, tmp_path: Path) -> None:
    path = tmp_path / file.name
    path.write_bytes(b"")
    for _ in range(2):
        message = await file.error(path)
        assert str(path) in message
        assert "is empty. Restore a backup" in message
        assert "or delete it to start anew" in message
        assert path.read_bytes() == b""
    path.unlink()
    assert await file.error(path) == ""


async def test_a_log_without_its_file_is_refused_and_not_initialised(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    (tmp_path / "pomelo.db-wal").write_bytes(b"what was committed last")
    message = await store_error(path)
    assert f"{path} is missing, and its log pomelo.db-wal is there. Restore both" in message
    (tmp_path / "pomelo.db-wal").unlink()
    assert await store_error(path) == ""


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (sqlite3.SQLITE_BUSY, "End the other program that has locked it"),
        (sqlite3.SQLITE_FULL, "Free or mend the disk"),
        (sqlite3.SQLITE_IOERR | 1 << 8, "Free or mend the disk"),
        (sqlite3.SQLITE_CANTOPEN, "Let this user read and write it, the files beside it and its folder"),
        (
            sqlite3.SQLITE_READONLY | 5 << 8,
            "Let this user read and write it, the files beside it and its folder",
        ),
    ],
)
async def test_a_new_file_is_complete_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    class FileError(sqlite3.OperationalError):
        sqlite_errorcode = code

    def fails(connection: sqlite3.Connection, path: Path) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise FileError("the reason")

    with monkeypatch.context() as patched:
        patched.setattr("pomelo.stores.sqlite.file._run_migrations", fails)
        assert f"can't be used: the reason. {remedy}" in await store_error(tmp_path / "pomelo.db")
    assert os.listdir(tmp_path) == ["pomelo.db.lock"]  # noqa: PTH208
    assert await store_error(tmp_path / "pomelo.db") == ""


@pytest.mark.parametrize("change", ["sql = replace(sql, 'request_id', 'request_ib')", "name = 'usaga'"])
async def test_a_table_with_an_altered_definition_is_refused(change: str, file: File, tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(file.intact)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(f"UPDATE sqlite_schema SET {change} WHERE name = 'usage'")
    message = await file.error(path)
    assert f"{path} is damaged" in message or "it is damaged" in message
    assert damage.REMEDY in message


# --- the log that a crash leaves


@pytest.fixture
async def crashed(tmp_path: Path) -> Path:
    """A store's file and log as left by a process that dies after it has settled 40 tasks."""
    path, copy = tmp_path / "pomelo.db", tmp_path / "crashed"
    async with open_sqlite(path):
        pass
    copy.mkdir()
    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        for number in range(40):
            await run(store, f"task_{number}")
        for name in ("pomelo.db", "pomelo.db-wal"):
            shutil.copy(tmp_path / name, copy / name)
    return copy / "pomelo.db"


async def test_an_intact_log_left_by_a_crash_is_recovered(crashed: Path) -> None:
    commits = damage.last_commits(crashed)
    assert commits is not None
    assert len(commits) >= 40
    async with open_sqlite(crashed) as store:
        records, _ = await store.list_usage(UsageQuery(), limit=100)
        assert len(records) == 40
        assert not (await audit(store)).findings


@pytest.mark.parametrize("at", [0, 8, 16, 28, 32, 36, 40, 60, 5_000, 20_000])
async def test_a_damaged_log_left_by_a_crash_is_reported(crashed: Path, at: int) -> None:
    log = crashed.with_name("pomelo.db-wal")
    damaged = bytearray(log.read_bytes())
    damaged[at] ^= 0x10
    log.write_bytes(damaged)
    message = await store_error(crashed)
    assert "pomelo.db-wal" in message
    assert "damaged" in message


async def test_a_log_truncated_by_a_crash_loses_only_an_unacknowledged_transaction(crashed: Path) -> None:
    log = crashed.with_name("pomelo.db-wal")
    intact = log.read_bytes()
    commits = damage.last_commits(crashed)
    assert commits is not None
    frame = 24 + PAGE
    log.write_bytes(intact[: 32 + (commits[-1] - 1) * frame + 1000])  # within the last transaction
    assert await store_error(crashed) == ""
    async with open_sqlite(crashed) as store:
        assert len((await store.list_usage(UsageQuery(), limit=100))[0]) in (39, 40)


# --- damage while the store is open


def ruin(path: Path) -> None:
    """Overwrites everything after the first page."""
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(b"\xff" * (path.stat().st_size - PAGE))


async def test_damage_found_by_a_statement_is_logged_once_and_reported_by_the_audit(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_sqlite(path) as store:
        ruin(path)
        for _ in range(3):
            with refused("store_unavailable"):
                await store.list_usage(UsageQuery(), limit=500)
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert line.startswith(f"{path} is damaged: ")
        assert damage.REMEDY in line
        found = (await audit(store)).findings
        assert (found[0].check, found[0].subject) == ("database", str(path))
        assert damage.REMEDY in found[0].detail
        assert len(found) > 1


async def test_damage_found_by_a_write_is_logged_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_large_file_is_checked_for_a_limited_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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


async def test_serve_and_the_audit_report_damage_to_the_operator(
    files: Mapping[str, File], tmp_path: Path
) -> None:
    created = await pomelo(tmp_path, "accounts", "create", "acme")
    assert created.status == 0, created.error
    path = tmp_path / "data" / "pomelo.db"
    intact = path.read_bytes()
    path.write_bytes(intact[: 5 * PAGE] + bytes(PAGE) + intact[6 * PAGE :])
    for command in ("serve", "audit"):
        ended = await pomelo(tmp_path, command, POMELO_REST="127.0.0.1:0", POMELO_GRPC="127.0.0.1:0")
        assert ended.status == 1
        assert str(path) in ended.error
        assert "restore a backup" in ended.error
        assert len(ended.error.splitlines()) == 1
    path.write_bytes(files["database"].intact)
    async with start_command(tmp_path, "serve", **free_addresses()) as server:
        await server.read_until("gRPC")
        ruin(path)
        ended = await pomelo(tmp_path, "audit")
        assert ended.status == 1
        assert "store_unavailable" not in ended.out + ended.error
        assert "database" in ended.out
        assert str(path) in ended.out
        assert damage.REMEDY in ended.out


async def test_a_running_task_does_not_fail_the_check(path: Path) -> None:
    async with open_sqlite(path) as store:
        await reserve(store, "running")
        assert not (await audit(store)).findings


async def test_damage_of_an_open_archive_is_reported_too(files: Mapping[str, File], tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    path.write_bytes(files["archived"].intact)
    async with open_archive(f"sqlite:{path}") as archive:
        assert await archive.damage() == []
        ruin(path)
        found = await archive.damage()
        assert {name for name, _ in found} == {str(path)}
        assert damage.REMEDY in found[0][1]
        assert len(found) > 1


async def test_a_backup_made_while_tasks_run_is_complete(tmp_path: Path) -> None:
    path, backup = tmp_path / "pomelo.db", tmp_path / "backup" / "pomelo.db"
    backup.parent.mkdir(mode=0o700)

    def copy() -> None:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target, pages=3, sleep=0.001)

    async with open_sqlite(path) as store:
        await add_account(store, micros=10**9)
        copying = asyncio.create_task(asyncio.to_thread(copy))
        count = 0
        while not copying.done() or count < 50:
            await run(store, f"task_{count}")
            count += 1
        await copying
    assert await store_error(backup) == ""
