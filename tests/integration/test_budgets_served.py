"""Budgets of keys and disabled accounts over all protocols."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOL, STREAM, Outcome
from tests.tasks import TASK_BODIES, text_body

IMAGE = TASK_BODIES["image"]
IMAGE_COST = 40_000


class Clock:
    """The time, or a `moment` that is set."""

    moment: datetime | None = None

    def now(self) -> float:
        """Unix time."""
        return time.time() if self.moment is None else self.moment.timestamp()


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module", name="app")
async def _app(
    tmp_path_factory: pytest.TempPathFactory, store_settings: dict[str, Any], clock: Clock
) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("budgets")
    async with run_app(folder, settings=store_settings, now=clock.now) as opened:
        yield opened


async def limited_key(app: RunningApp, account: Account, budget: str, *, live: bool = False) -> str:
    """A key with a budget."""
    return (await app.server.keyring.create(account.name, live, budget=budget))[1]


@PROTOCOL
@STREAM
async def test_a_task_above_the_budget_of_its_key_is_refused_with_the_time_of_its_reset(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    key = await limited_key(app, account, "1000/day")
    outcome = await app.ask(protocol, key, IMAGE, stream=stream)
    assert outcome.code == "insufficient_credits"
    assert (outcome.status, outcome.grpc_status) in ((402, "OK"), (200, "FAILED_PRECONDITION"))
    assert re.fullmatch(
        "Insufficient credits for this operation: it needs more than is left of this API key's budget of "
        r"0\.001 credits a day\. Reset at \d{4}-\d\d-\d\dT00:00:00Z",
        outcome.message,
    )
    assert outcome.headers["x-credits-remaining"] == "1000000"
    assert (await app.ask(protocol, account.test, IMAGE, stream=stream)).code == "ok"


async def test_a_refusal_after_the_clock_was_set_back_names_the_end_of_the_period_that_counts(
    app: RunningApp, clock: Clock
) -> None:
    moment = datetime(2030, 4, 30, 12, tzinfo=UTC)
    try:
        for period, reset in (("day", "2030-05-01"), ("month", "2030-05-01"), ("week", "2030-05-06")):
            key = await limited_key(app, await app.account(), f"{IMAGE_COST}/{period}")
            clock.moment = moment
            assert (await app.ask("rest", key, IMAGE)).code == "ok"
            clock.moment = moment - timedelta(days=40)
            for protocol in ("rest", "grpc"):
                outcome = await app.ask(protocol, key, IMAGE)
                assert outcome.code == "insufficient_credits"
                assert outcome.message.endswith(f"Reset at {reset}T00:00:00Z")
    finally:
        clock.moment = None


async def test_a_budget_pays_for_exactly_ten_of_a_hundred_concurrent_tasks(app: RunningApp) -> None:
    account = await app.account()
    key = await limited_key(app, account, f"{10 * IMAGE_COST}/total")

    async def ask(number: int) -> Outcome:
        return await app.ask(("grpc", "rest")[number % 2], key, IMAGE)

    outcomes = await asyncio.gather(*(ask(number) for number in range(100)))
    codes = [outcome.code for outcome in outcomes]
    assert (codes.count("ok"), codes.count("insufficient_credits")) == (10, 90)
    assert (await app.balance(account)).spent == 10 * IMAGE_COST
    await app.assert_audit_clean()


@PROTOCOL
async def test_a_failed_task_gives_the_budget_back(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    key = await limited_key(app, account, f"{IMAGE_COST}/total")
    failing = {**IMAGE, "prompt": "[[error:provider_failed]]"}
    for _ in range(3):
        assert (await app.ask(protocol, key, failing)).code != "ok"
    assert (await app.ask(protocol, key, IMAGE)).code == "ok"
    assert (await app.ask(protocol, key, IMAGE)).code == "insufficient_credits"


@PROTOCOL
async def test_an_open_ended_task_is_capped_by_the_budget(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    key = await limited_key(app, account, "3000/total", live=True)
    outcome = await app.ask(protocol, key, text_body(f"capped {protocol}"))
    assert outcome.code == "ok"
    (request,) = [each for each in app.upstream.requests if f"capped {protocol}" in each.prompt]
    assert 1 <= request.body["max_completion_tokens"] <= 3_000 // 20


@PROTOCOL
async def test_the_keys_of_a_disabled_account_are_refused(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    await app.server.store.set_disabled(account.name, 1.0)
    app.server.keyring.forget_account(account.name)
    outcome = await app.ask(protocol, account.test, IMAGE)
    assert outcome.code == "invalid_api_key"
    assert outcome.message == "The account of this API key is disabled. Ask the operator of the service"
