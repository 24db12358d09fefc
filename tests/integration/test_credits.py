"""Credits over the real wires: what is held, what is cut, what is charged, and the record that says so."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage, cost, decode_prices
from pomelo.stores.ledger import UsageRecord
from pomelo.testing import Answer, Received, Stop, error_reply
from tests.app import RICH, RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome
from tests.tasks import TASK_BODIES, text_body

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
CATALOG = Catalog.load()


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("credits")) as opened:
        yield opened


def sent(house: RunningApp, prompt: str) -> list[Received]:
    """The requests that reached a vendor with a prompt."""
    return [r for r in house.upstream.requests if prompt in r.prompt]


def counted(record: UsageRecord) -> int:
    """What a record's counts cost by its own prices."""
    used = Usage(
        record.input_tokens,
        record.output_tokens,
        record.characters,
        record.images,
        record.pixels,
        record.audio_ms,
        record.cached_input_tokens,
        record.cache_write_input_tokens,
        record.cache_write_1h_input_tokens,
    )
    return cost(used, decode_prices(record.prices))


def micros(text: str) -> int:
    """Credits of a header as microcredits."""
    return round(float(text) * 10**6)


# --- what can be paid


@WAY
@HOW
async def test_without_max_tokens_the_vendor_is_asked_for_what_can_be_paid(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account(live=3_000)
    prompt = f"cut {way} {stream}"
    told = await house.ask(way, caller.live, text_body(prompt), stream=stream)
    assert told.code == "ok"
    (request,) = sent(house, prompt)
    asked = request.body["max_completion_tokens"]
    # At most bytes + 32 tokens in, at 5 credits a million where they go to the cache; the rest at 20.
    assert asked == (3_000 - 5 * (len(prompt) + 32)) // 20
    assert asked > 100
    balance = await house.balance(caller, live=True)
    assert (balance.held, balance.available) == (0, 3_000 - balance.spent)
    assert balance.spent == (await house.records(caller))[0].cost > 0


@WAY
async def test_who_can_pay_for_all_is_not_cut(house: RunningApp, way: str) -> None:
    caller = await house.account()
    prompt = f"uncut {way}"
    assert (await house.ask(way, caller.live, text_body(prompt))).code == "ok"
    assert "max_completion_tokens" not in sent(house, prompt)[0].body
    assert (await house.ask(way, caller.live, text_body(prompt, max_tokens=7))).code == "ok"
    assert sent(house, prompt)[1].body["max_completion_tokens"] == 7


@WAY
@HOW
async def test_max_tokens_that_cannot_be_paid_are_refused_before_any_call(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account(live=3_000, test=3_000)
    prompt = f"poor {way} {stream}"
    most = (3_000 - 5 * (len(prompt) + 32)) // 20
    for key in (caller.live, caller.test):
        told = await house.ask(way, key, text_body(prompt, max_tokens=most + 1), stream=stream)
        assert (told.code, told.message) == (
            "insufficient_credits",
            "Insufficient credits for this operation",
        )
        assert told.headers["x-credits-remaining"] == "0.003"
        assert "x-credits-charged" not in told.metadata
    assert not sent(house, prompt)
    assert (await house.balance(caller, live=True)).available == 3_000
    told = await house.ask(way, caller.live, text_body(prompt, max_tokens=most), stream=stream)
    assert told.code == "ok"


@WAY
@pytest.mark.parametrize("kind", TASK_BODIES)
async def test_without_credits_nothing_is_done(house: RunningApp, kind: str, way: str) -> None:
    caller = await house.account(live=0, test=0)
    before = len(house.upstream.requests)
    for key in (caller.live, caller.test):
        told = await house.ask(way, key, TASK_BODIES[kind])
        assert (told.code, told.headers["x-credits-remaining"]) == ("insufficient_credits", "0")
    assert len(house.upstream.requests) == before
    assert not await house.records(caller)


# --- what is charged


@WAY
@HOW
@pytest.mark.parametrize("side", ["test", "live"])
@pytest.mark.parametrize("kind", TASK_BODIES)
async def test_a_task_costs_its_price_times_its_counts(
    house: RunningApp, kind: str, side: str, way: str, stream: bool
) -> None:
    caller = await house.account()
    live = side == "live"
    began = time.time()
    body = TASK_BODIES[kind]
    told = await house.ask(
        way, getattr(caller, side), body, stream=stream, headers={"X-Request-Id": f"id-{way}"}
    )
    assert told.code == "ok"
    check(await one(house, told, way, live=live, caller=caller), told, way, body, began, live=live)


async def one(house: RunningApp, told: Outcome, way: str, *, live: bool, caller: Any) -> UsageRecord:
    """The one record of a side, whose balance fits it."""
    (record,) = await house.records(caller, live=live)
    assert not await house.records(caller, live=not live)
    balance = await house.balance(caller, live=live)
    assert (balance.spent, balance.held) == (record.cost, 0)
    assert await house.concurrency(caller, live=live) == 0
    if "x-credits-charged" in told.metadata:
        assert micros(told.metadata["x-credits-charged"]) == record.cost
    return record


def check(
    record: UsageRecord, told: Outcome, way: str, body: dict[str, Any], began: float, *, live: bool
) -> None:
    """A record of a whole task has every field right."""
    model = CATALOG.models[body["model"]]
    route = model.routes[0]
    assert record.cost == counted(record) > 0
    assert record.uncollected == 0
    assert told.id in ("", record.task_id)
    assert record.request_id == f"id-{way}"
    assert record.wire == ("grpc" if way == "grpc" else "rest")
    assert record.live == live
    assert (record.model, record.price_version) == (body["model"], model.price_version)
    assert (record.provider, record.provider_model) == (
        (route.provider, route.model) if live else ("sandbox", model.name)
    )
    assert record.complete
    assert record.output_bytes > 0
    assert 0 <= record.first_byte_ms <= record.processing_ms <= (time.time() - began) * 1000 + 1
    assert began - 1 <= record.at <= time.time() + 1
    counts = (record.input_tokens, record.characters, record.images, record.audio_ms)
    match record.task_type:
        case "text":
            assert told.usage == (
                record.input_tokens,
                record.output_tokens,
                record.input_tokens + record.output_tokens,
            )
            assert counts == (record.input_tokens, 0, 0, 0)
            assert record.output_bytes == len(told.content.encode())
        case "image":
            assert counts == (0, 0, 1, 0)
            assert record.cost == 40_000
        case "text_to_speech":
            assert counts == (0, len(body["text"]), 0, 0)
            assert record.cost == 80 * len(body["text"])
            assert record.output_bytes == int(told.content.split()[0])
        case "speech_to_speech" | "speech_to_text":
            assert counts == (0, 0, 0, record.audio_ms)
            assert record.audio_ms > 0


@pytest.mark.parametrize("way", ["rest", "remote"])
@pytest.mark.parametrize("side", ["test", "live"])
@pytest.mark.parametrize("kind", ["image", "tts", "sts"])
async def test_raw_bytes_cost_the_same(house: RunningApp, kind: str, side: str, way: str) -> None:
    caller = await house.account()
    began = time.time()
    told = await house.ask(
        way,
        getattr(caller, side),
        TASK_BODIES[kind],
        accept="image/*, audio/*",
        headers={"X-Request-Id": f"id-{way}"},
    )
    assert told.status == 200
    live = side == "live"
    record = await one(house, told, way, live=live, caller=caller)
    check(record, told, way, TASK_BODIES[kind], began, live=live)
    assert record.output_bytes == int(told.content.split()[0])


@WAY
@HOW
async def test_after_another_route_the_record_names_who_answered(
    house: RunningApp, way: str, stream: bool
) -> None:
    caller = await house.account()
    prompt = f"elsewhere {way} {stream}"
    body = {"model": "flux-1-schnell", "prompt": prompt, "width": 512, "height": 512}
    told = await house.ask(way, caller.live, body, stream=stream)
    assert told.code == "ok"
    (record,) = await house.records(caller)
    assert (record.provider, record.provider_model) == ("together", "black-forest-labs/FLUX.1-schnell")
    assert record.pixels == 512 * 512
    assert record.cost == math.ceil(512 * 512 * 3_000 / 10**6)


# --- what costs nothing

FAILURES: dict[str, Any] = {
    "refused": error_reply(400, code="content_policy_violation"),
    "down": error_reply(401, code="invalid_api_key"),
    "cut": Answer("one two three", at={0: Stop.CLOSE}),
}


@WAY
@HOW
@pytest.mark.parametrize("name", FAILURES)
async def test_a_failed_task_costs_nothing_and_frees_everything(
    house: RunningApp, name: str, way: str, stream: bool
) -> None:
    caller = await house.account("wide", live=5_000)
    prompt = f"failure {name} {way} {stream}"
    house.upstream.when(prompt, FAILURES[name])
    for _ in range(3):  # more than there are slots
        told = await house.ask(way, caller.live, text_body(prompt), stream=stream)
        assert told.code not in ("ok", "concurrency_limit_exceeded", "insufficient_credits")
        assert told.metadata["x-credits-charged"] == "0"
        assert told.metadata["x-credits-remaining"] == "0.005"
        assert told.metadata["x-ratelimit-remaining-concurrent"] == "2"
    balance = await house.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)
    assert not await house.records(caller)


@WAY
@HOW
@pytest.mark.parametrize("kind", ["tts", "image"])
async def test_a_failed_task_of_a_known_price_is_not_said_to_cost_it(
    house: RunningApp, kind: str, way: str, stream: bool
) -> None:
    caller = await house.account()
    field = "text" if kind == "tts" else "prompt"
    body = TASK_BODIES[kind] | {field: "[[error:provider_failed]]"}
    told = await house.ask(way, caller.test, body, stream=stream)
    assert told.code == "provider_failed"
    assert told.metadata["x-credits-charged"] == "0"
    assert told.metadata["x-credits-remaining"] == str(RICH // 10**6)


# --- what the vendor counts


@WAY
async def test_what_the_vendor_does_not_count_is_estimated_and_marked(house: RunningApp, way: str) -> None:
    caller = await house.account()
    prompt = f"uncounted {way} stream"
    house.upstream.when(prompt, Answer("five words are in here", usage=None))
    told = await house.ask(way, caller.live, text_body(prompt), stream=True)
    (record,) = await house.records(caller)
    assert record.source == "estimated"
    assert record.complete
    assert told.usage == (3, 5, 8)
    assert (record.input_tokens, record.output_tokens) == (3, 5)
    assert record.cost == 3 * 4 + 5 * 20


@WAY
@HOW
async def test_a_vendor_that_counts_more_than_was_held_makes_no_balance_negative(
    house: RunningApp, way: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await house.account(live=5_000)
    prompt = f"overrun {way} {stream}"
    usage = {"prompt_tokens": 100, "completion_tokens": 1_000, "total_tokens": 1_100}
    house.upstream.when(prompt, Answer("short", usage=usage))
    told = await house.ask(way, caller.live, text_body(prompt, max_tokens=10), stream=stream)
    assert told.code == "ok"
    (record,) = await house.records(caller)
    assert (record.cost, record.uncollected) == (5_000, 100 * 4 + 1_000 * 20 - 5_000)
    assert record.cost + record.uncollected == counted(record)
    (line,) = [entry for entry in caplog.records if "uncollected" in entry.getMessage()]
    assert line.levelname == "ERROR"
    for named in (caller.name, record.task_id, "0.0154 credits"):
        assert named in line.getMessage()
    balance = await house.balance(caller, live=True)
    assert (balance.available, balance.held) == (0, 0)
    assert told.metadata["x-credits-remaining"] == "0" or (stream and way != "grpc")
    assert (
        await house.ask(way, caller.live, text_body(prompt), stream=stream)
    ).code == "insufficient_credits"


@WAY
async def test_credits_are_never_overdrawn_by_many_at_once(house: RunningApp, way: str) -> None:
    caller = await house.account(test=40_000 * 7 + 39_999)
    answers = await asyncio.gather(*[house.ask(way, caller.test, TASK_BODIES["image"]) for _ in range(30)])
    assert sorted(told.code for told in answers) == ["insufficient_credits"] * 23 + ["ok"] * 7
    balance = await house.balance(caller)
    assert (balance.available, balance.held) == (39_999, 0)
