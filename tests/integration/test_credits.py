"""Credits over all protocols: reservations, the limit they set on the output, costs and usage records."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import fields
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage, cost, decode_prices
from pomelo.stores.usage import UsageRecord
from pomelo.testing import Answer, Received, Stop, error_reply
from tests.app import RICH, Account, RunningApp, app_fixture
from tests.driver import PROTOCOL, STREAM, Outcome
from tests.tasks import TASK_BODIES, text_body

CATALOG = Catalog.load()


app = app_fixture()


def vendor_requests(app: RunningApp, prompt: str) -> list[Received]:
    """Returns the requests with a prompt that reached a vendor."""
    return [r for r in app.upstream.requests if prompt in r.prompt]


def cost_of(record: UsageRecord) -> int:
    """Returns the cost of a record's counts at its own prices."""
    used = Usage(**{field.name: getattr(record, field.name) for field in fields(Usage)})
    return cost(used, decode_prices(record.prices))


def micros(text: str) -> int:
    """Returns the credits in a header as microcredits."""
    return round(float(text) * 10**6)


# --- reservations


@PROTOCOL
@STREAM
async def test_without_max_tokens_the_vendor_gets_the_maximum_that_the_balance_covers(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account(live=3_000)
    prompt = f"limited {protocol} {stream}"
    outcome = await app.ask(protocol, account.live, text_body(prompt), stream=stream)
    assert outcome.code == "ok"
    (request,) = vendor_requests(app, prompt)
    max_tokens = request.body["max_completion_tokens"]
    # The input is at most bytes + 32 tokens, at 5 credits a million if it is cached; the output costs 20.
    assert max_tokens == (3_000 - 5 * (len(prompt) + 32)) // 20
    assert max_tokens > 100
    balance = await app.balance(account, live=True)
    assert (balance.held, balance.available) == (0, 3_000 - balance.spent)
    assert balance.spent == (await app.records(account))[0].cost > 0


@PROTOCOL
async def test_a_sufficient_balance_sets_no_maximum(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    prompt = f"unlimited {protocol}"
    assert (await app.ask(protocol, account.live, text_body(prompt))).code == "ok"
    assert "max_completion_tokens" not in vendor_requests(app, prompt)[0].body
    assert (await app.ask(protocol, account.live, text_body(prompt, max_tokens=7))).code == "ok"
    assert vendor_requests(app, prompt)[1].body["max_completion_tokens"] == 7


@PROTOCOL
@STREAM
async def test_max_tokens_above_the_balance_are_refused_before_the_upstream_call(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account(live=3_000, test=3_000)
    prompt = f"poor {protocol} {stream}"
    maximum = (3_000 - 5 * (len(prompt) + 32)) // 20
    for key in (account.live, account.test):
        outcome = await app.ask(protocol, key, text_body(prompt, max_tokens=maximum + 1), stream=stream)
        assert outcome.code == "insufficient_credits"
        assert outcome.message == "Insufficient credits for this operation"
        assert outcome.headers["x-credits-remaining"] == "0.003"
        assert "x-credits-charged" not in outcome.metadata
    assert not vendor_requests(app, prompt)
    assert (await app.balance(account, live=True)).available == 3_000
    outcome = await app.ask(protocol, account.live, text_body(prompt, max_tokens=maximum), stream=stream)
    assert outcome.code == "ok"


@PROTOCOL
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_without_credits_no_task_runs(app: RunningApp, task_type: str, protocol: str) -> None:
    account = await app.account(live=0, test=0)
    before = len(app.upstream.requests)
    for key in (account.live, account.test):
        outcome = await app.ask(protocol, key, TASK_BODIES[task_type])
        assert (outcome.code, outcome.headers["x-credits-remaining"]) == ("insufficient_credits", "0")
    assert len(app.upstream.requests) == before
    assert not await app.records(account)


# --- costs


@PROTOCOL
@STREAM
@pytest.mark.parametrize("mode", ["test", "live"])
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_a_task_costs_its_price_times_its_counts(
    app: RunningApp, task_type: str, mode: str, protocol: str, stream: bool
) -> None:
    account = await app.account()
    start, body = time.time(), TASK_BODIES[task_type]
    headers = {"X-Request-Id": f"id-{protocol}"}
    outcome = await app.ask(protocol, getattr(account, mode), body, stream=stream, headers=headers)
    assert outcome.code == "ok"
    record = await the_record(app, outcome, account, live=mode == "live")
    check(record, outcome, protocol, body, start, live=mode == "live")


async def the_record(app: RunningApp, outcome: Outcome, account: Account, *, live: bool) -> UsageRecord:
    """Returns the only record of a mode, after comparing the balance and the headers with it."""
    (record,) = await app.records(account, live=live)
    assert not await app.records(account, live=not live)
    balance = await app.balance(account, live=live)
    assert (balance.spent, balance.held) == (record.cost, 0)
    assert await app.concurrency(account, live=live) == 0
    if "x-credits-charged" in outcome.metadata:
        assert micros(outcome.metadata["x-credits-charged"]) == record.cost
    return record


def check(
    record: UsageRecord, outcome: Outcome, protocol: str, body: dict[str, Any], start: float, *, live: bool
) -> None:
    """Asserts that every field of a complete task's record is right."""
    model = CATALOG.models[body["model"]]
    route = model.routes[0]
    assert record.cost == cost_of(record) > 0
    assert record.uncollected == 0
    assert outcome.id in ("", record.task_id)
    assert record.request_id == f"id-{protocol}"
    assert record.wire == ("grpc" if protocol == "grpc" else "rest")
    assert record.live == live
    assert (record.model, record.price_version) == (body["model"], model.price_version)
    answered_by = (route.provider, route.model) if live else ("sandbox", model.name)
    assert (record.provider, record.provider_model) == answered_by
    assert record.complete
    assert record.output_bytes > 0
    assert 0 <= record.first_byte_ms <= record.processing_ms <= (time.time() - start) * 1000 + 1
    assert start - 1 <= record.at <= time.time() + 1
    counts = (record.input_tokens, record.characters, record.images, record.audio_ms)
    match record.task_type:
        case "text":
            tokens = (record.input_tokens, record.output_tokens)
            assert outcome.usage == (*tokens, sum(tokens))
            assert counts == (record.input_tokens, 0, 0, 0)
            assert record.output_bytes == len(outcome.content.encode())
        case "image":
            assert counts == (0, 0, 1, 0)
            assert record.cost == 40_000
        case "text_to_speech":
            assert counts == (0, len(body["text"]), 0, 0)
            assert record.cost == 80 * len(body["text"])
            assert record.output_bytes == int(outcome.content.split()[0])
        case "speech_to_speech" | "speech_to_text":
            assert counts == (0, 0, 0, record.audio_ms)
            assert record.audio_ms > 0


@pytest.mark.parametrize("protocol", ["rest", "remote"])
@pytest.mark.parametrize("mode", ["test", "live"])
@pytest.mark.parametrize("task_type", ["image", "tts", "sts"])
async def test_raw_media_costs_the_same(app: RunningApp, task_type: str, mode: str, protocol: str) -> None:
    account = await app.account()
    start, body = time.time(), TASK_BODIES[task_type]
    headers = {"X-Request-Id": f"id-{protocol}", "Accept": "image/*, audio/*"}
    outcome = await app.ask(protocol, getattr(account, mode), body, headers=headers)
    assert outcome.status == 200
    record = await the_record(app, outcome, account, live=mode == "live")
    check(record, outcome, protocol, body, start, live=mode == "live")
    assert record.output_bytes == int(outcome.content.split()[0])


@PROTOCOL
@STREAM
async def test_after_a_fallback_the_record_names_the_provider_that_answered(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    prompt = f"fallback {protocol} {stream}"
    body = {"model": "flux-1-schnell", "prompt": prompt, "width": 512, "height": 512}
    outcome = await app.ask(protocol, account.live, body, stream=stream)
    assert outcome.code == "ok"
    (record,) = await app.records(account)
    assert (record.provider, record.provider_model) == ("together", "black-forest-labs/FLUX.1-schnell")
    assert record.pixels == 512 * 512
    assert record.cost == math.ceil(512 * 512 * 3_000 / 10**6)


# --- failed tasks

FAILURES: dict[str, Any] = {
    "refused": error_reply(400, code="content_policy_violation"),
    "down": error_reply(401, code="invalid_api_key"),
    "cut": Answer("one two three", at={0: Stop.CLOSE}),
}


@PROTOCOL
@STREAM
@pytest.mark.parametrize("name", FAILURES)
async def test_a_failed_task_costs_nothing_and_releases_its_reservation(
    app: RunningApp, name: str, protocol: str, stream: bool
) -> None:
    account = await app.account("wide", live=5_000)
    prompt = f"failure {name} {protocol} {stream}"
    app.upstream.when(prompt, FAILURES[name])
    for _ in range(3):  # more than the concurrency limit
        outcome = await app.ask(protocol, account.live, text_body(prompt), stream=stream)
        assert outcome.code not in ("ok", "concurrency_limit_exceeded", "insufficient_credits")
        assert outcome.metadata["x-credits-charged"] == "0"
        assert outcome.metadata["x-credits-remaining"] == "0.005"
        assert outcome.metadata["x-ratelimit-remaining-concurrent"] == "2"
    balance = await app.balance(account, live=True)
    assert (balance.spent, balance.held) == (0, 0)
    assert not await app.records(account)


@PROTOCOL
@STREAM
@pytest.mark.parametrize("task_type", ["tts", "image"])
async def test_a_failed_task_with_a_known_price_reports_no_cost(
    app: RunningApp, task_type: str, protocol: str, stream: bool
) -> None:
    account = await app.account()
    field = "text" if task_type == "tts" else "prompt"
    body = TASK_BODIES[task_type] | {field: "[[error:provider_failed]]"}
    outcome = await app.ask(protocol, account.test, body, stream=stream)
    assert outcome.code == "provider_failed"
    assert outcome.metadata["x-credits-charged"] == "0"
    assert outcome.metadata["x-credits-remaining"] == str(RICH // 10**6)


# --- the vendor's counts


@PROTOCOL
async def test_usage_that_the_vendor_does_not_report_is_estimated_and_marked(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account()
    prompt = f"uncounted {protocol} stream"
    app.upstream.when(prompt, Answer("five words are in here", usage=None))
    outcome = await app.ask(protocol, account.live, text_body(prompt), stream=True)
    (record,) = await app.records(account)
    assert record.source == "estimated"
    assert record.complete
    assert outcome.usage == (3, 5, 8)
    assert (record.input_tokens, record.output_tokens) == (3, 5)
    assert record.cost == 3 * 4 + 5 * 20


@PROTOCOL
@STREAM
async def test_usage_above_the_reservation_makes_no_balance_negative(
    app: RunningApp, protocol: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    account = await app.account(live=5_000)
    prompt = f"overrun {protocol} {stream}"
    usage = {"prompt_tokens": 100, "completion_tokens": 1_000, "total_tokens": 1_100}
    app.upstream.when(prompt, Answer("short", usage=usage))
    outcome = await app.ask(protocol, account.live, text_body(prompt, max_tokens=10), stream=stream)
    assert outcome.code == "ok"
    (record,) = await app.records(account)
    assert (record.cost, record.uncollected) == (5_000, 100 * 4 + 1_000 * 20 - 5_000)
    assert record.cost + record.uncollected == cost_of(record)
    (line,) = [entry for entry in caplog.records if "uncollected" in entry.getMessage()]
    assert line.levelname == "ERROR"
    for detail in (account.name, record.task_id, "0.0154 credits"):
        assert detail in line.getMessage()
    balance = await app.balance(account, live=True)
    assert (balance.available, balance.held) == (0, 0)
    assert outcome.metadata["x-credits-remaining"] == "0" or (stream and protocol != "grpc")
    refused = await app.ask(protocol, account.live, text_body(prompt), stream=stream)
    assert refused.code == "insufficient_credits"


@PROTOCOL
async def test_concurrent_tasks_never_overdraw_credits(app: RunningApp, protocol: str) -> None:
    account = await app.account(test=40_000 * 7 + 39_999)
    tasks = [app.ask(protocol, account.test, TASK_BODIES["image"]) for _ in range(30)]
    answers = await asyncio.gather(*tasks)
    assert sorted(outcome.code for outcome in answers) == ["insufficient_credits"] * 23 + ["ok"] * 7
    balance = await app.balance(account)
    assert (balance.available, balance.held) == (39_999, 0)
