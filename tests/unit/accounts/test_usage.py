"""Reads of usage: filters, pages, sums, and tokens that are valid for one query only."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.pages import MAX_PAGE_BYTES
from pomelo.accounts.usage import UsageReader, read_filter, read_groupings
from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.usage_pb2 import Mode, Usage
from pomelo.stores.base import Store
from pomelo.stores.usage import Dimension, MetadataKey, UsageQuery, encode_metadata
from tests.unit.accounts.audited_store import ACME, ACME_TEST, add_account, run
from tests.unit.refusals import refused

SECRET = b"s" * 32
LIVE = UsageQuery(account="acme", live=True)
"""Selects the live tasks of the account acme."""


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
    reader: UsageReader,
    account: str | None = "acme",
    live: bool | None = True,
    page_size: int = 0,
    page_token: str = "",
    **filters: Any,
) -> list[str]:
    query = read_filter(pb.UsageFilter(**filters), account, live)
    records, _ = await reader.list_records(query, page_size, page_token)
    return [record.id for record in records]


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
        records, token = await reader.list_records(LIVE, size, token)
        assert len(records) <= size
        seen += [record.id for record in records]
        if not token:
            break
    assert seen == NEWEST_FIRST


async def test_a_new_record_does_not_shift_the_pages(reader: UsageReader, store: Store) -> None:
    _, token = await reader.list_records(LIVE, 4, "")
    await run(store, "task_new", ACME, at=2000.0)
    rest = await ids(reader, page_token=token)
    assert rest == NEWEST_FIRST[4:]


async def test_a_page_token_of_the_previous_secret_is_valid(reader: UsageReader, store: Store) -> None:
    _, token = await reader.list_records(LIVE, 4, "")
    assert await ids(UsageReader(store, b"n" * 32, [SECRET]), page_token=token) == NEWEST_FIRST[4:]
    with refused("invalid_parameter"):
        await ids(UsageReader(store, b"n" * 32), page_token=token)


async def test_filters_can_be_combined(reader: UsageReader) -> None:
    assert await ids(reader, model="gpt-4") == [f"task_{n}" for n in (9, 7, 5, 3, 1)]
    assert await ids(reader, key_id="key0") == [f"task_{n}" for n in (9, 6, 3, 0)]
    since, until = Timestamp(seconds=1003), Timestamp(seconds=1007)
    assert await ids(reader, start_time=since, end_time=until) == ["task_6", "task_5", "task_4", "task_3"]
    assert await ids(reader, start_time=since, end_time=until, model="gpt-4", key_id="key2") == ["task_5"]
    assert await ids(reader, start_time=since, end_time=since) == []


async def test_a_record_is_returned_with_all_its_fields(reader: UsageReader) -> None:
    (record,), _ = await reader.list_records(LIVE, 1, "")
    assert record == pb.UsageRecord(
        id="task_9",
        request_id="req_task_9",
        account_id="acme",
        key_id="key0",
        mode=Mode.MODE_LIVE,
        protocol="rest",
        model="gpt-4",
        provider="openai",
        provider_model="gpt-4.1",
        task_type=TaskType.TASK_TYPE_TEXT,
        usage=Usage(input_tokens=100, output_tokens=50),
        cost_micros=750,
        price_version="2026-11-22",
        source=pb.USAGE_SOURCE_PROVIDER,
        complete=True,
        end_time=Timestamp(seconds=1009),
    )


async def test_a_record_has_the_reported_cost_the_user_and_the_metadata_of_its_task(store: Store) -> None:
    await add_account(store)
    metadata = encode_metadata({"team": "blue", "job": "7"})
    await run(store, "task_1", ACME, provider_micros=5, user="u1", metadata=metadata, reasoning_tokens=9)
    await run(store, "task_2", ACME_TEST)
    reader = UsageReader(store, SECRET)
    (record,), _ = await reader.list_records(LIVE, 0, "")
    assert (record.provider_cost_micros, record.user, record.usage.reasoning_tokens) == (5, "u1", 9)
    assert record.metadata == {"team": "blue", "job": "7"}
    (other,), _ = await reader.list_records(UsageQuery(live=False), 0, "")
    assert other.mode == Mode.MODE_TEST
    assert not other.HasField("provider_cost_micros")
    assert (other.user, dict(other.metadata)) == ("", {})


async def test_a_page_of_records_ends_before_it_is_too_large(store: Store) -> None:
    await add_account(store)
    metadata = encode_metadata({"text": "x" * (MAX_PAGE_BYTES // 3)})
    for n in range(5):
        await run(store, f"task_{n}", ACME, at=1000.0 + n, metadata=metadata)
    reader, token = UsageReader(store, SECRET), ""
    sizes: list[int] = []
    seen: list[str] = []
    while token or not sizes:
        records, token = await reader.list_records(LIVE, 0, token)
        sizes.append(len(records))
        seen += [record.id for record in records]
    assert sizes == [2, 2, 1]
    assert seen == [f"task_{n}" for n in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("model", {"gpt-4": 5, "gpt-4-turbo": 5}),
        ("key", {"key0": 4, "key1": 3, "key2": 3}),
        ("day", {"1970-01-01": 10}),
        ("account", {"acme": 10}),
    ],
)
async def test_sums_add_up_the_records_of_each_group(
    reader: UsageReader, by: Dimension, groups: dict[str, int]
) -> None:
    sums, token = await reader.sum_records(LIVE, (by,), 0, "")
    assert not token
    assert {row.groups[0]: row.tasks for row in sums} == groups
    for row in sums:
        assert (row.usage.input_tokens, row.cost_micros) == (100 * row.tasks, 750 * row.tasks)


async def test_sums_by_several_groupings_have_their_values_in_order(reader: UsageReader) -> None:
    sums, _ = await reader.sum_records(LIVE, ("model", "key"), 0, "")
    assert [(*row.groups, row.tasks) for row in sums] == [
        *[("gpt-4", "key0", 2), ("gpt-4", "key1", 2), ("gpt-4", "key2", 1)],
        *[("gpt-4-turbo", "key0", 2), ("gpt-4-turbo", "key1", 1), ("gpt-4-turbo", "key2", 2)],
    ]


async def test_without_groupings_there_is_one_sum_of_all_records_if_there_are_any(
    reader: UsageReader,
) -> None:
    (total,), token = await reader.sum_records(LIVE, (), 0, "")
    assert (list(total.groups), total.tasks, total.cost_micros, token) == ([], 10, 7_500, "")
    assert await reader.sum_records(UsageQuery(account="other"), (), 0, "") == ([], "")


async def test_sums_are_returned_in_pages_of_one_grouping(reader: UsageReader) -> None:
    first, token = await reader.sum_records(LIVE, ("key",), 2, "")
    second, end = await reader.sum_records(LIVE, ("key",), 2, token)
    assert [list(row.groups) for row in (*first, *second)] == [["key0"], ["key1"], ["key2"]]
    assert (len(first), end) == (2, "")
    others: list[tuple[Dimension, ...]] = [("model",), ("key", "model"), ()]
    for by in others:
        with refused("invalid_parameter", "page_token"):
            await reader.sum_records(LIVE, by, 2, token)
    with refused("invalid_parameter", "page_token"):
        await ids(reader, page_token=token)
    _, records_token = await reader.list_records(LIVE, 2, "")
    with refused("invalid_parameter", "page_token"):
        await reader.sum_records(LIVE, ("key",), 2, records_token)


async def test_pages_of_sums_by_two_groupings_have_no_gaps(reader: UsageReader) -> None:
    seen: list[tuple[str, ...]] = []
    token = ""
    while token or not seen:
        sums, token = await reader.sum_records(LIVE, ("model", "key"), 4, token)
        seen += [tuple(row.groups) for row in sums]
    assert seen == [(model, key) for model in ("gpt-4", "gpt-4-turbo") for key in ("key0", "key1", "key2")]


async def test_a_page_of_sums_ends_before_it_is_too_large(store: Store) -> None:
    await add_account(store)
    for n in range(4):
        await run(store, f"task_{n}", ACME, user=f"{n}{'x' * 1_500_000}")
    reader = UsageReader(store, SECRET)
    first, token = await reader.sum_records(LIVE, ("user",), 0, "")
    second, end = await reader.sum_records(LIVE, ("user",), 0, token)
    assert ([row.groups[0][0] for row in first], [row.groups[0][0] for row in second]) == (
        ["0", "1"],
        ["2", "3"],
    )
    assert not end


async def test_every_count_of_a_task_is_in_its_record_and_in_the_sums(store: Store) -> None:
    await add_account(store)
    counts = {"characters": 1, "images": 2, "audio_ms": 3_000, "output_bytes": 4, "cached_input_tokens": 5}
    counts |= {"cache_write_input_tokens": 6, "cache_write_1h_input_tokens": 2, "reasoning_tokens": 9}
    await run(store, "task_1", ACME, **counts, processing_ms=8, first_byte_ms=7)
    reader = UsageReader(store, SECRET)
    (record,), _ = await reader.list_records(LIVE, 0, "")
    (total,), _ = await reader.sum_records(LIVE, ("key",), 0, "")
    for found in (record, total):
        usage = found.usage
        assert (usage.characters, usage.images, usage.audio_seconds, found.output_bytes) == (1, 2, 3.0, 4)
        assert (usage.cached_input_tokens, usage.cache_write_input_tokens) == (5, 6)
        assert (usage.cache_write_1h_input_tokens, usage.reasoning_tokens) == (2, 9)
    assert (record.processing_ms, record.first_byte_ms) == (8, 7)


async def test_a_page_of_sums_has_more_than_a_page_of_records_by_default(store: Store) -> None:
    await add_account(store)
    for n in range(101):
        await run(store, f"task_{n}", key_id=f"key{n:03}")
    reader = UsageReader(store, SECRET)
    assert len((await reader.list_records(LIVE, 0, ""))[0]) == 100
    assert len((await reader.sum_records(LIVE, ("key",), 0, ""))[0]) == 101


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"start_time": Timestamp(seconds=2**40)}, "filter.start_time"),
        ({"end_time": Timestamp(nanos=-1)}, "filter.end_time"),
        ({"model": "gpt-4\0"}, "filter.model"),  # with which Postgres compares nothing
        ({"key_id": "\0"}, "filter.key_id"),
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


def test_a_period_that_ends_before_it_begins_is_refused() -> None:
    early, late = Timestamp(seconds=1), Timestamp(seconds=1, nanos=1_000)
    with refused("invalid_parameter", "filter.end_time"):
        read_filter(pb.UsageFilter(start_time=late, end_time=early), "acme", True)
    assert read_filter(pb.UsageFilter(start_time=early, end_time=early), "acme", True).since == 1


@pytest.mark.parametrize(("size", "token", "field"), [(-1, "", "page_size"), (0, "AAAA", "page_token")])
async def test_an_invalid_page_of_sums_is_refused(
    reader: UsageReader, size: int, token: str, field: str
) -> None:
    with refused("invalid_parameter", field):
        await reader.sum_records(LIVE, ("model",), size, token)


UNKNOWN: Any = 99


@pytest.mark.parametrize(
    ("grouping", "found"),
    [
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_MODEL), "model"),
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_KEY), "key"),
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_DAY), "day"),
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_USER), "user"),
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_TASK_TYPE), "task_type"),
        (pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_PROVIDER), "provider"),
        (pb.UsageGrouping(metadata_key="team"), MetadataKey("team")),
        (admin_pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_KEY), "key"),
        (admin_pb.UsageGrouping(metadata_key="team"), MetadataKey("team")),
        (admin_pb.UsageGrouping(operator_dimension=admin_pb.OPERATOR_DIMENSION_ACCOUNT), "account"),
        (admin_pb.UsageGrouping(operator_dimension=admin_pb.OPERATOR_DIMENSION_MODE), "mode"),
    ],
)
def test_each_grouping_of_a_request_is_one_of_the_store(
    grouping: pb.UsageGrouping | admin_pb.UsageGrouping, found: Dimension | MetadataKey
) -> None:
    assert read_groupings([grouping]) == (found,)


@pytest.mark.parametrize(
    ("group_by", "code"),
    [
        ([pb.UsageGrouping()], "missing_parameter"),
        ([pb.UsageGrouping(dimension=UNKNOWN)], "invalid_parameter"),
        ([pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_UNSPECIFIED)], "invalid_parameter"),
        ([admin_pb.UsageGrouping(operator_dimension=UNKNOWN)], "invalid_parameter"),
        (
            [admin_pb.UsageGrouping(operator_dimension=admin_pb.OPERATOR_DIMENSION_UNSPECIFIED)],
            "invalid_parameter",
        ),
        ([pb.UsageGrouping(metadata_key="a\0b")], "invalid_parameter"),
        ([pb.UsageGrouping(metadata_key="")], "invalid_parameter"),
        ([pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_KEY)] * 2, "invalid_parameter"),
        ([pb.UsageGrouping(metadata_key=name) for name in "abcde"], "invalid_parameter"),
    ],
)
def test_an_invalid_grouping_is_refused(group_by: list[Any], code: str) -> None:
    with refused(code, "group_by"):
        read_groupings(group_by)


def test_a_request_may_have_four_groupings() -> None:
    group_by = [pb.UsageGrouping(metadata_key=name) for name in "abcd"]
    assert read_groupings(group_by) == tuple(MetadataKey(name) for name in "abcd")


async def test_a_token_is_valid_only_for_the_query_that_returned_it(
    reader: UsageReader, store: Store
) -> None:
    own = UsageQuery(account="acme", live=True, model="gpt-4")
    _, token = await reader.list_records(own, 2, "")
    assert await ids(reader, page_token=token, model="gpt-4", page_size=1) == ["task_5"]
    queries: list[dict[str, Any]] = [
        {},
        {"model": "gpt-4-turbo"},
        {"model": "gpt-4", "start_time": Timestamp(seconds=1)},
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


def test_every_part_of_a_filter_is_in_the_query() -> None:
    given = pb.UsageFilter(model="gpt-4", key_id="k1", failed=True)
    given.start_time.seconds, given.end_time.seconds = 5, 9
    assert read_filter(given, "acme", True) == UsageQuery(
        account="acme", live=True, model="gpt-4", key_id="k1", since=5.0, until=9.0, failed=True
    )
