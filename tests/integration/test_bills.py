"""Bills of text over the real protocols: cached, cache-written and long input, impossible counts, answers that
are left before the vendor's count came, and tasks that share what an account has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.accounts.audit import audit
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.stores.base import Store
from pomelo.testing import Answer, Gate, Stop, anthropic_wire
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.integration.test_disconnects import Client, free
from tests.redis_server import RedisServer
from tests.tasks import text_body, to_task

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


@pytest.fixture(scope="module", name="house", params=["sqlite", "redis"])
async def _house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("bills")
    settings: dict[str, Any] = {"anthropic_api_key": "a-x"}
    if request.param == "sqlite":
        async with run_app(folder, settings=settings) as opened:
            yield opened
        return
    with RedisServer() as server:
        async with run_app(folder, settings=settings | {"store": server.url}) as opened:
            yield opened


async def check_books(store: Store) -> None:
    """Every bill is what its counts and prices text_body, and nothing is held."""
    found = await audit(store)
    assert not found.findings
    assert found.uncollected_micros == 0


def openai(prompt: int, completion: int, cached: Any = 0, written: Any = 0) -> dict[str, Any]:
    """Counts as OpenAI gives them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
    }


def anthropic(given: int, output: int, cached: int = 0, written: int = 0, an_hour: int = 0) -> dict[str, Any]:
    """Counts as Anthropic gives them."""
    return {
        "input_tokens": given,
        "output_tokens": output,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written - an_hour,
            "ephemeral_1h_input_tokens": an_hour,
        },
    }


BILLS = {
    "cached": ("gpt-4", openai(10_000, 10, 9_000), 7_800),
    "cached in part and written": ("gpt-4", openai(10_000, 10, 4_000, 5_000), 30_800),
    "long": ("gpt-4", openai(500_000, 1_000), 4_030_000),
    "last of the short": ("gpt-4", openai(272_000, 1), 1_088_020),
    "first of the long": ("gpt-4", openai(272_001, 1), 2_176_038),
    "more cached than there is": ("gpt-4", openai(1_000, 10, 5_000), 4_200),
    "cached below zero": ("gpt-4", openai(1_000, 10, -5), 4_200),
    "claude cached": ("claude-3-sonnet", anthropic(1_000, 10, 9_000), 5_850),
    "claude written": ("claude-3-opus", anthropic(1_000, 10, 0, 2_000, 1_000), 21_500),
    "claude long": ("claude-3-sonnet", anthropic(500_000, 1_000), 1_515_000),
}
"""Model, what the vendor counts, and microcredits by the vendors' price lists of November 2026."""


@WAY
@HOW
@pytest.mark.parametrize("bill", BILLS)
async def test_a_bill_is_that_of_the_vendors_price_list(
    house: RunningApp, bill: str, way: str, stream: bool
) -> None:
    model, usage, micros = BILLS[bill]
    caller = await house.account()
    prompt = f"<{bill}> {way} {stream}"
    wire: Any = anthropic_wire.Answer if model.startswith("claude") else Answer
    house.upstream.when(prompt, wire("one two", usage=usage))
    told = await house.ask(way, caller.live, text_body(prompt, model), stream=stream)
    assert told.code == "ok"
    if way == "grpc" or not stream:  # the headers of REST have gone before the end of a stream
        assert round(float(told.metadata["x-credits-charged"]) * 10**6) == micros
    (record,) = await house.records(caller)
    assert (record.cost, record.uncollected, record.source) == (micros, 0, "provider")
    assert (await house.balance(caller, live=True)).spent == micros
    await check_books(house.server.store)


async def test_the_parts_of_the_input_are_shown(house: RunningApp) -> None:
    caller = await house.account()
    usage = openai(10_000, 10, 4_000, 5_000)
    house.upstream.when("parts", Answer("one two", usage=usage))
    parts = {"cached_tokens": 4_000, "cache_write_tokens": 5_000}
    given = {"Authorization": f"Bearer {caller.live}"}
    async with house.session.post(
        f"{house.urls['rest']}/api/v1/task", json=text_body("parts"), headers=given
    ) as answer:
        assert (await answer.json())["usage"] == {
            "prompt_tokens": 10_000,
            "completion_tokens": 10,
            "total_tokens": 10_010,
            "prompt_tokens_details": parts,
        }
    metadata = [("authorization", f"Bearer {caller.live}")]
    run = TaskServiceStub(house.channel).RunTask(
        RunTaskRequest(task=to_task(text_body("parts"))), metadata=metadata
    )
    result = (await run).result.text.usage
    assert (result.cached_prompt_tokens, result.cache_write_prompt_tokens) == (4_000, 5_000)
    for way in ("rest", "remote"):
        for query, times in (("", 1), ("?group_by=model", 2)):
            url = f"{house.urls[way]}/api/v1/usage{query}"
            async with house.session.get(url, headers=given) as answer:
                row = (await answer.json())["data"][0]
                assert row["prompt_tokens_details"] == {name: n * times for name, n in parts.items()}
    listed = await AccountServiceStub(house.channel).ListUsage(ListUsageRequest(), metadata=metadata)
    record = listed.records[0]
    assert (record.cached_input_tokens, record.cache_write_input_tokens) == (4_000, 5_000)


ABSURD = {
    "output": openai(5, 2**31 - 1),
    "input": openai(2**31 - 1, 5),
    "just above the input": openai(922_001, 5),
    "just above the output": openai(5, 128_001),
    "negative": openai(-1, 5),
}


@WAY
@HOW
@pytest.mark.parametrize("absurd", ABSURD)
async def test_a_count_that_can_not_be_true_is_estimated_and_logged(
    house: RunningApp, way: str, stream: bool, absurd: str, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await house.account(live=10_000_000)
    prompt = f"<absurd {absurd}> {way} {stream}"
    house.upstream.when(prompt, Answer("one two three", usage=ABSURD[absurd]))
    with caplog.at_level(logging.WARNING, "pomelo"):
        told = await house.ask(way, caller.live, text_body(prompt), stream=stream)
    assert (told.code, told.content) == ("ok", "one two three")
    (record,) = await house.records(caller)
    # Only what can't be true is estimated.
    assert (record.source, record.output_tokens) == (
        "estimated",
        3 if "output" in absurd else 5,
    )
    assert 0 < record.cost < 1_000
    assert "impossible counts" in caplog.text
    await check_books(house.server.store)


# --- answers that are left


@WAY
async def test_who_leaves_pays_for_the_input_and_its_pictures(house: RunningApp, way: str) -> None:
    caller = await house.account()
    prompt = f"pictures {way}"
    gate = Gate()
    house.upstream.when(prompt, Answer("one two three", at={2: gate}))
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": PIXEL}}] * 30
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": parts}]}
    client = Client(house, way, caller.live, body, stream=True)
    await client.has(2)
    await client.leave()
    await free(house, caller)
    (record,) = await house.records(caller)
    assert (record.complete, record.source) == (False, "estimated")
    assert record.input_tokens >= 30 * 1_000
    assert record.cost >= 120_000
    await check_books(house.server.store)


@WAY
async def test_who_leaves_pays_for_the_input_as_the_vendor_has_counted_it(
    house: RunningApp, way: str
) -> None:
    caller = await house.account()
    prompt = f"counted before it is left {way}"
    gate = Gate()
    usage = anthropic(2_500, 99, 1_000, 500)
    house.upstream.when(prompt, anthropic_wire.Answer("one two three", at={2: gate}, usage=usage))
    client = Client(house, way, caller.live, text_body(prompt, "claude-3-sonnet"), stream=True)
    await client.has(2)
    await client.leave()
    await free(house, caller)
    (record,) = await house.records(caller)
    assert (record.input_tokens, record.output_tokens) == (4_000, 2)
    assert (record.cached_input_tokens, record.cache_write_input_tokens) == (1_000, 500)
    assert record.cost == 2_500 * 3 + 300 + 1_875 + 30
    await check_books(house.server.store)


@WAY
async def test_a_stream_that_the_vendor_cuts_costs_the_input_that_it_counted(
    house: RunningApp, way: str
) -> None:
    caller = await house.account()
    prompt = f"cut {way}"
    usage = anthropic(2_500, 99)
    house.upstream.when(prompt, anthropic_wire.Answer("one two three", at={2: Stop.RESET}, usage=usage))
    told = await house.ask(way, caller.live, text_body(prompt, "claude-3-sonnet"), stream=True)
    assert told.code == "provider_failed"
    (record,) = await house.records(caller)
    assert record.input_tokens == 2_500


# --- tasks that share an account


async def many(house: RunningApp, way: str, caller: Account, prompts: list[str], **more: Any) -> list[str]:
    """The codes of tasks that are asked for at once."""
    asked = [house.ask(way, caller.live, text_body(prompt, **more), stream=True) for prompt in prompts]
    return sorted([told.code for told in await asyncio.gather(*asked)])


@WAY
async def test_an_open_ended_task_leaves_room_for_the_others_of_its_plan(house: RunningApp, way: str) -> None:
    caller = await house.account("wide", live=1_000_000)  # two at a time
    gate = Gate()
    prompts = [f"open-ended {way} {number}" for number in range(2)]
    for prompt in prompts:
        house.upstream.when(prompt, Answer("one two three", at={1: gate}))
    clients = [Client(house, way, caller.live, text_body(prompt), stream=True) for prompt in prompts]
    for client in clients:
        await client.has(1)
    sent = [r.body["max_completion_tokens"] for r in house.upstream.requests if prompts[0] in r.prompt]
    sent += [r.body["max_completion_tokens"] for r in house.upstream.requests if prompts[1] in r.prompt]
    assert all(24_000 < tokens < 25_000 for tokens in sent)  # half a credit each, at 20 a million
    gate.open()
    await asyncio.gather(*[client.task for client in clients])
    assert len(await house.records(caller)) == 2
    await check_books(house.server.store)


@WAY
async def test_an_open_ended_task_has_at_least_1024_tokens_where_the_balance_covers_them(
    house: RunningApp, way: str
) -> None:
    caller = await house.account("all", live=50_000)  # fifty at a time: a share pays for fifty tokens
    prompt = f"enough {way}"
    assert (await house.ask(way, caller.live, text_body(prompt))).code == "ok"
    (request,) = [r for r in house.upstream.requests if prompt in r.prompt]
    assert request.body["max_completion_tokens"] == 1_024


@WAY
@pytest.mark.parametrize("limit", [{}, {"max_tokens": 500}], ids=["open-ended", "limited"])
async def test_twenty_at_once_on_the_balance_of_one_leave_nothing_uncollected(
    house: RunningApp, way: str, limit: dict[str, int]
) -> None:
    caller = await house.account(live=11_000)
    prompts = [f"twenty {way} {limit} {number}" for number in range(20)]
    for prompt in prompts:
        house.upstream.when(prompt, Answer("one two three", usage=openai(60, limit.get("max_tokens", 3))))
    codes = await many(house, way, caller, prompts, **limit)
    assert set(codes) == {"ok", "insufficient_credits"}
    records = await house.records(caller)
    assert len(records) == codes.count("ok")
    assert sum(record.uncollected for record in records) == 0
    balance = await house.balance(caller, live=True)
    assert (balance.held, balance.available) == (0, 11_000 - sum(record.cost for record in records))
