"""The limits of every store's ledger: refusals, concurrent requests, and windows."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pomelo.stores.ledger import IdempotencyKey, Refused, Reserved
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import (
    MODEL,
    WALLET,
    clock,
    is_lost,
    refusal_code,
    request,
    rig,
    run_task,
    settlement,
)

__all__ = ["clock", "rig"]

KEY = IdempotencyKey("order-7", b"\x00digest")
ALL = UsageQuery()


async def balance(rig, wallet=WALLET) -> tuple[int, int, int]:
    found = await rig.store.balance(wallet)
    assert found.granted == found.spent + found.held + found.available
    return found.spent, found.held, found.available


# --- refusals


LIMITED = [
    ("rate_limit_exceeded", {"requests_limit": 1}),
    ("concurrency_limit_exceeded", {"concurrency_limit": 1}),
    ("token_limit_exceeded", {"tokens_limit": 10}),
    ("insufficient_credits", {"minimum": 991}),
]


@pytest.mark.parametrize(("code", "limit"), LIMITED)
async def test_a_refused_request_changes_nothing(rig, code, limit):
    await rig.store.reserve(request("a", 10, tokens=10))
    before = replace(await rig.store.limit_status(WALLET, MODEL), requests_reset=0, tokens_reset=0)
    answer = await rig.store.reserve(request("b", **{"tokens": 1, "idempotency_key": KEY} | limit))
    assert isinstance(answer, Refused)
    assert answer.code == code
    assert replace(answer.limit_status, requests_reset=0, tokens_reset=0) == before
    after = await rig.store.limit_status(WALLET, MODEL)
    assert replace(after, requests_reset=0, tokens_reset=0) == before
    assert [draft.task_id for draft in await rig.store.drafts()] == ["a"]
    assert await is_lost(rig.store.settle(settlement("b")))
    # Its Idempotency-Key is not stored either.
    other = IdempotencyKey(KEY.key, b"other")
    assert isinstance(await rig.store.reserve(request("c", idempotency_key=other)), Reserved)


async def test_the_first_of_several_reasons_is_returned(rig):
    await rig.store.reserve(request("a", 10, tokens=10, idempotency_key=KEY))
    limits = {"requests_limit": 1, "concurrency_limit": 1, "tokens_limit": 10, "tokens": 1, "minimum": 991}
    other = IdempotencyKey(KEY.key, b"other")
    assert (
        await refusal_code(rig.store.reserve(request("b", idempotency_key=other, **limits)))
        == "idempotency_mismatch"
    )
    assert (
        await refusal_code(rig.store.reserve(request("b", idempotency_key=KEY, **limits)))
        == "idempotency_conflict"
    )
    for code, limit in LIMITED:
        assert await refusal_code(rig.store.reserve(request("b", **limits))) == code
        for name in limit:
            del limits[name]


async def test_usage_is_counted_without_limits(rig):
    for n in range(20):
        assert isinstance(await rig.store.reserve(request(f"t{n}", tokens=1_000)), Reserved)
    status = await rig.store.limit_status(WALLET, MODEL)
    assert (status.requests, status.concurrency, status.tokens) == (20, 20, 20_000)


async def test_a_limit_of_0_refuses_everything(rig):
    for limit in ({"requests_limit": 0}, {"concurrency_limit": 0}, {"tokens_limit": 0, "tokens": 1}):
        assert isinstance(await rig.store.reserve(request("a", **limit)), Refused)


async def test_tokens_are_counted_for_each_model(rig):
    assert isinstance(await rig.store.reserve(request("a", tokens=90, tokens_limit=90)), Reserved)
    assert isinstance(
        await rig.store.reserve(request("b", tokens=90, tokens_limit=90, model="claude")), Reserved
    )
    assert (
        await refusal_code(rig.store.reserve(request("c", tokens=1, tokens_limit=90)))
        == "token_limit_exceeded"
    )
    assert (await rig.store.limit_status(WALLET, "claude")).tokens == 90
    assert (await rig.store.limit_status(WALLET, "nothing")).tokens == 0


# --- concurrent requests


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ({"requests_limit": 37}, "rate_limit_exceeded"),
        ({"concurrency_limit": 37}, "concurrency_limit_exceeded"),
        ({"tokens": 3, "tokens_limit": 37 * 3 + 2}, "token_limit_exceeded"),
        ({"minimum": 27}, "insufficient_credits"),
    ],
)
async def test_a_thousand_concurrent_requests_never_exceed_a_limit(rig, limit, code):
    needs = {"minimum": 1} | limit
    answers = await asyncio.gather(*(rig.store.reserve(request(f"t{n}", **needs)) for n in range(1_000)))
    reserved = [answer for answer in answers if isinstance(answer, Reserved)]
    assert len(reserved) == 37
    assert {answer.code for answer in answers if isinstance(answer, Refused)} == {code}
    assert len({each.limit_status.requests for each in reserved}) == 37
    status = await rig.store.limit_status(WALLET, MODEL)
    assert (status.requests, status.concurrency) == (37, 37)
    assert status.available == 1_000 - 37 * needs["minimum"]


async def test_credits_for_a_hundred_tasks_pay_exactly_a_hundred_of_a_thousand(rig):
    async def one(number: int) -> str:
        answer = await rig.store.reserve(request(f"t{number}", 10, 20))
        if isinstance(answer, Refused):
            return answer.code
        await rig.store.settle(settlement(f"t{number}", 10))
        return "done"

    outcomes = [await one(n) for n in range(50)]
    outcomes += await asyncio.gather(*(one(n) for n in range(50, 1_000)))
    # While others have reserved everything, a task is refused that could have run a moment later.
    while await balance(rig) != (1_000, 0, 0):
        outcomes.append(await one(len(outcomes)))
    assert outcomes.count("done") == 100
    assert set(outcomes) == {"done", "insufficient_credits"}
    assert sum(r.cost for r in (await rig.store.list_usage(ALL, limit=1_000))[0]) == 1_000


# --- windows


async def test_a_window_starts_with_its_first_request_and_lasts_60_seconds(rig, clock):
    assert (await rig.store.limit_status(WALLET)).requests_reset == 0
    assert (await rig.store.reserve(request("a", requests_limit=2))).limit_status.requests_reset == 60
    clock.passes(59.5)
    assert (await rig.store.reserve(request("b", requests_limit=2))).limit_status.requests_reset == 0.5
    assert await refusal_code(rig.store.reserve(request("c", requests_limit=2))) == "rate_limit_exceeded"
    clock.passes(0.5)
    status = await rig.store.limit_status(WALLET)
    assert (status.requests, status.requests_reset) == (0, 0)
    clock.passes(7)
    status = (await rig.store.reserve(request("c", requests_limit=2))).limit_status
    assert (status.requests, status.requests_reset, status.concurrency) == (1, 60, 3)


async def test_each_model_has_its_own_token_window(rig, clock):
    await rig.store.reserve(request("a", tokens=5, model="claude"))
    clock.passes(30)
    status = (await rig.store.reserve(request("b", tokens=6, tokens_limit=10))).limit_status
    assert (status.requests_reset, status.tokens, status.tokens_reset) == (30, 6, 60)
    clock.passes(31)
    assert (await rig.store.limit_status(WALLET, "claude")).tokens == 0
    status = await rig.store.limit_status(WALLET, MODEL)
    assert (status.tokens, status.tokens_reset) == (6, 29)
    assert (
        await refusal_code(rig.store.reserve(request("c", tokens=5, tokens_limit=10)))
        == "token_limit_exceeded"
    )


@pytest.mark.parametrize("seconds", [-86_400, -30, 30, 86_400])
async def test_changing_the_clock_opens_and_closes_no_window(rig, clock, seconds):
    await rig.store.reserve(request("a"))
    clock.jumps(seconds)
    assert (await rig.store.limit_status(WALLET)).requests_reset == 60
    clock.passes(59)
    assert await refusal_code(rig.store.reserve(request("b", requests_limit=1))) == "rate_limit_exceeded"
    clock.passes(1)
    assert isinstance(await rig.store.reserve(request("b", requests_limit=1)), Reserved)


async def test_setting_the_clock_back_while_no_process_runs_blocks_no_account(rig, clock):
    if not clock.jumping:
        pytest.skip("the server's clock is not set back")
    await rig.store.reserve(request("a", tokens=5))
    await rig.store.settle(settlement("a"))
    await rig.close()
    clock.jumps(-86_400)
    await rig.open()
    reserved = await rig.store.reserve(request("b", requests_limit=1, tokens=5, tokens_limit=5))
    assert isinstance(reserved, Reserved)
    assert reserved.limit_status.requests_reset == 60


async def test_a_window_survives_a_restart(rig, clock):
    await run_task(rig.store, "a")
    await rig.close()
    clock.passes(10)
    await rig.open()
    answer = await rig.store.reserve(request("b", requests_limit=1))
    assert answer.code == "rate_limit_exceeded"
    assert answer.limit_status.requests_reset == 50
