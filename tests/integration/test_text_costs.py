"""The cost of text tasks over all protocols: cached, cache-written and long input, impossible counts, callers who
leave before the vendor reports its counts, and tasks that share an account's credits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Answer, Gate, Received, Reply, Stop, anthropic_protocol
from tests.app import Account, RunningApp, run_app
from tests.calls import bearer
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM
from tests.integration.leaving import LeavingClient
from tests.tasks import PIXEL, text_body, to_task


@pytest.fixture(scope="module", name="app")
async def _app(
    store_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    async with run_app(
        tmp_path_factory.mktemp("bills"),
        settings={"anthropic_api_key": "anthropic-upstream", **store_settings},
    ) as opened:
        yield opened


def openai(prompt: int, completion: int, cached: Any = 0, written: Any = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
    }


def anthropic(
    prompt: int, output: int, cached: int = 0, written: int = 0, written_1h: int = 0
) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "output_tokens": output,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written - written_1h,
            "ephemeral_1h_input_tokens": written_1h,
        },
    }


BILLS = {
    "cached": ("gpt-4", openai(10_000, 10, 9_000), 7_800),
    "cached in part and written": ("gpt-4", openai(10_000, 10, 4_000, 5_000), 30_800),
    "long": ("gpt-4", openai(500_000, 1_000), 4_030_000),
    "longest short": ("gpt-4", openai(272_000, 1), 1_088_020),
    "shortest long": ("gpt-4", openai(272_001, 1), 2_176_038),
    "more cached than input": ("gpt-4", openai(1_000, 10, 5_000), 4_200),
    "cached below zero": ("gpt-4", openai(1_000, 10, -5), 4_200),
    "claude cached": ("claude-3-sonnet", anthropic(1_000, 10, 9_000), 5_850),
    "claude written": ("claude-3-opus", anthropic(1_000, 10, 0, 2_000, 1_000), 21_500),
    "claude long": ("claude-3-sonnet", anthropic(500_000, 1_000), 1_515_000),
}
"""Model, the vendor's counts, and the microcredits by the vendors' price lists of November 2026."""


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("bill", BILLS)
async def test_cost_follows_the_vendors_price_list(
    app: RunningApp, bill: str, protocol: str, stream: bool
) -> None:
    model, usage, micros = BILLS[bill]
    account = await app.account()
    prompt = f"<{bill}> {protocol} {stream}"
    answer: Any = anthropic_protocol.Answer if model.startswith("claude") else Answer
    app.upstream.when(prompt, answer("one two", usage=usage))
    outcome = await app.ask(protocol, account.live, text_body(prompt, model), stream=stream)
    assert outcome.code == "ok"
    # REST sends the headers before the end of a stream.
    assert "x-credits-charged" in outcome.metadata or (protocol != "grpc" and stream)
    record = await app.only_record(account, outcome)
    assert (record.cost, record.source) == (micros, "provider")


async def test_cached_and_cache_write_tokens_are_reported(app: RunningApp) -> None:
    account = await app.account()
    usage = openai(10_000, 10, 4_000, 5_000)
    app.upstream.when("parts", Answer("one two", usage=usage))
    parts = {"cached_tokens": 4_000, "cache_write_tokens": 5_000}
    answer = await app.post("rest", account.live, json=text_body("parts"))
    counts = {"prompt_tokens": 10_000, "completion_tokens": 10, "total_tokens": 10_010}
    assert (await answer.json())["usage"] == counts | {"prompt_tokens_details": parts}
    metadata = bearer(account.live)
    request = RunTaskRequest(spec=to_task(text_body("parts")))
    run = await TaskServiceStub(app.channel).RunTask(request, metadata=metadata)
    used = run.result.usage
    assert (used.cached_input_tokens, used.cache_write_input_tokens) == (4_000, 5_000)
    for protocol in ("rest", "remote"):
        for query, times in (("", 1), ("?group_by=model", 2)):
            row = (await app.get_json(protocol, account.live, f"/api/v1/usage{query}"))["data"][0]
            assert row["prompt_tokens_details"] == {name: n * times for name, n in parts.items()}
    listed = await AccountServiceStub(app.channel).ListUsage(ListUsageRequest(), metadata=metadata)
    record = listed.records[0]
    assert (record.usage.cached_input_tokens, record.usage.cache_write_input_tokens) == (4_000, 5_000)


IMPOSSIBLE = {
    "output": openai(5, 2**31 - 1),
    "input": openai(2**31 - 1, 5),
    "just above the input": openai(922_001, 5),
    "just above the output": openai(5, 128_001),
    "negative": openai(-1, 5),
}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("impossible", IMPOSSIBLE)
async def test_impossible_counts_are_estimated_and_logged(
    app: RunningApp, protocol: str, stream: bool, impossible: str, caplog: pytest.LogCaptureFixture
) -> None:
    account = await app.account(live=10_000_000)
    prompt = f"<impossible {impossible}> {protocol} {stream}"
    app.upstream.when(prompt, Answer("one two three", usage=IMPOSSIBLE[impossible]))
    with caplog.at_level(logging.WARNING, "pomelo"):
        outcome = await app.ask(protocol, account.live, text_body(prompt), stream=stream)
    assert (outcome.code, outcome.content) == ("ok", "one two three")
    record = await app.only_record(account)
    # Only impossible counts are estimated.
    assert (record.source, record.output_tokens) == ("estimated", 3 if "output" in impossible else 5)
    assert 0 < record.cost < 1_000
    assert "impossible counts" in caplog.text
    for line in caplog.records:
        if "impossible" in line.getMessage():
            fields = line.__dict__["fields"]
            assert (fields["request_id"], fields["task_id"]) == (record.request_id, record.task_id)
            assert (fields["provider"], fields["model"]) == ("openai", record.model)


# --- callers who leave


async def leave(app: RunningApp, protocol: str, account: Account, body: dict[str, Any]) -> None:
    """Streams a task, and disconnects after two chunks."""
    client = LeavingClient(app, protocol, account.live, body, stream=True)
    await client.has(2)
    await client.leave()
    await app.idle(account, live=True)


@PROTOCOL
async def test_a_leaving_caller_pays_for_the_input_and_its_images(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    prompt = f"images {protocol}"
    gate = Gate()
    app.upstream.when(prompt, Answer("one two three", at={2: gate}))
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": PIXEL}}] * 30
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": parts}]}
    await leave(app, protocol, account, body)
    record = await app.only_record(account)
    assert (record.complete, record.source) == (False, "estimated")
    assert record.input_tokens >= 30 * 1_000
    assert record.cost >= 120_000


@PROTOCOL
async def test_a_leaving_caller_pays_for_the_input_by_the_vendors_count(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account()
    prompt = f"counted before it is left {protocol}"
    gate = Gate()
    usage = anthropic(2_500, 99, 1_000, 500)
    app.upstream.when(prompt, anthropic_protocol.Answer("one two three", at={2: gate}, usage=usage))
    await leave(app, protocol, account, text_body(prompt, "claude-3-sonnet"))
    record = await app.only_record(account)
    assert (record.input_tokens, record.output_tokens) == (4_000, 2)
    assert (record.cached_input_tokens, record.cache_write_input_tokens) == (1_000, 500)
    assert record.cost == 2_500 * 3 + 300 + 1_875 + 30


@PROTOCOL
async def test_a_leaving_caller_pays_for_the_thinking_that_has_arrived(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account()
    prompt = f"thinking {protocol}"
    script = anthropic_protocol.Answer("one two three", thinking="hm, " * 20_000, at={2: Gate()})
    app.upstream.when(prompt, script)
    await leave(app, protocol, account, text_body(prompt, "claude-3-opus", reasoning_effort="max"))
    record = await app.only_record(account)
    assert record.output_tokens == (80_000 + len("one two")) // 8


@PROTOCOL
async def test_a_stream_cut_by_the_vendor_costs_the_input_it_counted(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    prompt = f"cut {protocol}"
    usage = anthropic(2_500, 99)
    app.upstream.when(prompt, anthropic_protocol.Answer("one two three", at={2: Stop.RESET}, usage=usage))
    outcome = await app.ask(protocol, account.live, text_body(prompt, "claude-3-sonnet"), stream=True)
    assert outcome.code == "provider_failed"
    (record,) = await app.records(account)
    assert record.input_tokens == 2_500


# --- tasks that share an account


@PROTOCOL
async def test_a_task_without_max_tokens_leaves_credits_for_the_plans_other_tasks(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("wide", live=1_000_000)  # two concurrent tasks
    gate = Gate()
    prompts = [f"open-ended {protocol} {number}" for number in range(2)]
    for prompt in prompts:
        app.upstream.when(prompt, Answer("one two three", at={1: gate}))
    clients = [
        LeavingClient(app, protocol, account.live, text_body(prompt), stream=True) for prompt in prompts
    ]
    for client in clients:
        await client.has(1)
    requests = [r for r in app.upstream.requests for prompt in prompts if prompt in r.prompt]
    sent = [request.body["max_completion_tokens"] for request in requests]
    assert all(24_000 < tokens < 25_000 for tokens in sent)  # half a credit each, at 20 credits a million
    gate.open()
    await asyncio.gather(*[client.task for client in clients])
    assert len(await app.records(account)) == 2
    await app.assert_audit_clean()


@PROTOCOL
async def test_a_task_without_max_tokens_gets_at_least_1024_if_the_balance_covers_them(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("all", live=50_000)  # fifty concurrent tasks: a share pays for fifty tokens
    prompt = f"enough {protocol}"
    assert (await app.ask(protocol, account.live, text_body(prompt))).code == "ok"
    (request,) = [r for r in app.upstream.requests if prompt in r.prompt]
    assert request.body["max_completion_tokens"] == 1_024


@PROTOCOL
@pytest.mark.parametrize("limit", [{}, {"max_tokens": 500}], ids=["open-ended", "limited"])
async def test_twenty_concurrent_tasks_on_the_balance_of_one_leave_nothing_uncollected(
    app: RunningApp, protocol: str, limit: dict[str, Any]
) -> None:
    account = await app.account(live=11_000)
    prompts = [f"twenty {protocol} {limit} {number}" for number in range(20)]
    for prompt in prompts:
        app.upstream.when(prompt, Answer("one two three", usage=openai(60, limit.get("max_tokens", 3))))
    asks = [app.ask(protocol, account.live, text_body(prompt, **limit), stream=True) for prompt in prompts]
    codes = [outcome.code for outcome in await asyncio.gather(*asks)]
    assert set(codes) == {"ok", "insufficient_credits"}
    records = await app.records(account)
    assert len(records) == codes.count("ok")
    assert sum(record.uncollected for record in records) == 0
    balance = await app.balance(account, live=True)
    assert (balance.held, balance.available) == (0, 11_000 - sum(record.cost for record in records))


@PROTOCOL_AND_STREAM
async def test_a_busy_vendor_that_answers_with_200_is_asked_again(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    prompt = f"<busy> {protocol} {stream}"
    asked = 0

    def answer(received: Received) -> Reply:
        nonlocal asked
        asked += 1
        if asked == 1:
            return Reply(steps=(anthropic_protocol.error_event().partition(b"data: ")[2].strip(),))
        return anthropic_protocol.Answer("one two", usage=anthropic(9, 2))(received)

    app.upstream.when(prompt, answer)
    outcome = await app.ask(protocol, account.live, text_body(prompt, "claude-3-haiku"), stream=stream)
    assert (outcome.code, asked) == ("ok", 2)
    assert (await app.only_record(account, outcome)).cost == 19
