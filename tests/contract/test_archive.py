"""The contract of archives, SQLite and Postgres, alone and behind the store on Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.archive import open_archive
from pomelo.stores.archive.base import Archive
from pomelo.stores.base import StoreError
from pomelo.stores.fleet import Fleet
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import names
from pomelo.stores.usage import Dimension, MetadataKey, UsageQuery, UsageTotal, encode_metadata
from tests.contract.ledger_rig import WALLET, record, request, run_task, settlement, wallets
from tests.ports import free_port
from tests.redis_server import any_server
from tests.unit.refusals import refused
from tests.waiting import first, until

ALL = UsageQuery()


async def test_a_record_is_read_back_unchanged(archive: Archive) -> None:
    original = record(
        "a", cost=2**53, uncollected=1, input_tokens=7, output_tokens=2**40, characters=3, images=4, pixels=5,
        audio_ms=6, provider_micros=11, processing_ms=8, first_byte_ms=9, output_bytes=10, prices="image=5", price_version="2026-11",
        provider="ünï", provider_model='"', source="recovered", complete=False, at=1_800_000_000.123456,
        reasoning_tokens=12, user="ada's \U0001f600 \"x\"\n", metadata=encode_metadata({"é\U0001f600": "\\u0000 \x01", "": ""}),
    )  # fmt: skip
    await archive.add([original])
    assert await archive.get("a") == original
    assert await archive.list_usage(ALL, limit=9) == ([original], "")
    assert await archive.get("b") is None


async def test_a_record_added_repeatedly_is_stored_once_per_task(url: str) -> None:
    async with open_archive(url) as one, open_archive(url) as two:
        batches = [[record(f"t{n}", cost=n) for n in range(k, k + 50)] for k in range(0, 100, 10)]
        await asyncio.gather(*[(one, two)[n % 2].add(batch) for n, batch in enumerate(batches)])
        await one.add([record("t0", cost=99)])
        await one.add([])
        stored, _ = await two.list_usage(ALL, limit=1_000)
        assert sorted((found.task_id, found.cost) for found in stored) == sorted(
            (f"t{n}", n) for n in range(140)
        )


async def test_a_nul_in_a_text_does_not_keep_records_out_of_the_archive(archive: Archive) -> None:
    await archive.add([record("a", user="x\0y"), record("b")])
    found, _ = await archive.list_usage(ALL, limit=9)
    assert [each.task_id for each in found] == ["b", "a"]
    assert found[1].user in ("x\0y", "x\ufffdy")  # Postgres can't store it


async def test_records_that_can_not_be_added_are_left_out_together(archive: Archive) -> None:
    with refused("store_unavailable"):
        await archive.add([record("a"), record("b", cost=-1), record("c")])
    await archive.add([record("d")])
    assert [each.task_id for each in (await archive.list_usage(ALL, limit=9))[0]] == ["d"]


async def test_a_closed_archive_is_unavailable(url: str) -> None:
    async with open_archive(url) as archive:
        await archive.add([record("a")])
    for call in (archive.add([record("b")]), archive.get("a"), archive.list_usage(ALL, limit=9)):
        with refused("store_unavailable", match=r"^Storage can't be reached\. Retry later$"):
            await call


async def test_an_archive_that_many_processes_create_is_created_once(url: str) -> None:
    async def add(task_id: str) -> None:
        async with open_archive(url) as archive:
            await archive.add([record(task_id)])

    await asyncio.gather(*[add(f"t{n}") for n in range(8)])
    async with open_archive(url) as archive:
        assert len((await archive.list_usage(ALL, limit=9))[0]) == 8


async def test_pages_are_newest_first_and_do_not_shift(archive: Archive) -> None:
    await archive.add([record(f"t{n}", at=float(n // 2)) for n in range(10)])
    found, after = [], ""
    for turn in range(4):
        page, after = await archive.list_usage(ALL, limit=3, after=after)
        found += [each.task_id for each in page]
        await archive.add([record(f"new{turn}", at=100.0)])
    assert after == ""
    assert found == [f"t{n}" for n in reversed(range(10))]
    for wrong in ("zz", "00", "ff" * 16):
        with pytest.raises(ValueError, match="after"):
            await archive.list_usage(ALL, limit=3, after=wrong)


async def test_a_page_that_ends_with_the_last_record_is_the_last(archive: Archive) -> None:
    await archive.add([record(f"t{n}", at=7.0) for n in range(6)])
    first, after = await archive.list_usage(ALL, limit=3)
    second, end = await archive.list_usage(ALL, limit=3, after=after)
    assert [each.task_id for each in first + second] == [f"t{n}" for n in reversed(range(6))]
    assert (after != "", end) == (True, "")
    assert await archive.list_usage(UsageQuery(account="nobody"), limit=3) == ([], "")


async def test_records_match_every_filter_of_a_query(archive: Archive) -> None:
    await archive.add([
        record("a", at=10.0),
        record("b", at=20.0, live=False),
        record("c", at=30.0, model="claude"),
        record("d", at=40.0, account="other", key_id="key"),
    ])  # fmt: skip
    for query, expected in (
        (UsageQuery(account="acme"), "cba"),
        (UsageQuery(live=False), "b"),
        (UsageQuery(live=True, account="acme", model="claude"), "c"),
        (UsageQuery(key_id="key"), "d"),
        (UsageQuery(since=20.0, until=40.0), "cb"),
        (UsageQuery(account="' OR 1=1 --"), ""),
    ):
        found, _ = await archive.list_usage(query, limit=9)
        assert "".join(each.task_id for each in found) == expected


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts this process into another time zone; the server of Postgres is in one, too."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("elsewhere")
async def test_sums_are_by_model_key_day_or_account(archive: Archive) -> None:
    day = 86_400.0
    await archive.add([
        record("a", at=day - 0.0004, cost=1, input_tokens=2, output_bytes=3),
        record("b", at=day, cost=10, model="Claude", audio_ms=5),
        record("c", at=day + 1, cost=100, account="other", uncollected=7),
    ])  # fmt: skip

    async def costs(by: Dimension) -> dict[str, int]:
        return {total.groups[0]: total.cost for total in await archive.sum_usage(ALL, (by,))}

    assert await costs("day") == {"1970-01-01": 1, "1970-01-02": 110}
    assert list((await costs("model")).items()) == [("Claude", 10), ("gpt-4", 101)]
    assert await costs("account") == {"acme": 11, "other": 100}
    found: list[UsageTotal] = []
    after = None
    while page := await archive.sum_usage(ALL, ("account",), limit=1, after=after):
        assert len(page) == 1
        found, after = found + page, page[-1].groups
    assert found == await archive.sum_usage(ALL, ("account",))
    [total] = await archive.sum_usage(UsageQuery(until=day), ("key",))
    assert (total.tasks, total.input_tokens, total.output_bytes, total.cost) == (1, 2, 3, 1)
    assert {type(count) for count in astuple(total)[1:]} == {int}
    assert await archive.sum_usage(UsageQuery(account="nobody"), ("day",)) == []
    [all_records] = await archive.sum_usage(ALL, ())
    assert await archive.sum_usage(ALL, (), after=all_records.groups) == []


async def test_sums_are_in_order_of_code_points_whatever_the_collation_of_postgres(
    postgres: Any, url: str
) -> None:
    if url != postgres.url:
        pytest.skip("only for Postgres")
    import asyncpg

    async with open_archive(url) as archive:
        await archive.add([record(user, user=user) for user in ("a", "B", "ä", "b")])
        connection = await asyncpg.connect(url)
        await connection.execute('ALTER TABLE pomelo_usage ALTER COLUMN "user" TYPE TEXT COLLATE "en-x-icu"')
        rows = await connection.fetch('SELECT "user" FROM pomelo_usage ORDER BY "user"')
        assert [row[0] for row in rows] == ["a", "ä", "b", "B"]
        await connection.close()
        totals = await archive.sum_usage(ALL, ("user", "model"))
        assert [total.groups[0] for total in totals] == ["B", "a", "b", "ä"]
        assert await archive.sum_usage(ALL, ("user", "model"), after=totals[1].groups) == totals[2:]


@pytest.fixture
def emptied() -> Iterator[Redis]:
    """The server of all tests, emptied."""
    with Redis.from_url(any_server()) as server:
        server.flushdb()
        yield server


@asynccontextmanager
async def open_over(url: str) -> AsyncIterator[Any]:
    """The store on that server, over an archive, in which WALLET has 1,000 microcredits."""
    timing = Timing(heartbeat=0.01, drain=0.01)
    async with open_redis(f"{any_server()}?persistence=none", url, timing=timing) as store:
        assert isinstance(store, Fleet)
        await store.add_account(WALLET.account, "pro", 1.0)
        await store.grant(Grant("g", WALLET, 1_000, 1.0))
        yield store


async def test_settled_records_are_moved_from_redis_to_the_archive_once(url: str, emptied: Redis) -> None:
    async with open_over(url) as store:
        store.drain_usage()
        for n in range(20):
            await store.reserve(request(f"t{n}", 10))
            await store.settle(settlement(f"t{n}", 10))
            assert len((await store.list_usage(ALL, limit=99))[0]) == n + 1
        assert (await store.sum_usage(ALL, ("account",)))[0].cost == 200
        assert await wallets(store) == [WALLET, Wallet("default", False)]
    assert [key for key in emptied.scan_iter() if b":usage" in key and emptied.xlen(key)] == []


@pytest.mark.usefixtures("emptied")
async def test_a_process_that_serves_moves_the_records_of_others_to_the_archive(url: str) -> None:
    async with open_archive(url) as archive, open_over(url) as store, open_over(url) as other:
        other.drain_usage()
        await run_task(store, "a")
        assert await first(lambda: archive.get("a"), bool)


async def test_a_process_that_does_not_serve_moves_no_records(tmp_path: Path, emptied: Redis) -> None:
    async with open_over(f"sqlite:{tmp_path / 'usage.db'}") as store:
        await run_task(store, "a")
        async with open_over(f"sqlite:{tmp_path / 'another.db'}") as command:
            for _ in range(50):
                assert len(await command.list_accounts(limit=9)) == 2
        assert emptied.xlen(names(WALLET).usage) == 1
        assert [one.task_id for one in (await store.list_usage(ALL, limit=9))[0]] == ["a"]


@pytest.mark.usefixtures("emptied")
async def test_settlements_continue_while_the_database_is_down(
    postgres: Any, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    if url != postgres.url:
        pytest.skip("only for Postgres")
    async with open_over(url) as store:
        failures: list[int] = []
        store.drain_usage(lambda: failures.append(1))
        postgres.stop()
        for n in range(20):
            await store.reserve(request(f"t{n}", 10))
            await store.settle(settlement(f"t{n}", 10))
        with refused("store_unavailable"):
            await store.list_usage(ALL, limit=1)
        await until(lambda: len(failures) > 2)
        (failed,) = [record.getMessage() for record in caplog.records if "archive" in record.getMessage()]
        assert failed.startswith("The archive of usage records fails: ")
        postgres.start()
        stored, _ = await store.list_usage(ALL, limit=99)
        assert sorted(found.task_id for found in stored) == sorted(f"t{n}" for n in range(20))
        lines = [record.getMessage() for record in caplog.records if "archive" in record.getMessage()]
        assert lines[-1].startswith("The archive of usage records works again after ")


@pytest.mark.parametrize("version", [1, 2])
async def test_a_table_of_an_earlier_version_is_extended_once(postgres: Any, url: str, version: int) -> None:
    if url != postgres.url:
        pytest.skip("files: see test_migrations.py")
    import asyncpg

    old = record("old", cost=5)
    async with open_archive(url) as archive:
        await archive.add([old])
    connection = await asyncpg.connect(url)
    added = {
        1: (
            "cached_input_tokens",
            "cache_write_input_tokens",
            "cache_write_1h_input_tokens",
            "provider_micros",
        ),
        2: ("reasoning_tokens", "user", "metadata"),
    }
    for column in [column for before in range(version, 3) for column in added[before]]:
        await connection.execute(f'ALTER TABLE pomelo_usage DROP COLUMN "{column}"')
    new = record(
        "new", at=99.0, cached_input_tokens=3, provider_micros=7, reasoning_tokens=2, user="ada",
        metadata=encode_metadata({"team": "red"}),
    )  # fmt: skip
    async with open_archive(url) as archive:
        await archive.add([new])
        assert await archive.list_usage(ALL, limit=9) == ([new, old], "")
        totals = await archive.sum_usage(ALL, ("user", MetadataKey("team")))
        assert [total.groups for total in totals] == [("", ""), ("ada", "red")]
    # A running report locks the table: opening the archive must not wait for it.
    async with connection.transaction():
        await connection.fetch("SELECT * FROM pomelo_usage")
        async with asyncio.timeout(20), open_archive(url) as archive:
            assert len((await archive.list_usage(ALL, limit=9))[0]) == 2
    await connection.close()


async def test_the_error_for_an_unusable_archive_does_not_contain_the_password(tmp_path: Path) -> None:
    for wrong in (f"postgresql://ada:secret@127.0.0.1:{free_port()}/none", "postgresql://[", "mysql://x", ""):
        with pytest.raises(StoreError) as caught:
            async with open_archive(wrong):
                pass
        assert "secret" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be opened"):
        async with open_archive(f"sqlite:{tmp_path / 'file' / 'usage.db'}"):
            pass
