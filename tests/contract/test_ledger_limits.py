"""The limits of every store's ledger: what is refused, how many of many get through, and when windows end."""

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


# --- what is refused


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
    assert [held.task_id for held in await rig.store.drafts()] == ["a"]
    assert await is_lost(rig.store.settle(settlement("b")))
    # Not even its Idempotency-Key is known.
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
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.concurrency, standing.tokens) == (20, 20, 20_000)


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


# --- many at once


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
    asked = {"minimum": 1} | limit
    answers = await asyncio.gather(*(rig.store.reserve(request(f"t{n}", **asked)) for n in range(1_000)))
    taken = [answer for answer in answers if isinstance(answer, Reserved)]
    assert len(taken) == 37
    assert {answer.code for answer in answers if isinstance(answer, Refused)} == {code}
    assert len({taker.limit_status.requests for taker in taken}) == 37
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.concurrency) == (37, 37)
    assert standing.available == 1_000 - 37 * asked["minimum"]


async def test_credits_for_a_hundred_tasks_pay_exactly_a_hundred_of_a_thousand(rig):
    async def one(number: int) -> str:
        answer = await rig.store.reserve(request(f"t{number}", 10, 20))
        if isinstance(answer, Refused):
            return answer.code
        await rig.store.settle(settlement(f"t{number}", 10))
        return "done"

    outcomes = [await one(n) for n in range(50)]
    outcomes += await asyncio.gather(*(one(n) for n in range(50, 1_000)))
    # Where all is held by others one is refused that would have had a part of it a moment later.
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
    standing = await rig.store.limit_status(WALLET)
    assert (standing.requests, standing.requests_reset) == (0, 0)
    clock.passes(7)
    standing = (await rig.store.reserve(request("c", requests_limit=2))).limit_status
    assert (standing.requests, standing.requests_reset, standing.concurrency) == (1, 60, 3)


async def test_each_model_has_its_own_token_window(rig, clock):
    await rig.store.reserve(request("a", tokens=5, model="claude"))
    clock.passes(30)
    standing = (await rig.store.reserve(request("b", tokens=6, tokens_limit=10))).limit_status
    assert (standing.requests_reset, standing.tokens, standing.tokens_reset) == (30, 6, 60)
    clock.passes(31)
    assert (await rig.store.limit_status(WALLET, "claude")).tokens == 0
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.tokens, standing.tokens_reset) == (6, 29)
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


async def test_setting_the_clock_back_while_no_process_runs_locks_nobody_out(rig, clock):
    if not clock.jumping:
        pytest.skip("the clock of a server that went on")
    await rig.store.reserve(request("a", tokens=5))
    await rig.store.settle(settlement("a"))
    await rig.close()
    clock.jumps(-86_400)
    await rig.open()
    taken = await rig.store.reserve(request("b", requests_limit=1, tokens=5, tokens_limit=5))
    assert isinstance(taken, Reserved)
    assert taken.limit_status.requests_reset == 60


async def test_a_window_survives_a_restart(rig, clock):
    await run_task(rig.store, "a")
    await rig.close()
    clock.passes(10)
    await rig.open()
    answer = await rig.store.reserve(request("b", requests_limit=1))
    assert answer.code == "rate_limit_exceeded"
    assert answer.limit_status.requests_reset == 50
