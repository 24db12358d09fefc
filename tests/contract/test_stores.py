"""The keys role of every store, and the SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pomelo.errors import PomeloError
from pomelo.stores import open_store
from pomelo.stores.accounts import UnknownAccountError
from pomelo.stores.base import Store, StoreError
from pomelo.stores.keys import KeyRecord
from pomelo.stores.schema import MIGRATIONS
from pomelo.stores.sqlite import open_sqlite
from tests.redis_server import any_server
from tests.unit.refusals import refused


def record(key_id: str = "a" * 12, **changes: Any) -> KeyRecord:
    values: dict[str, Any] = {
        "account": "default",
        "live": False,
        "digest": b"\x00\xff",
        "models": (),
        "created": 1.5,
    }
    return KeyRecord(key_id, **(values | changes))


def sqlite_url(folder: Path) -> str:
    return f"sqlite:{folder / 'pomelo.db'}"


def redis_url(folder: Path) -> str:
    url = any_server()
    with Redis.from_url(url) as server:
        server.flushdb()
    return f"{url}?persistence=none"


@pytest.fixture(params=[sqlite_url, redis_url], ids=["sqlite", "redis"])
def open_same_store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[], AbstractAsyncContextManager[Store]]:
    """Opens the same store at each call."""
    return partial(open_store, request.param(tmp_path), archive=f"sqlite:{tmp_path / 'usage.db'}")


@pytest.fixture
async def store(open_same_store: Any) -> AsyncIterator[Store]:
    async with open_same_store() as opened:
        yield opened


# --- keys in every store


async def test_a_key_is_read_back_unchanged(store: Store) -> None:
    for key in (
        record(),
        record(
            "b" * 12,
            live=True,
            models=("gpt-4", 'a"b,c'),
            expires=9.25,
            revoked=3.0,
            digest=bytes(range(256)),
        ),
    ):
        await store.add_key(key)
        assert await store.get_key(key.key_id) == key


async def test_a_digest_is_replaced_only_if_it_is_the_expected_one(store: Store) -> None:
    for key_id in ("a" * 12, "b" * 12, "c" * 12):
        await store.add_key(record(key_id, created=1790000000.123456, models=('"digest":"' + "64" * 32,)))
    old = record().digest
    await store.rehash_key("a" * 12, b"another", b"new", "2")
    assert (await store.get_key("a" * 12)) == record(
        created=1790000000.123456, models=('"digest":"' + "64" * 32,)
    )
    for _ in range(2):
        await store.rehash_key("a" * 12, old, b"new", "2")
    await store.rehash_key("b" * 12, old, old, "1")
    await store.rehash_key("nothing", old, old, "2")
    assert (await store.get_key("a" * 12)) == record(
        created=1790000000.123456, models=('"digest":"' + "64" * 32,), digest=b"new"
    )
    ids = ["a" * 12, "b" * 12, "c" * 12, "nothing"]
    assert await store.keys_of_secret("2", ids) == {"a" * 12}
    assert await store.keys_of_secret("1", ids) == {"b" * 12}
    assert await store.keys_of_secret("2", []) == set()
    await store.rehash_key("b" * 12, old, b"new", "2")
    assert await store.keys_of_secret("2", ids) == {"a" * 12, "b" * 12}


async def test_an_unknown_key_has_no_record(store: Store) -> None:
    assert await store.get_key("nothing") is None
    assert await store.get_key("' OR 1=1 --") is None
    assert await store.revoke_key("nothing", 1.0) is None


async def test_a_key_survives_a_restart(open_same_store: Any) -> None:
    async with open_same_store() as store:
        await store.add_key(record())
    async with open_same_store() as store:
        assert await store.get_key("a" * 12) == record()


async def test_a_key_of_an_unknown_account_is_refused_and_not_stored(store: Store) -> None:
    with pytest.raises(UnknownAccountError):
        await store.add_key(record(account="nobody"))
    assert await store.list_keys() == []


async def test_a_key_id_can_not_be_used_twice(store: Store) -> None:
    await store.add_key(record())
    with refused("store_unavailable"):
        await store.add_key(record(digest=b"other"))
    assert await store.get_key("a" * 12) == record()


async def test_keys_are_listed_oldest_first_by_account(store: Store) -> None:
    for key_id, created in (("c", 2.0), ("a", 3.0), ("b", 1.0)):
        await store.add_key(record(key_id, created=created))
    assert [key.key_id for key in await store.list_keys()] == ["b", "c", "a"]
    assert len(await store.list_keys("default")) == 3
    assert await store.list_keys("nobody") == []


async def test_keys_are_listed_page_by_page(store: Store) -> None:
    await store.add_account("other", "pro", 1.0)
    keys = [record(f"k{n}", account=("default", "other")[n % 2], created=float(n // 3)) for n in range(10)]
    for key in reversed(keys):
        await store.add_key(key)
    await store.revoke_key("k4", 9.0)
    assert await store.replace_key("k5", record("k99", account="other", created=1.0), 9.0)
    expected = ["k0", "k1", "k2", "k3", "k4", "k5", "k99", "k6", "k7", "k8", "k9"]
    for limit in range(1, 13):
        for account in (None, "default", "other"):
            found, after = [], None
            while page := await store.list_keys(account, limit=limit, after=after):
                assert len(page) <= limit
                found += page
                after = (page[-1].created, page[-1].key_id)
            assert [key.key_id for key in found if account is None] in ([], expected)
            assert found == [key for key in await store.list_keys() if account in (None, key.account)]
    assert {key.key_id for key in await store.list_keys() if key.revoked} == {"k4", "k5"}


async def test_revoking_a_key_again_keeps_the_first_time(store: Store) -> None:
    await store.add_key(record())
    for at in (7.0, 8.0):
        assert await store.revoke_key("a" * 12, at) == record(revoked=7.0)


async def test_a_key_is_replaced_completely_or_not_at_all(store: Store) -> None:
    await store.add_key(record("old"))
    with pytest.raises(UnknownAccountError):
        await store.replace_key("old", record("new", account="nobody"), 5.0)
    assert await store.get_key("old") == record("old")
    assert await store.replace_key("old", record("new"), 6.0)
    assert await store.get_key("old") == record("old", revoked=6.0)
    assert await store.get_key("new") == record("new")


async def test_a_key_is_not_replaced_by_one_whose_id_is_taken(store: Store) -> None:
    taken = record("taken", expires=77.0)
    await store.add_key(record("old"))
    await store.add_key(taken)
    with pytest.raises(PomeloError):
        await store.replace_key("old", record("taken"), 5.0)
    assert await store.get_key("old") == record("old")
    assert await store.get_key("taken") == taken


async def test_only_a_valid_key_is_replaced_and_only_once(store: Store) -> None:
    await store.add_key(record("old"))
    replaced = await asyncio.gather(*(store.replace_key("old", record(f"new{n}"), 5.0) for n in range(5)))
    assert sorted(replaced) == [False] * 4 + [True]
    assert len(await store.list_keys()) == 2
    assert not await store.replace_key("nothing", record("x"), 5.0)


async def test_a_key_that_expires_has_one_successor(store: Store) -> None:
    await store.add_key(record("old"))
    assert await store.replace_key("old", record("new"), 5.0, expires=9.0)
    for expires in (9.0, 90.0, None):
        assert not await store.replace_key("old", record("other"), 6.0, expires=expires)
    assert await store.get_key("old") == record("old", expires=9.0, successor="new")
    assert await store.get_key("other") is None


async def test_an_older_use_of_a_key_replaces_no_later_one(store: Store) -> None:
    await store.add_key(record("k1"))
    for at, kept in ((120.0, 120.0), (60.0, 120.0), (180.0, 180.0)):
        await store.record_key_use({"k1": at})
        assert await store.get_key("k1") == record("k1", used=kept)


async def test_concurrent_callers_are_all_served(store: Store) -> None:
    await asyncio.gather(*(store.add_key(record(f"key{n}")) for n in range(100)))
    found = await asyncio.gather(*(store.get_key(f"key{n}") for n in range(100)))
    assert found == [record(f"key{n}") for n in range(100)]


async def test_a_closed_store_is_unavailable(open_same_store: Any) -> None:
    async with open_same_store() as store:
        pass
    with refused("store_unavailable"):
        await store.get_key("a")


async def test_an_unknown_kind_of_store_is_refused() -> None:
    for url in ("postgresql://127.0.0.1", "redis:", "sqlite:", ""):
        with pytest.raises(StoreError, match="kind"):
            open_store(url)


# --- the SQLite file


async def opening_error(path: Path, lock_wait: float = 0.0) -> str:
    with pytest.raises(StoreError) as caught:
        async with open_sqlite(path, lock_wait=lock_wait):
            pass
    return str(caught.value)


def modes_of_files(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    async with open_store(sqlite_url(tmp_path)) as store:
        await store.add_key(record())
        modes = modes_of_files(tmp_path)
    assert set(modes) == {"pomelo.db", "pomelo.db-wal", "pomelo.db-shm", "pomelo.db.lock"}
    assert set(modes.values()) == {0o600}


async def test_a_second_process_is_refused_until_the_first_closes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path):
        assert "used by another process" in await opening_error(path)
    async with open_sqlite(path):
        pass


async def test_opening_waits_for_another_process_that_is_closing(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    holding = asyncio.Event()

    async def hold() -> None:
        async with open_sqlite(path):
            holding.set()
            await waiting

    async def wait() -> None:
        async with open_sqlite(path, lock_wait=30.0) as store:
            assert await store.list_keys() == []

    waiting = asyncio.get_running_loop().create_future()
    holder = asyncio.create_task(hold())
    await holding.wait()
    waiter = asyncio.create_task(wait())
    waiting.get_loop().call_later(0.1, waiting.set_result, None)
    await asyncio.gather(holder, waiter)


async def test_the_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom pomelo.stores.keys import KeyRecord\n"
        "from pomelo.stores.sqlite import open_sqlite\n"
        "async def main():\n"
        "    async with open_sqlite(Path(sys.argv[1])) as store:\n"
        "        await store.add_key(KeyRecord('k', 'default', False, b'd', (), 1.0))\n"
        "        print('kept', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(path), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"kept\n"
    assert f"pid {process.pid}" in await opening_error(path)
    process.kill()
    await process.wait()
    async with open_sqlite(path) as store:
        assert await store.get_key("k") is not None


async def test_a_file_that_is_no_database_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(b"my diary " * 1000)
    assert "damaged or no Pomelo database" in await opening_error(path)
    assert path.read_bytes() == b"my diary " * 1000


async def test_a_database_of_another_program_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE diary (day TEXT)")
    before = path.read_bytes()
    assert "another program" in await opening_error(path)
    assert path.read_bytes() == before


async def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    async with open_sqlite(path):
        pass
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("INSERT INTO migrations VALUES (?, 1.0)", (len(MIGRATIONS) + 1,))
        newer.commit()
    assert "newer Pomelo" in await opening_error(path)


async def test_a_refused_file_is_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    path.write_bytes(b"x" * 5000)
    await opening_error(path)
    path.unlink()
    async with open_sqlite(path):
        pass


async def test_a_folder_that_can_not_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be opened" in await opening_error(tmp_path / "file" / "pomelo.db")


@pytest.mark.parametrize("exists", [False, True])
async def test_a_linked_file_has_its_log_and_its_lock_beside_itself(tmp_path: Path, exists: bool) -> None:
    link, path = tmp_path / "data" / "pomelo.db", tmp_path / "disk" / "pomelo.db"
    for folder in (link.parent, path.parent):
        folder.mkdir()
    if exists:
        async with open_sqlite(path):
            pass
    link.symlink_to(path)
    async with open_store(f"sqlite:{link}"):
        assert list(link.parent.iterdir()) == [link]
        files = {each.name for each in path.parent.iterdir()}
        assert files == {"pomelo.db", "pomelo.db-wal", "pomelo.db-shm", "pomelo.db.lock"}
        assert "is used by another process" in await opening_error(path)


async def test_each_migration_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    for _ in range(2):
        async with open_sqlite(path):
            pass
    with closing(sqlite3.connect(path)) as connection:
        versions = [row[0] for row in connection.execute("SELECT version FROM migrations ORDER BY version")]
        strict = connection.execute("SELECT count(*) FROM pragma_table_list WHERE strict = 1").fetchone()[0]
    assert versions == list(range(1, len(MIGRATIONS) + 1))
    assert strict == 10
