"""Reads of usage: filters, pages, sums, and tokens that are valid for one query only."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.usage import UsageReader
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.stores.base import Store
from tests.unit.accounts.audited_store import ACME, ACME_TEST, add_account, run
from tests.unit.refusals import refused

SECRET = b"s" * 32


@pytest.fixture
async def reader(store: Store) -> UsageReader:
    """A reader of ten live tasks, one second apart, and two test tasks."""
    await add_account(store)
    await add_account(store, "other")
    for n in range(10):
        model = "gpt-4" if n % 2 else "gpt-4-turbo"
        await run(store, f"task_{n}", ACME, at=1000.0 + n, model=model, key_id=f"key{n % 3}")
    for n in range(2):
        await run(store, f"test_{n}", ACME_TEST, at=1000.5 + n)
    return UsageReader(store, SECRET)


async def ids(
    reader: UsageReader, account: str | None = "acme", live: bool | None = True, **fields: Any
) -> list[str]:
    response = await reader.list(pb.ListUsageRequest(**fields), account, live)
    return [record.id for record in response.records]


NEWEST_FIRST = [f"task_{n}" for n in reversed(range(10))]


async def test_records_are_newest_first_and_of_one_mode(reader: UsageReader) -> None:
    assert await ids(reader) == NEWEST_FIRST
    assert await ids(reader, live=False) == ["test_1", "test_0"]
    assert await ids(reader, account="other") == []
    assert set(await ids(reader, account=None, live=None)) == {*NEWEST_FIRST, "test_0", "test_1"}


@pytest.mark.parametrize("size", [1, 3, 5, 10, 1000])
async def test_pages_have_no_gaps(reader: UsageReader, size: int) -> None:
    seen, token = [], ""
    while True:
        response = await reader.list(pb.ListUsageRequest(page_size=size, page_token=token), "acme", True)
        assert len(response.records) <= size
        seen += [record.id for record in response.records]
        token = response.next_page_token
        if not token:
            break
    assert seen == NEWEST_FIRST


async def test_a_new_record_does_not_shift_the_pages(reader: UsageReader, store: Store) -> None:
    first = await reader.list(pb.ListUsageRequest(page_size=4), "acme", True)
    await run(store, "task_new", ACME, at=2000.0)
    rest = await ids(reader, page_token=first.next_page_token)
    assert rest == NEWEST_FIRST[4:]


async def test_filters_can_be_combined(reader: UsageReader) -> None:
    assert await ids(reader, model="gpt-4") == [f"task_{n}" for n in (9, 7, 5, 3, 1)]
    assert await ids(reader, key_id="key0") == [f"task_{n}" for n in (9, 6, 3, 0)]
    since, until = Timestamp(seconds=1003), Timestamp(seconds=1007)
    assert await ids(reader, from_time=since, to_time=until) == ["task_6", "task_5", "task_4", "task_3"]
    assert await ids(reader, from_time=since, to_time=until, model="gpt-4", key_id="key2") == ["task_5"]
    assert await ids(reader, from_time=until, to_time=since) == []


async def test_a_record_is_returned_with_all_its_fields(reader: UsageReader) -> None:
    response = await reader.list(pb.ListUsageRequest(page_size=1), "acme", True)
    (record,) = response.records
    assert record == pb.UsageRecord(
        id="task_9",
        request_id="req_task_9",
        account="acme",
        key_id="key0",
        wire="rest",
        model="gpt-4",
        provider="openai",
        provider_model="gpt-4.1",
        task_type=TaskType.TASK_TYPE_TEXT,
        input_tokens=100,
        output_tokens=50,
        cost_micros=750,
        price_version="2026-11-22",
        live=True,
        source=pb.USAGE_SOURCE_PROVIDER,
        complete=True,
        time=Timestamp(seconds=1009),
    )


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        (pb.USAGE_GROUP_MODEL, {"gpt-4": 5, "gpt-4-turbo": 5}),
        (pb.USAGE_GROUP_KEY, {"key0": 4, "key1": 3, "key2": 3}),
        (pb.USAGE_GROUP_DAY, {"1970-01-01": 10}),
        (pb.USAGE_GROUP_ACCOUNT, {"acme": 10}),
    ],
)
async def test_sums_add_up_the_records_of_each_group(
    reader: UsageReader, by: pb.UsageGroup.ValueType, groups: dict[str, int]
) -> None:
    response = await reader.list(pb.ListUsageRequest(group_by=by), "acme", True)
    assert not response.records
    assert not response.next_page_token
    assert {total.group: total.tasks for total in response.totals} == groups
    for total in response.totals:
        assert (total.input_tokens, total.cost_micros) == (100 * total.tasks, 750 * total.tasks)


async def test_sums_are_returned_in_pages_of_one_grouping(reader: UsageReader) -> None:
    request = pb.ListUsageRequest(group_by=pb.USAGE_GROUP_KEY, page_size=2)
    first = await reader.list(request, "acme", True)
    request.page_token = first.next_page_token
    second = await reader.list(request, "acme", True)
    assert [total.group for total in (*first.totals, *second.totals)] == ["key0", "key1", "key2"]
    assert (len(first.totals), second.next_page_token) == (2, "")
    for group in (pb.USAGE_GROUP_MODEL, pb.USAGE_GROUP_UNSPECIFIED):
        with refused("invalid_parameter", "page_token"):
            await ids(reader, group_by=group, page_token=first.next_page_token)


async def test_every_count_of_a_task_is_in_its_record_and_in_the_sums(store: Store) -> None:
    await add_account(store)
    counts = {"characters": 1, "images": 2, "audio_ms": 3_000, "output_bytes": 4, "cached_input_tokens": 5}
    counts |= {"cache_write_input_tokens": 6, "cache_write_1h_input_tokens": 2}
    await run(store, "task_1", ACME, **counts, processing_ms=8, first_byte_ms=7)
    reader = UsageReader(store, SECRET)
    (record,) = (await reader.list(pb.ListUsageRequest(), "acme", True)).records
    (total,) = (await reader.list(pb.ListUsageRequest(group_by=pb.USAGE_GROUP_KEY), "acme", True)).totals
    for found in (record, total):
        assert (found.characters, found.images, found.audio_seconds, found.output_bytes) == (1, 2, 3.0, 4)
        assert (found.cached_input_tokens, found.cache_write_input_tokens) == (5, 6)
    assert (record.processing_ms, record.first_byte_ms, record.cache_write_1h_input_tokens) == (8, 7, 2)


async def test_a_page_of_sums_has_more_than_a_page_of_records_by_default(store: Store) -> None:
    await add_account(store)
    for n in range(101):
        await run(store, f"task_{n}", key_id=f"key{n:03}")
    reader = UsageReader(store, SECRET)
    assert len((await reader.list(pb.ListUsageRequest(), "acme", True)).records) == 100
    sums = await reader.list(pb.ListUsageRequest(group_by=pb.USAGE_GROUP_KEY), "acme", True)
    assert len(sums.totals) == 101


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"group_by": 9}, "group_by"),
        ({"group_by": pb.USAGE_GROUP_MODEL, "page_token": "AAAA"}, "page_token"),
        ({"from_time": Timestamp(seconds=2**40)}, "from_time"),
        ({"to_time": Timestamp(nanos=-1)}, "to_time"),
        ({"page_token": "AAAA"}, "page_token"),
        ({"page_token": "ä"}, "page_token"),
        ({"page_token": "A" * 5}, "page_token"),
        ({"page_token": "A" * 10_000}, "page_token"),
    ],
)
async def test_the_error_names_the_invalid_field(
    reader: UsageReader, fields: dict[str, Any], field: str
) -> None:
    with refused("invalid_parameter", field):
        await ids(reader, **fields)


async def test_a_token_is_valid_only_for_the_query_that_returned_it(
    reader: UsageReader, store: Store
) -> None:
    response = await reader.list(pb.ListUsageRequest(page_size=2, model="gpt-4"), "acme", True)
    token = response.next_page_token
    assert await ids(reader, page_token=token, model="gpt-4", page_size=1) == ["task_5"]
    queries: list[dict[str, Any]] = [
        {},
        {"model": "gpt-4-turbo"},
        {"model": "gpt-4", "from_time": Timestamp(seconds=1)},
        {"model": "gpt-4", "account": "other"},
        {"model": "gpt-4", "live": False},
    ]
    for query in queries:
        with refused("invalid_parameter", "page_token"):
            await ids(reader, page_token=token, **query)
    # A reader with another secret, and tokens that were forged or changed.
    with refused("invalid_parameter", "page_token"):
        await ids(UsageReader(store, b"t" * 32), page_token=token, model="gpt-4")
    data = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for changed in (data[16:], b"\0" * 16 + data[16:], data[:-1] + b"0", data + b"0", data[:-2]):
        text = base64.urlsafe_b64encode(changed).rstrip(b"=").decode()
        with refused("invalid_parameter", "page_token"):
            await ids(reader, page_token=text, model="gpt-4")
