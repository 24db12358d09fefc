"""The account and its usage are the same over gRPC, local REST, and REST through a remote gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import grpc
import pytest

from gateway.account import parse_query
from pomelo.app import App
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.status import from_rpc_error
from pomelo.stores.accounts import Grant, Wallet
from tests.conftest import Keys
from tests.driver import TaskRequest
from tests.parity.comparison import Driver

PAGES = 3
MODES = {Mode.MODE_LIVE: "live", Mode.MODE_TEST: "test"}


@dataclass
class Outcome:
    """The response as the JSON of REST, into which gRPC messages are converted."""

    code: str = "ok"
    message: str = ""
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontEnds:
    """The three front ends, and the keys of an account with some tasks in both modes."""

    channel: grpc.aio.Channel
    http: aiohttp.ClientSession
    rest: str
    remote: str
    live: str
    test: str

    async def fetch(self, path: str, key: str | None, **query: str) -> dict[str, Outcome]:
        """Sends the same request to every front end."""
        return {
            "grpc": await self._grpc(path, key, query),
            "rest": await self._rest(self.rest, path, key, query),
            "remote": await self._rest(self.remote, path, key, query),
        }

    async def _rest(self, base: str, path: str, key: str | None, query: dict[str, str]) -> Outcome:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.http.get(f"{base}/api/v1/{path}", params=query, headers=headers) as response:
            body = json.loads(await response.text(), parse_float=Decimal)
            headers = {name.lower(): value for name, value in response.headers.items()}
            if response.status == 200:
                return Outcome(body=body, headers=headers)
            return Outcome(body["error"]["code"], body["error"]["message"], headers=headers)

    async def _grpc(self, path: str, key: str | None, query: dict[str, str]) -> Outcome:
        stub = AccountServiceStub(self.channel)
        metadata = [("authorization", f"Bearer {key}")] if key else []
        if path == "account":
            rpc = stub.GetAccount(pb.GetAccountRequest(), metadata=metadata)
        elif isinstance(request := parse_query(query), pb.SumUsageRequest):
            rpc = stub.SumUsage(request, metadata=metadata)
        else:
            rpc = stub.ListUsage(request, metadata=metadata)
        try:
            response = await rpc
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            return Outcome(error.code, error.message, headers=dict(failed.trailing_metadata() or ()))
        headers = dict(await rpc.trailing_metadata())
        body = _account(response.account) if path == "account" else _usage(response)
        return Outcome(body=body, headers=headers)


def _account(account: pb.Account) -> dict[str, Any]:
    limits, balance = account.limits, account.balance
    return {
        "id": account.id,
        "object": "account",
        "mode": MODES[account.mode],
        "plan": account.plan,
        "limits": {
            "requests_per_minute": limits.requests_per_minute or None,
            "concurrent_requests": limits.concurrent_requests or None,
            "tokens_per_minute": limits.tokens_per_minute or None,
            "models": list(limits.models.models) or None,
        },
        "credits": {
            name: Decimal(getattr(balance, f"{name}_micros")) / 10**6
            for name in ("granted", "spent", "held", "available")
        },
    }


def _usage(response: pb.ListUsageResponse | pb.SumUsageResponse) -> dict[str, Any]:
    if isinstance(response, pb.SumUsageResponse):
        rows = [
            {"object": "usage.total", "group": row.groups[0], **_to_json(row, "groups")}
            for row in response.sums
        ]
        return {"object": "list", "data": rows, "next_page_token": response.next_page_token or None}
    renamed = ("account_id", "mode", "task_type", "source", "end_time", "protocol")
    nullable = ("user", "metadata", "code")
    rows = [
        {
            "object": "usage.record",
            "mode": MODES[row.mode],
            "wire": row.protocol,
            "type": TaskType.Name(row.task_type).removeprefix("TASK_TYPE_").lower().replace("_", "-"),
            "source": pb.UsageSource.Name(row.source).removeprefix("USAGE_SOURCE_").lower(),
            "time": row.end_time.seconds,
            "account": row.account_id,
            "user": row.user or None,
            "metadata": dict(row.metadata),
            "code": row.code or None,
            **_to_json(row, *renamed, *nullable),
        }
        for row in response.records
    ]
    return {"object": "list", "data": rows, "next_page_token": response.next_page_token or None}


def _to_json(row: Any, *excluded: str) -> dict[str, Any]:
    fields = {f.name: getattr(row, f.name) for f in row.DESCRIPTOR.fields if f.name not in excluded}
    usage = fields.pop("usage")
    fields |= {f.name: getattr(usage, f.name) for f in usage.DESCRIPTOR.fields}
    fields["prompt_tokens_details"] = {
        "cached_tokens": fields.pop("cached_input_tokens"),
        "cache_write_tokens": fields.pop("cache_write_input_tokens"),
    }
    del fields["cache_write_1h_input_tokens"], fields["reasoning_tokens"]
    fields["audio_seconds"] = Decimal(str(fields["audio_seconds"]))
    for name in ("cost", "provider_cost"):
        if (micros := fields.pop(f"{name}_micros", None)) is not None:
            fields[name] = Decimal(micros) / 10**6
    return fields


@pytest.fixture(scope="module")
async def front_ends(
    app: App,
    clients: Mapping[str, Driver],
    channel: grpc.aio.Channel,
    http: aiohttp.ClientSession,
    rest_url: str,
    gateway_url: str,
) -> FrontEnds:
    """An account with seven test tasks and one live task, run over all front ends."""
    name = "parity"
    await app.store.add_account(name, "pro", time.time())
    for is_live in (True, False):
        await app.store.grant(Grant(f"{name} {is_live}", Wallet(name, is_live), 12_345_678, time.time()))
    test = (await app.keyring.create(name))[1]
    live = (await app.keyring.create(name, live=True))[1]
    message = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    for client in clients.values():
        assert (await client(TaskRequest({"model": "gpt-4"} | message, test))).code == "ok"
        assert (
            await client(TaskRequest({"model": "claude-3-opus"} | message, test, stream=True))
        ).code == "ok"
    speech = {"model": "eleven-labs-stt", "audio": "c29tZSBzb3VuZCA=", "language_code": "en"}
    assert (await clients["rest"](TaskRequest(speech, test))).code == "ok"
    assert (await clients["rest"](TaskRequest({"model": "gpt-4"} | message, live))).code == "ok"
    return FrontEnds(channel, http, rest_url, gateway_url, live, test)


def assert_same(outcomes: dict[str, Outcome]) -> Outcome:
    """Checks that all outcomes are the same; returns one of them."""
    first = outcomes["rest"]
    for name, other in outcomes.items():
        assert (other.code, other.message) == (first.code, first.message), name
        assert other.body == first.body, name
        for header in (
            "x-pomelo-mode",
            "x-credits-remaining",
            "x-ratelimit-limit",
            "x-ratelimit-remaining",
            "x-ratelimit-limit-concurrent",
        ):
            assert other.headers.get(header) == first.headers.get(header), (name, header)
        assert other.headers["x-request-id"].startswith("req_")
    return first


@pytest.mark.parametrize("mode", ["live", "test"])
async def test_an_account_is_the_same_over_all_front_ends(mode: str, front_ends: FrontEnds) -> None:
    outcome = assert_same(await front_ends.fetch("account", getattr(front_ends, mode)))
    body = outcome.body
    assert (body["id"], body["plan"], body["mode"]) == ("parity", "pro", mode)
    amounts = body["credits"]
    assert amounts["granted"] == amounts["spent"] + amounts["held"] + amounts["available"]
    assert amounts["spent"] > 0
    assert Decimal(outcome.headers["x-credits-remaining"]) == amounts["available"]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({}, 7),
        ({"model": "gpt-4"}, 3),
        ({"model": "nothing"}, 0),
        ({"key_id": "nothing"}, 0),
        ({"from": "2020-01-01", "to": "2100-01-01T00:00:00Z"}, 7),
        ({"to": "2020-01-01"}, 0),
        ({"group_by": "model"}, 3),
        ({"group_by": "key"}, 1),
        ({"group_by": "day"}, None),
        ({"group_by": "model", "model": "gpt-4"}, 1),
    ],
)
async def test_usage_is_the_same_over_all_front_ends(
    query: dict[str, str], count: int | None, front_ends: FrontEnds
) -> None:
    body = assert_same(await front_ends.fetch("usage", front_ends.test, **query)).body
    assert body["next_page_token"] is None
    if count is not None:
        assert len(body["data"]) == count


@pytest.mark.parametrize("more", [{}, {"group_by": "model"}])
async def test_a_period_that_ends_before_it_begins_is_refused_over_all_front_ends(
    more: dict[str, str], front_ends: FrontEnds
) -> None:
    period = {"from": "2026-12-01", "to": "2026-11-01"}
    outcomes = await front_ends.fetch("usage", front_ends.test, **period, **more)
    assert {outcome.code for outcome in outcomes.values()} == {"invalid_parameter"}
    names = {"grpc": "filter.end_time", "rest": "to", "remote": "to"}
    for protocol, outcome in outcomes.items():
        expected = f"Invalid {names[protocol]}: must be the start of the period or later"
        assert outcome.message == expected


@pytest.mark.parametrize("name", ["model", "key_id"])
async def test_a_filter_with_a_nul_is_refused_over_all_front_ends(name: str, front_ends: FrontEnds) -> None:
    outcomes = await front_ends.fetch("usage", front_ends.test, **{name: "gpt-4\0"})
    assert {outcome.code for outcome in outcomes.values()} == {"invalid_parameter"}
    for protocol, outcome in outcomes.items():
        shown = f"filter.{name}" if protocol == "grpc" else name
        assert outcome.message == f"Invalid {shown}: must be text without NUL"


async def test_a_usage_record_names_the_protocol_of_the_caller(front_ends: FrontEnds) -> None:
    body = assert_same(await front_ends.fetch("usage", front_ends.test)).body
    assert sorted(row["wire"] for row in body["data"]) == ["grpc"] * 2 + ["rest"] * 5


async def test_a_page_token_is_valid_over_all_front_ends(front_ends: FrontEnds) -> None:
    records = assert_same(await front_ends.fetch("usage", front_ends.test)).body["data"]
    seen: list[Any] = []
    token = ""
    for _ in range(PAGES):
        body = assert_same(
            await front_ends.fetch("usage", front_ends.test, page_size="3", page_token=token)
        ).body
        seen += body["data"]
        token = body["next_page_token"]
    assert seen == records
    assert token is None


async def test_a_page_token_of_another_mode_or_account_is_refused(front_ends: FrontEnds, keys: Keys) -> None:
    first = assert_same(await front_ends.fetch("usage", front_ends.test, page_size="1")).body
    for key in (front_ends.live, keys.test):
        outcome = assert_same(
            await front_ends.fetch("usage", key, page_size="1", page_token=first["next_page_token"])
        )
        assert outcome.code == "invalid_parameter"
        assert "page_token" in outcome.message


@pytest.mark.parametrize("path", ["account", "usage"])
@pytest.mark.parametrize("key_type", ["none", "junk", "revoked", "expired"])
async def test_invalid_keys_are_refused_equally_by_both_protocols(
    path: str, key_type: str, front_ends: FrontEnds, keys: Keys
) -> None:
    key = {"none": None, "junk": "pml_test_junk"}.get(key_type) or getattr(keys, key_type, None)
    assert assert_same(await front_ends.fetch(path, key)).code == "invalid_api_key"


async def test_an_account_whose_plan_was_removed_is_refused_over_all_front_ends(
    app: App, front_ends: FrontEnds
) -> None:
    await app.store.add_account("planless", "gone", time.time())
    key = (await app.keyring.create("planless"))[1]
    outcome = assert_same(await front_ends.fetch("account", key))
    assert outcome.code == "model_not_allowed"
    assert "gone" in outcome.message
    assert assert_same(await front_ends.fetch("usage", key)).body["data"] == []
