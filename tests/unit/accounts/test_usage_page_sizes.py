"""The sizes of pages of usage, and what is read for them at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pomelo.accounts.pages import MAX_PAGE_BYTES
from pomelo.accounts.usage import UsageReader
from pomelo.stores.base import Store
from pomelo.stores.usage import Grouping, MetadataKey, UsageQuery, UsageRecord, UsageTotal, encode_metadata
from tests.unit.accounts.audited_store import ACME, add_account, run

SECRET = b"s" * 32
LIVE = UsageQuery(account="acme", live=True)
RECORD = UsageRecord("task_1", "req_1", "acme", True, "key", "rest", "gpt-4", "text", at=1000.0)


@pytest.mark.parametrize(
    ("size", "records", "sums"),
    [
        (0, 100, 10_000),
        (1_000, 1_000, 1_000),
        (1_001, 1_000, 1_001),
        (10_001, 1_000, 10_000),
        (2**31 - 1, 1_000, 10_000),
    ],
)
async def test_too_large_a_page_is_reduced_to_the_largest(size: int, records: int, sums: int) -> None:
    asked: list[int] = []

    class Endless:
        async def list_usage(self, query: UsageQuery, *, limit: int, after: str) -> tuple[list[Any], str]:
            return [RECORD] * limit, "more"

        async def sum_usage(self, query: UsageQuery, by: Any, *, limit: int, after: Any) -> list[Any]:
            asked.append(limit)
            return []

    endless: Any = Endless()
    reader = UsageReader(endless, SECRET)
    assert len((await reader.list_records(LIVE, size, ""))[0]) == records
    await reader.sum_records(LIVE, ("key",), size, "")
    assert asked == [sums + 1]  # one more shows whether there is a next page


async def test_a_large_page_of_sums_is_made_in_a_thread() -> None:
    totals = [UsageTotal((f"user-{n}",), n, 1, 1, 0, 0, 0, 1, n, 0) for n in range(10_001)]

    class Large:
        async def sum_usage(self, query: UsageQuery, by: Any, *, limit: int, after: Any) -> list[UsageTotal]:
            return totals[:limit]

    large: Any = Large()
    reader = UsageReader(large, SECRET)
    before, of_all_threads = time.thread_time(), time.process_time()
    sums, token = await reader.sum_records(LIVE, ("key",), 0, "")
    of_this_thread = time.thread_time() - before
    assert of_this_thread < (time.process_time() - of_all_threads) / 2
    assert (len(sums), sums[-1].cost_micros) == (10_000, 9_999)
    assert token


async def test_a_page_of_records_is_read_in_steps_of_little_memory(store: Store) -> None:
    await add_account(store)
    sizes = {149: MAX_PAGE_BYTES - 1_000, **dict.fromkeys(range(60), 30_000)}
    for n in range(250):
        metadata = encode_metadata({"text": "x" * sizes[n]}) if n in sizes else ""
        await run(store, f"task_{n}", ACME, at=1000.0 + n, metadata=metadata)
    asked: list[int] = []

    class Counting:
        async def list_usage(self, query: UsageQuery, *, limit: int, after: str) -> tuple[list[Any], str]:
            asked.append(limit)
            return await store.list_usage(query, limit=limit, after=after)

    counting: Any = Counting()
    reader, token = UsageReader(counting, SECRET), ""
    seen: list[str] = []
    pages: list[int] = []
    while token or not pages:
        records, token = await reader.list_records(LIVE, 1_000, token)
        assert sum(record.ByteSize() for record in records) <= MAX_PAGE_BYTES
        pages.append(len(records))
        seen += [record.id for record in records]
    assert seen == [f"task_{n}" for n in reversed(range(250))]
    assert (pages[0], seen[100]) == (100, "task_149")
    assert max(asked) == 100


@pytest.mark.parametrize(
    ("by", "limit"),
    [
        ((), 10_000),
        (("model", "key", "day", "provider"), 10_000),
        (("user",), 8_192),
        ((MetadataKey("a"),), 4_096),
        (tuple(MetadataKey(name) for name in "abcd"), 1_024),
    ],
)
async def test_the_largest_groups_of_a_page_of_sums_have_8_mebibytes(
    by: tuple[Grouping, ...], limit: int
) -> None:
    asked: list[int] = []

    class Recorder:
        async def sum_usage(self, query: UsageQuery, by: Any, *, limit: int, after: Any) -> list[Any]:
            asked.append(limit)
            return []

    recorder: Any = Recorder()
    await UsageReader(recorder, SECRET).sum_records(LIVE, by, 0, "")
    assert asked == [limit + 1]
