"""Account and usage over REST: query parameters, and JSON with exact amounts."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from yarl import URL

from gateway.account import list_usage, parse_query
from gateway.objects import render_account, render_records, render_sums
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.usage_pb2 import Mode, Usage
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import HAIKU_ONLY, code_of


def parse_exact(data: bytes) -> Any:
    return json.loads(data, parse_float=Decimal)


@pytest.mark.parametrize("query", ["", "?group_by=user"], ids=["records", "sums"])
async def test_a_large_page_is_rendered_in_a_thread(query: str) -> None:
    class Accounts:
        async def list_usage(self, query: pb.ListUsageRequest, call: Call) -> pb.ListUsageResponse:
            return records

        async def sum_usage(self, query: pb.SumUsageRequest, call: Call) -> pb.SumUsageResponse:
            return sums

    records = pb.ListUsageResponse(records=[pb.UsageRecord(id=f"task_{n}") for n in range(1_000)])
    sums = pb.SumUsageResponse(
        sums=[pb.UsageSum(groups=[f"user-{n}"], tasks=n, cost_micros=n) for n in range(10_000)]
    )
    gateway: Any = SimpleNamespace(services=SimpleNamespace(accounts=Accounts()))
    request: Any = SimpleNamespace(url=URL(f"/api/v1/usage{query}"))
    visit: Any = None
    call = Call.from_headers(lambda name: None, protocol="rest")
    before, of_all_threads = time.thread_time(), time.process_time()
    response = await list_usage(gateway, request, call, visit)
    of_this_thread = time.thread_time() - before
    assert of_this_thread < (time.process_time() - of_all_threads) / 2
    assert response.body == (render_sums(sums) if query else render_records(records))


def test_every_query_parameter_sets_its_field() -> None:
    parameters = {
        "page_size": "7",
        "page_token": "abc",
        "from": "2026-11-24",
        "to": "2026-11-25T01:02:03.5+01:00",
        "model": "gpt-4",
        "key_id": "k",
        "failed": "true",
    }
    usage_filter = pb.UsageFilter(
        start_time=Timestamp(seconds=1_795_478_400),
        end_time=Timestamp(seconds=1_795_564_923, nanos=500_000_000),
        model="gpt-4",
        key_id="k",
        failed=True,
    )
    records = pb.ListUsageRequest(filter=usage_filter, page_size=7, page_token="abc")
    assert parse_query(parameters) == records
    by = pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_DAY)
    sums = pb.SumUsageRequest(filter=usage_filter, group_by=[by], page_size=7, page_token="abc")
    assert parse_query({**parameters, "group_by": "day"}) == sums
    assert not parse_query({"failed": "false"}).filter.failed
    assert parse_query({}) == pb.ListUsageRequest()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86400),
        ("1970-01-01T00:00:01Z", 1),
        ("1970-01-01t00:00:01z", 1),
        ("1970-01-01 00:00:01Z", 1),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1970-01-01T01:00:00 01:00", 0),  # a plus sign, unencoded
        ("1969-12-31T23:00:00-01:00", 0),
        ("1970-01-01T00:00:01.999999999Z", 1),
        ("0001-01-01", -62_135_596_800),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
        ("9999-12-31T23:59:59.999999Z", 253_402_300_799),
    ],
)
def test_a_time_is_a_date_or_an_rfc_3339_time(text: str, seconds: int) -> None:
    assert parse_query({"from": text}).filter.start_time.seconds == seconds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("page_size", text) for text in ("", "0", "1001", "-1", "1.5", "ten", "٣", "99999999999999999999")],
        *[
            (name, text)
            for name in ("from", "to")
            for text in (
                "",
                "yesterday",
                "1795500620",
                "2026-13-01",
                "2026-02-30",
                "2026-11-24T12:00:00",
                "2026-11-24T24:00:00Z",
                "2026-11-24T25:00:00Z",
                "2026-11-24T12:00Z",
                "2026-11-24T12:00:00+99:00",
                "2026-11-24T12:00:00+13:60",
                "2026-11-24T12:00:60Z",
                "2026-11-24T23:59:61Z",
                "2026-11-24T23:59:60+01:00",
                "9999-12-31T23:59:60Z",
                "0001-01-01T00:00:00+10:00",
                "9999-12-31T23:59:59-10:00",
                "2026-11-24Z",
                "2026-1-4",
            )
        ],
        *[("group_by", text) for text in ("", "account", "MODEL", "hour", "metadata", "metadata.", "\udcff")],
        *[("failed", text) for text in ("", "1", "True", "yes")],
        *[(name, "\udcff") for name in ("model", "key_id", "page_token")],
        *[(name, "") for name in ("model", "key_id")],
        ("from_time", "2026-11-24"),
        ("limit", "5"),
        ("\udcff", "5"),
    ],
)
def test_an_invalid_or_unknown_query_parameter_is_named(name: str, value: str) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_query({name: value})
    assert caught.value.code == "invalid_parameter"
    assert name.encode("utf-8", "replace").decode() in caught.value.message
    assert name != "failed" or caught.value.message == "Invalid failed: must be true or false"


def test_an_account_is_rendered_with_exact_decimals() -> None:
    account = pb.Account(
        id="acme",
        plan="team",
        mode=Mode.MODE_LIVE,
        limits=pb.PlanLimits(requests_per_minute=5, models=pb.ModelSet(models=["gpt-4"])),
        balance=pb.Balance(
            granted_micros=9_007_199_254_740_993, spent_micros=1, held_micros=0, available_micros=100_000
        ),
    )
    assert parse_exact(render_account(account)) == {
        "id": "acme",
        "object": "account",
        "mode": "live",
        "plan": "team",
        "limits": {
            "requests_per_minute": 5,
            "concurrent_requests": None,
            "tokens_per_minute": None,
            "models": ["gpt-4"],
        },
        "credits": {
            "granted": Decimal("9007199254.740993"),
            "spent": Decimal("0.000001"),
            "held": 0,
            "available": Decimal("0.1"),
        },
    }


def test_usage_records_and_totals_are_rendered_as_a_list() -> None:
    usage = Usage(
        input_tokens=1,
        cached_input_tokens=2,
        cache_write_input_tokens=3,
        output_tokens=4,
        characters=5,
        images=6,
        audio_seconds=1.5,
    )
    numbers: dict[str, Any] = {"usage": usage, "output_bytes": 7, "cost_micros": 123}
    record = pb.UsageRecord(
        **numbers,
        id="task_1",
        mode=Mode.MODE_TEST,
        end_time=Timestamp(seconds=12, nanos=900_000_000),
        request_id="r",
        account_id="acme",
        key_id="k",
        protocol="grpc",
        model='a"b',
        task_type=TaskType.TASK_TYPE_TEXT_TO_SPEECH,
        provider="p",
        provider_model="pm",
        user="ada",
        metadata={"team": "red"},
        processing_ms=8,
        first_byte_ms=9,
        source=pb.USAGE_SOURCE_ESTIMATED,
        price_version="v",
        provider_cost_micros=1_500_001,
        code="provider_failed",
    )
    total = pb.UsageSum(**numbers, groups=["g"], tasks=12)
    rendered_numbers = {
        "input_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 3},
        "output_tokens": 4,
        "characters": 5,
        "images": 6,
        "output_bytes": 7,
        "audio_seconds": Decimal("1.5"),
        "cost": Decimal("0.000123"),
    }
    records = pb.ListUsageResponse(records=[record, record], next_page_token="t")
    first, second = (listed := parse_exact(render_records(records)))["data"]
    assert (listed["object"], listed["next_page_token"]) == ("list", "t")
    sums = pb.SumUsageResponse(sums=[total, pb.UsageSum(groups=["h"], tasks=2)], next_page_token="u")
    last, free = (summed := parse_exact(render_sums(sums)))["data"]
    assert (summed["object"], summed["next_page_token"]) == ("list", "u")
    assert (
        second
        == first
        == {
            **rendered_numbers,
            "id": "task_1",
            "object": "usage.record",
            "time": 12,
            "request_id": "r",
            "account": "acme",
            "key_id": "k",
            "mode": "test",
            "wire": "grpc",
            "model": 'a"b',
            "type": "text-to-speech",
            "provider": "p",
            "provider_model": "pm",
            "user": "ada",
            "metadata": {"team": "red"},
            "processing_ms": 8,
            "first_byte_ms": 9,
            "source": "estimated",
            "complete": False,
            "code": "provider_failed",
            "price_version": "v",
            "provider_cost": Decimal("1.500001"),
        }
    )
    assert last == {**rendered_numbers, "object": "usage.total", "group": "g", "tasks": 12}
    assert (free["group"], free["tasks"], free["cost"]) == ("h", 2, 0)
    record.mode, record.complete = Mode.MODE_LIVE, True
    for field in ("provider_cost_micros", "user", "code"):
        record.ClearField(field)
    (row,) = parse_exact(render_records(pb.ListUsageResponse(records=[record])))["data"]
    assert (row["mode"], row["complete"], row["provider_cost"]) == ("live", True, 0)
    assert row["user"] is row["code"] is None
    empty: dict[str, Any] = {"object": "list", "data": [], "next_page_token": None}
    assert parse_exact(render_records(pb.ListUsageResponse())) == empty
    assert parse_exact(render_sums(pb.SumUsageResponse())) == empty


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (pb.USAGE_SOURCE_PROVIDER, "provider"),
        (pb.USAGE_SOURCE_ESTIMATED, "estimated"),
        (pb.USAGE_SOURCE_RECOVERED, "recovered"),
        (pb.USAGE_SOURCE_UNSPECIFIED, "unknown"),
    ],
)
def test_each_source_of_a_usage_record_has_its_own_name(source: pb.UsageSource.ValueType, shown: str) -> None:
    page = parse_exact(render_records(pb.ListUsageResponse(records=[pb.UsageRecord(source=source)])))
    assert page["data"][0]["source"] == shown


@pytest.mark.parametrize(
    ("mode", "shown"), [(Mode.MODE_LIVE, "live"), (Mode.MODE_TEST, "test"), (99, "unknown")]
)
def test_a_mode_that_is_newer_than_the_gateway_is_unknown(mode: Any, shown: str) -> None:
    page = parse_exact(render_records(pb.ListUsageResponse(records=[pb.UsageRecord(mode=mode)])))
    assert page["data"][0]["mode"] == parse_exact(render_account(pb.Account(mode=mode)))["mode"] == shown


def test_a_missing_limit_of_a_plan_is_null() -> None:
    limits = parse_exact(render_account(pb.Account(id="acme")))["limits"]
    assert limits == dict.fromkeys(
        ["requests_per_minute", "concurrent_requests", "tokens_per_minute", "models"]
    )
    given = pb.PlanLimits(requests_per_minute=1, concurrent_requests=2, tokens_per_minute=3)
    assert parse_exact(render_account(pb.Account(limits=given)))["limits"] == {
        "requests_per_minute": 1,
        "concurrent_requests": 2,
        "tokens_per_minute": 3,
        "models": None,
    }


def test_an_empty_set_of_models_is_not_shown_as_all_models() -> None:
    account = pb.Account(limits=pb.PlanLimits(models=pb.ModelSet()))
    assert parse_exact(render_account(account))["limits"]["models"] == []


@pytest.mark.parametrize(
    "text", ["2016-12-31T23:59:60Z", "2017-01-01T05:29:60+05:30", "2016-12-31T23:59:60.0Z"]
)
def test_a_leap_second_is_the_first_second_of_the_next_day(text: str) -> None:
    moment = parse_query({"to": text}).filter.end_time
    assert moment.ToDatetime(UTC) == datetime(2017, 1, 1, tzinfo=UTC)


def test_a_time_is_exact_to_the_microsecond() -> None:
    moment = parse_query({"from": "2026-11-24T00:00:00.1234567Z"}).filter.start_time
    assert (moment.seconds, moment.nanos) == (1_795_478_400, 123_456_000)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_page_has_one_to_a_thousand_records(size: int) -> None:
    assert parse_query({"page_size": str(size)}).page_size == size


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("model", pb.USAGE_DIMENSION_MODEL),
        ("key", pb.USAGE_DIMENSION_KEY),
        ("day", pb.USAGE_DIMENSION_DAY),
        ("user", pb.USAGE_DIMENSION_USER),
        ("provider", pb.USAGE_DIMENSION_PROVIDER),
        ("code", pb.USAGE_DIMENSION_CODE),
    ],
)
def test_each_grouping_sets_its_enum_value(text: str, dimension: pb.UsageDimension.ValueType) -> None:
    request = parse_query({"group_by": text})
    assert request == pb.SumUsageRequest(group_by=[pb.UsageGrouping(dimension=dimension)])


@pytest.mark.parametrize("key", ["team", "a.b", "model", "größe"])
def test_usage_is_grouped_by_a_key_of_the_metadata(key: str) -> None:
    request = parse_query({"group_by": f"metadata.{key}"})
    assert request == pb.SumUsageRequest(group_by=[pb.UsageGrouping(metadata_key=key)])


@pytest.mark.parametrize("path", ["account", "usage"])
async def test_the_key_is_checked_before_the_query(path: str, gateway: GatewayApp) -> None:
    url = f"/api/v1/{path}"
    assert (await code_of(gateway.http.get(f"{gateway.url}{url}?foo=1")))[0] == 401
    async with gateway.get(f"{url}?foo=1") as response:
        assert response.status == 400
        error = (await response.json())["error"]
        assert error["code"] == "invalid_parameter"
        assert "foo" in error["message"]
    async with gateway.get(url, Authorization=f"Bearer {HAIKU_ONLY}") as response:
        assert response.status == 200


async def test_a_repeated_query_parameter_is_refused_and_named(gateway: GatewayApp) -> None:
    async with gateway.get("/api/v1/usage?model=gpt-4&model=gpt-4") as response:
        assert response.status == 400
        assert "model" in (await response.json())["error"]["message"]
    assert (await code_of(gateway.get("/api/v1/usage?%ff=%ff")))[0] == 400


async def test_a_period_that_ends_before_it_begins_is_refused_by_the_name_of_its_parameter(
    gateway: GatewayApp,
) -> None:
    async with gateway.get("/api/v1/usage?from=2026-01-02&to=2026-01-01") as response:
        message = (await response.json())["error"]["message"]
    assert message.startswith("Invalid to: ")


def test_the_name_of_an_unknown_parameter_is_shown_up_to_100_characters() -> None:
    with pytest.raises(PomeloError) as caught:
        parse_query({"x" * 101: "1"})
    assert caught.value.field == "x" * 100
    assert "x" * 101 not in caught.value.message


@pytest.mark.parametrize("path", ["account", "usage"])
async def test_an_invalid_header_is_reported_before_an_invalid_parameter(
    path: str, gateway: GatewayApp
) -> None:
    async with gateway.get(f"/api/v1/{path}?foo=1", **{"X-Request-Timeout": "soon"}) as response:
        assert response.status == 400
        assert "X-Request-Timeout" in (await response.json())["error"]["message"]


def test_the_smallest_and_the_largest_amount_are_exact() -> None:
    sums = [pb.UsageSum(groups=["g"], cost_micros=micros) for micros in (1, 2**53 + 1)]
    rows = render_sums(pb.SumUsageResponse(sums=sums))
    assert rows.count(b'"cost":0.000001}') == 1
    assert rows.count(b'"cost":9007199254.740993}') == 1
