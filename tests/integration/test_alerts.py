"""Alerts of running servers, at a real receiver: each event once, whichever of the servers has seen it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.alerts.alert import signing_keys
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.testing import Answer, error_reply
from tests.alerts import Receiver, open_receiver
from tests.app import Account, RunningApp, run_app
from tests.redis_server import RedisServer
from tests.tasks import TASK_BODIES, text_body
from tests.waiting import until

SECRET = "whsec_" + "cG9tZWxv" * 4
ROOT = "the same root secret of both servers"
IMAGE = TASK_BODIES["image"]
IMAGE_COST = 40_000
SEARCHED = 30.0
"""Seconds in which a search has certainly found what has happened."""

nervous_router = partial(Router, breaker=partial(CircuitBreaker, minimum_calls=2))
"""Makes a router whose circuit breakers open after two failures."""


@dataclass
class Alerted:
    """Servers that share a store and send alerts to one receiver."""

    servers: list[RunningApp]
    receiver: Receiver

    async def ask(self, key: str, body: dict[str, Any], *codes: str) -> None:
        """Runs a task on each server; `codes` are the results."""
        results = [(await server.ask("rest", key, body)).code for server in self.servers]
        assert results == [*codes] * len(self.servers)

    async def searched(self) -> None:
        """Returns when each server has sent what it found until now: a second search has begun since."""
        for server in self.servers * 2:
            account = await server.account(live=IMAGE_COST + 1)
            assert (await server.ask("grpc", account.live, IMAGE)).code == "ok"
            await until(partial(self._is_low, account), SEARCHED)

    def _is_low(self, account: Account) -> bool:
        return account.name in self.accounts("balance.low")

    def accounts(self, event: str) -> list[str]:
        return [data["account"] for data in self.receiver.of_type(event)]


@pytest.fixture(scope="module", name="alerted", params=["one server", "two servers"])
async def _alerted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Alerted]:
    folder: Path = tmp_path_factory.mktemp("alerts")
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(open_receiver(signing_keys([SECRET], [])))
        settings: dict[str, Any] = {"alert_url": (receiver.url,), "alert_secret": (SECRET,), "secret": ROOT}
        names = ["a"]
        if request.param == "two servers":
            settings["store"] = stack.enter_context(RedisServer()).url
            settings["archive"] = f"sqlite:{folder / 'usage.db'}"
            names.append("b")
        options: dict[str, Any] = {"make_router": nervous_router, "settings": settings, "alerts_every": 0.1}
        opening = [run_app(folder / name, **options) for name in names]
        yield Alerted([await stack.enter_async_context(each) for each in opening], receiver)


async def test_a_balance_below_a_fifth_of_the_last_grant_is_reported_once(alerted: Alerted) -> None:
    spent = len(alerted.servers) * IMAGE_COST
    account = await alerted.servers[0].account(live=2 * spent, test=IMAGE_COST * 3)
    await alerted.ask(account.live, IMAGE, "ok")
    await alerted.ask(account.test, IMAGE, "ok")
    await alerted.searched()
    assert account.name not in alerted.accounts("balance.low")
    await alerted.ask(account.live, IMAGE, "ok")
    await alerted.ask(account.live, IMAGE, "insufficient_credits")
    await alerted.searched()
    (data,) = [each for each in alerted.receiver.of_type("balance.low") if each["account"] == account.name]
    assert data == {
        "account": account.name,
        "mode": "live",
        "available_micros": 0,
        "held_micros": 0,
        "threshold_micros": 2 * spent // 5,
    }


async def test_a_used_budget_is_reported_once(alerted: Alerted) -> None:
    server = alerted.servers[0]
    account = await server.account()
    budget = f"{len(alerted.servers) * IMAGE_COST + 1}/total"
    record, key = await server.server.keyring.create(account.name, live=True, budget=budget)
    await alerted.ask(key, IMAGE, "ok")
    await alerted.searched()
    assert account.name not in alerted.accounts("budget.reached")
    for _ in range(2):
        await alerted.ask(key, IMAGE, "insufficient_credits")
    await alerted.searched()
    (data,) = [each for each in alerted.receiver.of_type("budget.reached") if each["account"] == account.name]
    assert data == {
        "account": account.name,
        "mode": "live",
        "key_id": record.key_id,
        "budget_micros": len(alerted.servers) * IMAGE_COST + 1,
        "period": "total",
        "used_micros": len(alerted.servers) * IMAGE_COST,
    }


async def test_a_vendor_that_fails_and_one_that_answers_again_are_reported_once(alerted: Alerted) -> None:
    account = await alerted.servers[0].account()
    body = text_body("A question", model="gpt-3.5-turbo", max_tokens=5)
    for server in alerted.servers:
        server.upstream.default = error_reply(503, "down")
        for _ in range(2):
            assert (await server.ask("rest", account.live, body)).code != "ok"
    receiver = alerted.receiver
    await until(lambda: bool(receiver.of_type("provider.open")), SEARCHED)
    assert not receiver.of_type("provider.closed")
    for server in alerted.servers:
        server.upstream.default = None
        await closed(server, account, body)
    await until(lambda: bool(receiver.of_type("provider.closed")), SEARCHED)
    await alerted.searched()
    (opened,), (closed_again,) = receiver.of_type("provider.open"), receiver.of_type("provider.closed")
    assert opened == closed_again
    assert opened["provider"] == "openai"


async def closed(server: RunningApp, account: Account, body: dict[str, Any]) -> None:
    """Returns when the vendor answers a call."""
    async with asyncio.timeout(SEARCHED):
        while (await server.ask("rest", account.live, body)).code != "ok":
            pass


async def test_what_could_not_be_collected_is_reported(alerted: Alerted) -> None:
    server = alerted.servers[-1]
    account = await server.account(live=5_000)
    usage = {"prompt_tokens": 100, "completion_tokens": 1_000, "total_tokens": 1_100}
    server.upstream.when("overrun", Answer("short", usage=usage))
    outcome = await server.ask("rest", account.live, text_body("overrun", max_tokens=10))
    await alerted.searched()
    (data,) = alerted.receiver.of_type("credits.uncollected")
    (record,) = await server.records(account)
    assert data == {
        "account": account.name,
        "mode": "live",
        "task_id": outcome.id,
        "request_id": record.request_id,
        "provider": "openai",
        "uncollected_micros": record.uncollected,
    }


async def test_alerts_have_times_and_ids_of_their_own_and_no_content(alerted: Alerted) -> None:
    received = alerted.receiver.received
    assert len({alert["id"] for alert in received}) == len(received)
    for alert in received:
        assert alert.keys() == {"id", "type", "timestamp", "data"}
        assert alert["timestamp"].endswith("Z")
        assert "kite" not in str(alert)
