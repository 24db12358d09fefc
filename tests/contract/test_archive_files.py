"""Archives in SQLite files: who can read them, how they are written, and how they fail."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.stores.archive import check_archive, open_archive
from pomelo.stores.archive.sqlite import _APPLICATION_ID, _SqliteArchive
from pomelo.stores.base import StoreError
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import record
from tests.ports import free_port
from tests.unit.refusals import refused


async def test_a_file_that_can_not_be_written_is_logged_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.archive.sqlite._BUSY_TIMEOUT", 0.01)
    path = tmp_path / "usage.db"
    async with open_archive(f"sqlite:{path}") as archive:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for task_id in ("a", "b"):
                with refused("store_unavailable"):
                    await archive.add([record(task_id)])
            other.execute("COMMIT")
            other.execute("BEGIN IMMEDIATE")
            assert await archive.get("a") is None  # it can be read
            with refused("store_unavailable"):
                await archive.add([record("b")])
        await archive.add([record("c")])
    failed, worked = [line.getMessage() for line in caplog.records]
    assert failed == "The archive of usage records fails: database is locked"
    assert worked.startswith("The archive of usage records works again after ")


async def test_only_the_owner_can_read_the_files_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "usage.db"
    async with open_archive(f"sqlite:{path}") as archive:
        await archive.add([record("a")])
        # A write-ahead log of several processes can be damaged by some versions of SQLite.
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_records_of_an_archive_are_synced_to_disk(tmp_path: Path) -> None:
    async with open_archive(f"sqlite:{tmp_path / 'usage.db'}") as archive:
        assert isinstance(archive, _SqliteArchive)
        found = await archive._run(
            lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        )
    assert found == ["delete", 2]


async def test_a_transaction_that_could_not_be_rolled_back_ends_with_the_next(tmp_path: Path) -> None:
    async with open_archive(f"sqlite:{tmp_path / 'usage.db'}") as archive:
        assert isinstance(archive, _SqliteArchive)
        await archive._run(lambda connection: connection.execute("BEGIN"))
        await archive.add([record("a")])
        assert await archive.get("a") == record("a")


async def test_an_archive_waits_for_another_process_that_writes(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with open_archive(f"sqlite:{path}") as archive:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            adding = asyncio.create_task(archive.add([record("a")]))
            # It has begun when the archive's only thread has taken it: a later call is then not in its way.
            done, _ = await asyncio.wait({adding}, timeout=0.2)
            assert not done
            other.execute("COMMIT")
        await adding
        assert await archive.get("a") == record("a")


async def test_an_archive_is_always_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await check_archive("sqlite::memory:")
    async with open_archive("sqlite::memory:") as archive:
        await archive.add([record("a")])
    async with open_archive(f"sqlite:{tmp_path / ':memory:'}") as archive:
        assert await archive.get("a") == record("a")


async def test_a_file_of_another_program_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE diary (day TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="no archive of Pomelo"):
        async with open_archive(f"sqlite:{path}"):
            pass
    assert path.read_bytes() == before
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="it is empty"):
        async with open_archive(f"sqlite:{path}"):
            pass


async def test_damage_of_an_archive_is_refused_logged_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.db"
    async with open_archive(f"sqlite:{path}") as archive:
        await archive.add([record(f"t{n}", prices="x" * 1_000) for n in range(100)])
        assert await archive.damage() == []
        content = bytearray(path.read_bytes())
        content[24:28] = b"\xff" * 4  # the count of changes: what was read before is read again
        content[4096:] = b"\xaa" * (len(content) - 4096)
        path.write_bytes(content)
        with refused("store_unavailable"):
            await archive.sum_usage(UsageQuery(), ("model",))
        assert [each.getMessage().count("is damaged") for each in caplog.records] == [1]
        found = await archive.damage()
        assert {name for name, _ in found} == {str(path)}
        assert "Stop Pomelo" in found[0][1]
    with pytest.raises(StoreError, match="is damaged"):
        async with open_archive(f"sqlite:{path}"):
            pass


async def test_checking_an_archive_connects_and_creates_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    await check_archive(f"sqlite:{folder / 'usage.db'}")
    assert not folder.exists()
    with pytest.raises(StoreError, match=r"used \(\w+\)\. Start it, or correct"):
        await check_archive(f"postgresql://ada:secret@127.0.0.1:{free_port()}/none")
    with pytest.raises(StoreError, match="There is no archive of the kind"):
        open_archive("sqlite:")


async def test_a_link_to_an_archive_is_checked_as_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "usage.db").symlink_to("disk/usage.db")
    (tmp_path / "disk/usage.db-journal").write_text("of a file that is missing")
    with pytest.raises(StoreError, match="is missing, and its log"):
        await check_archive(f"sqlite:{tmp_path / 'usage.db'}")
    with pytest.raises(StoreError, match="is missing, and its log"):
        async with open_archive(f"sqlite:{tmp_path / 'usage.db'}"):
            pass


async def test_checking_an_archive_finds_what_opening_it_would_find(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with open_archive(f"sqlite:{path}") as archive:
        await archive.add([record("t")])
        before = path.read_bytes()
        await check_archive(f"sqlite:{path}")  # beside a process that has it open
    assert path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database " * 400)
    (tmp_path / "empty").touch()
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE a (b)")
    with closing(sqlite3.connect(tmp_path / "newer")) as newer:
        newer.executescript(f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = 99")
    for name, message in (
        ("/", "can't be used: unable to open database file"),
        ("folder", "can't be used: unable to open database file"),
        ("text/usage.db", "can't be opened: Not a directory"),
        ("text", "is damaged or no Pomelo database: file is not a database"),
        ("empty", "is damaged: it is empty"),
        ("other", "is no archive of Pomelo"),
        ("newer", "was written by a newer Pomelo"),
    ):
        with pytest.raises(StoreError, match=message):
            await check_archive(f"sqlite:{tmp_path / name}")
        with pytest.raises(StoreError):
            async with open_archive(f"sqlite:{tmp_path / name}"):
                pass
