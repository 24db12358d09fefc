"""The added limits over all protocols, on every store: run in the copy by test_limit.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime

import pytest

from pomelo.testing import Answer, Gate
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOLS, STREAM
from tests.redis_server import any_server
from tests.tasks import TASK_BODIES, text_body

DAY = 86_400


@pytest.fixture(scope="module", params=["sqlite", "redis"])
async def app(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("limits")
    settings = {}
    if request.param == "redis":
        settings = {"store": f"{any_server()}?persistence=none", "archive": f"sqlite:{folder / 'usage.db'}"}
    async with run_app(folder, settings=settings) as opened:
        yield opened


@PROTOCOL
async def test_a_limit_a_day_is_reported_and_refuses_with_its_own_message(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("five")
    for left in ("1", "0"):
        done = await app.ask(protocol, account.test, TASK_BODIES["image"])
        assert done.code == "ok"
        assert done.headers["x-ratelimit-limit-images"] == "2"
        assert done.headers["x-ratelimit-remaining-images"] == left
        assert abs(int(done.headers["x-ratelimit-reset-images"]) - time.time() - DAY) < 60
    refused = await app.ask(protocol, account.test, TASK_BODIES["image"])
    assert (refused.code, refused.grpc_status if protocol == "grpc" else refused.status) == (
        "rate_limit_exceeded",
        "RESOURCE_EXHAUSTED" if protocol == "grpc" else 429,
    )
    reset = int(refused.headers["x-ratelimit-reset-images"])
    start = "Too many images today. Reset at "
    assert refused.message.startswith(start)
    assert datetime.fromisoformat(refused.message.removeprefix(start)).timestamp() == reset
    assert DAY - 60 < int(refused.headers["retry-after"]) <= DAY
    assert refused.headers["x-ratelimit-limit-images"] == "2"
    assert refused.headers["x-ratelimit-remaining-images"] == "0"
    assert refused.headers["x-ratelimit-remaining"] == "3", "a refused task takes nothing"
    text = await app.ask(protocol, account.test, text_body())
    assert text.code == "ok"
    assert "x-ratelimit-limit-images" not in text.headers
    assert (await app.ask(protocol, account.live, text_body(model="gpt-99"))).code == "unsupported_model"
    invalid = await app.ask(protocol, account.test, {**TASK_BODIES["image"], "width": 5})
    assert (invalid.code, invalid.headers["x-ratelimit-remaining-images"]) == ("invalid_parameter", "0")


async def test_all_protocols_share_a_new_limit_and_each_mode_has_its_own(app: RunningApp) -> None:
    account = await app.account()
    outcomes = [await app.ask(protocol, account.test, TASK_BODIES["image"]) for protocol in PROTOCOLS]
    assert [outcome.code for outcome in outcomes] == ["ok", "ok", "rate_limit_exceeded"]
    answered = await app.get("rest", account.live, "/api/v1/models/flux-1-pro")
    assert answered.headers["x-ratelimit-remaining-images"] == "2"


@PROTOCOL
@STREAM
async def test_a_limit_on_running_tasks_is_released_when_the_task_ends(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    gate, prompt = Gate(), f"held {protocol} {stream}"
    app.upstream.when(prompt, Answer("one two", at={1: gate}))
    body = text_body(prompt, max_tokens=10)
    running = asyncio.create_task(app.ask(protocol, account.live, body, stream=True))
    await gate.reached.wait()
    second = await app.ask(protocol, account.live, text_body(max_tokens=10), stream=stream)
    if stream:
        assert (second.code, second.message) == ("concurrency_limit_exceeded", "Too many streams")
        assert second.headers["retry-after"] == "1"
    else:
        assert second.code == "ok"
    assert second.headers["x-ratelimit-limit-streams"] == "1"
    assert second.headers["x-ratelimit-remaining-streams"] == "0"
    assert "x-ratelimit-reset-streams" not in second.headers
    other = await app.get(protocol, account.test, "/api/v1/models")
    assert other.headers["x-ratelimit-remaining-streams"] == "1"
    gate.open()
    assert (await running).code == "ok"
    await app.idle(account, live=True)
    answered = await app.get(protocol, account.live, "/api/v1/models")
    assert answered.headers["x-ratelimit-remaining-streams"] == "1"
    assert (await app.ask(protocol, account.live, text_body(max_tokens=10), stream=True)).code == "ok"
