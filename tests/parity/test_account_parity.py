"""The account and its usage are the same three ways: gRPC, REST beside the engine, REST through a remote gateway."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import grpc
import pytest

from gateway.account import query as read_query
from pomelo.app import App
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.status import from_rpc_error
from pomelo.stores.ledger import Grant, Wallet
from tests.conftest import Keys
from tests.driver import GrpcDriver, RestDriver
from tests.driver import TaskRequest as TaskAsk

PAGES = 3


@dataclass
class Outcome:
    """What came back: REST's JSON, or what gRPC's message would be as that."""

    code: str = "ok"
    message: str = ""
    found: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ways:
    """The three ways, and the keys of an account with some tasks on both of its sides."""

    channel: grpc.aio.Channel
    http: aiohttp.ClientSession
    rest: str
    remote: str
    live: str
    test: str

    async def ask(self, path: str, key: str | None, **query: str) -> dict[str, Outcome]:
        """Asks every way the same."""
        return {
            "grpc": await self._grpc(path, key, query),
            "rest": await self._rest(self.rest, path, key, query),
            "remote": await self._rest(self.remote, path, key, query),
        }

    async def _rest(self, base: str, path: str, key: str | None, query: dict[str, str]) -> Outcome:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.http.get(f"{base}/api/v1/{path}", params=query, headers=headers) as answer:
            found = json.loads(await answer.text(), parse_float=Decimal)
            told = {name.lower(): value for name, value in answer.headers.items()}
            if answer.status == 200:
                return Outcome(found=found, headers=told)
            return Outcome(found["error"]["code"], found["error"]["message"], headers=told)

    async def _grpc(self, path: str, key: str | None, query: dict[str, str]) -> Outcome:
        stub = AccountServiceStub(self.channel)
        metadata = [("authorization", f"Bearer {key}")] if key else []
        if path == "account":
            rpc = stub.GetAccount(pb.GetAccountRequest(), metadata=metadata)
        else:
            rpc = stub.ListUsage(read_query(query), metadata=metadata)
        try:
            answer = await rpc
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            return Outcome(error.code, error.message, headers=dict(failed.trailing_metadata() or ()))
        headers = dict(await rpc.trailing_metadata())
        found = _account(answer.account) if path == "account" else _usage(answer)
        return Outcome(found=found, headers=headers)


def _account(account: pb.Account) -> dict[str, Any]:
    limits, balance = account.limits, account.balance
    return {
        "id": account.name,
        "object": "account",
        "mode": "live" if account.live else "test",
        "plan": account.plan,
        "limits": {
            "requests_per_minute": limits.requests_per_minute or None,
            "concurrent_requests": limits.concurrent_requests or None,
            "tokens_per_minute": limits.tokens_per_minute or None,
            "models": list(limits.models) or None,
        },
        "credits": {
            name: Decimal(getattr(balance, f"{name}_micros")) / 10**6
            for name in ("granted", "spent", "held", "available")
        },
    }


def _usage(answer: pb.ListUsageResponse) -> dict[str, Any]:
    rows = [
        {
            "object": "usage.record",
            "mode": "live" if row.live else "test",
            "type": TaskType.Name(row.task_type).removeprefix("TASK_TYPE_").lower().replace("_", "-"),
            "source": pb.UsageSource.Name(row.source).removeprefix("USAGE_SOURCE_").lower(),
            "time": row.time.seconds,
            **_plain(row, "account", "live", "task_type", "source", "time"),
        }
        for row in answer.records
    ]
    rows += [{"object": "usage.total", **_plain(row)} for row in answer.totals]
    return {"object": "list", "data": rows, "next_page_token": answer.next_page_token or None}


def _plain(row: Any, *but: str) -> dict[str, Any]:
    fields = {f.name: getattr(row, f.name) for f in row.DESCRIPTOR.fields if f.name not in but}
    fields["prompt_tokens_details"] = {
        "cached_tokens": fields.pop("cached_input_tokens"),
        "cache_write_tokens": fields.pop("cache_write_input_tokens"),
    }
    fields.pop("cache_write_1h_input_tokens", None)
    fields["audio_seconds"] = Decimal(str(fields["audio_seconds"]))
    for name in ("cost", "provider_cost"):
        if (micros := fields.pop(f"{name}_micros", None)) is not None:
            fields[name] = Decimal(micros) / 10**6
    return fields


@pytest.fixture(scope="module")
async def ways(
    app: App, channel: grpc.aio.Channel, http: aiohttp.ClientSession, rest_url: str, gateway_url: str
) -> Ways:
    """An account of its own, whose seven test tasks and one live one came by all ways."""
    name = "parity"
    await app.store.add_account(name, "pro", time.time())
    for live in (True, False):
        await app.store.grant(Grant(f"{name} {live}", Wallet(name, live), 12_345_678, time.time()))
    test = (await app.keyring.create(name))[1]
    live = (await app.keyring.create(name, live=True))[1]
    wires = [GrpcDriver(channel), RestDriver(http, rest_url), RestDriver(http, gateway_url)]
    message = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    for wire in wires:
        assert (await wire(TaskAsk({"model": "gpt-4"} | message, test))).code == "ok"
        assert (await wire(TaskAsk({"model": "claude-3-opus"} | message, test, stream=True))).code == "ok"
    speech = {"model": "eleven-labs-stt", "audio": "c29tZSBzb3VuZCA=", "language_code": "en"}
    assert (await wires[1](TaskAsk(speech, test))).code == "ok"
    assert (await wires[1](TaskAsk({"model": "gpt-4"} | message, live))).code == "ok"
    return Ways(channel, http, rest_url, gateway_url, live, test)


def the_same(outcomes: dict[str, Outcome]) -> Outcome:
    """What all ways gave."""
    first = outcomes["rest"]
    for name, other in outcomes.items():
        assert (other.code, other.message) == (first.code, first.message), name
        assert other.found == first.found, name
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


@pytest.mark.parametrize("side", ["live", "test"])
async def test_an_account_is_the_same(side: str, ways: Ways) -> None:
    outcome = the_same(await ways.ask("account", getattr(ways, side)))
    found = outcome.found
    assert (found["id"], found["plan"], found["mode"]) == ("parity", "pro", side)
    amounts = found["credits"]
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
async def test_usage_is_the_same(query: dict[str, str], count: int | None, ways: Ways) -> None:
    found = the_same(await ways.ask("usage", ways.test, **query)).found
    assert found["next_page_token"] is None
    if count is not None:
        assert len(found["data"]) == count


async def test_the_wire_of_a_task_is_that_of_its_caller(ways: Ways) -> None:
    found = the_same(await ways.ask("usage", ways.test)).found
    assert sorted(row["wire"] for row in found["data"]) == ["grpc"] * 2 + ["rest"] * 5


async def test_a_token_of_one_way_is_good_on_all_of_them(ways: Ways) -> None:
    everything = the_same(await ways.ask("usage", ways.test)).found["data"]
    seen: list[Any] = []
    token = ""
    for _ in range(PAGES):
        found = the_same(await ways.ask("usage", ways.test, page_size="3", page_token=token)).found
        seen += found["data"]
        token = found["next_page_token"]
    assert seen == everything
    assert token is None


async def test_a_token_of_another_key_s_side_or_account_is_refused(ways: Ways, keys: Keys) -> None:
    first = the_same(await ways.ask("usage", ways.test, page_size="1")).found
    for key in (ways.live, keys.test):
        outcome = the_same(await ways.ask("usage", key, page_size="1", page_token=first["next_page_token"]))
        assert outcome.code == "invalid_parameter"
        assert "page_token" in outcome.message


@pytest.mark.parametrize("path", ["account", "usage"])
@pytest.mark.parametrize("kind", ["none", "junk", "revoked", "expired"])
async def test_a_bad_key_is_refused_the_same(path: str, kind: str, ways: Ways, keys: Keys) -> None:
    key = {"none": None, "junk": "pml_test_junk"}.get(kind) or getattr(keys, kind, None)
    assert the_same(await ways.ask(path, key)).code == "invalid_api_key"


async def test_an_account_whose_plan_is_gone_is_refused_the_same(app: App, ways: Ways) -> None:
    await app.store.add_account("planless", "gone", time.time())
    key = (await app.keyring.create("planless"))[1]
    outcome = the_same(await ways.ask("account", key))
    assert outcome.code == "model_not_allowed"
    assert "gone" in outcome.message
    assert the_same(await ways.ask("usage", key)).found["data"] == []
