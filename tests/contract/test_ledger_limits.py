"""The limits of every store's ledger: refusals, concurrent requests, and windows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.stores.ledger import IdempotencyKey, Refused, Reserved
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import (
    KEY,
    WALLET,
    Clock,
    Rig,
    balance,
    is_lost,
    refusal,
    request,
    run_task,
    settlement,
)
from tests.limits import limits, used

ALL = UsageQuery()


# --- refusals


LIMITED = [
    ("requests", {"requests_limit": 1}),
    ("concurrency", {"concurrency_limit": 1}),
    ("tokens:gpt-4", {"tokens_limit": 10}),
    ("insufficient_credits", {"minimum": 991}),
]


@pytest.mark.parametrize(("reason", "limit"), LIMITED)
async def test_a_refused_request_changes_nothing(rig: Rig, reason: str, limit: dict[str, Any]) -> None:
    await rig.store.reserve(request("a", 10, tokens=10))
    before = (await limits(rig.store, WALLET)).without_resets()
    answer = await rig.store.reserve(request("b", **{"tokens": 1, "idempotency_key": KEY, **limit}))
    assert isinstance(answer, Refused)
    assert (answer.counter or answer.code) == reason
    assert used(answer).without_resets() == before
    after = await limits(rig.store, WALLET)
    assert after.without_resets() == before
    assert [draft.task_id for draft in await rig.store.drafts()] == ["a"]
    assert await is_lost(rig.store.settle(settlement("b")))
    # Its Idempotency-Key is not stored either.
    other = IdempotencyKey(KEY.key, b"other")
    assert isinstance(await rig.store.reserve(request("c", idempotency_key=other)), Reserved)


async def test_the_first_of_several_reasons_is_returned(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10, tokens=10, idempotency_key=KEY))
    needs: dict[str, Any] = {
        "requests_limit": 1,
        "concurrency_limit": 1,
        "tokens_limit": 10,
        "tokens": 1,
        "minimum": 991,
    }
    other = IdempotencyKey(KEY.key, b"other")
    assert (
        await refusal(rig.store.reserve(request("b", idempotency_key=other, **needs)))
        == "idempotency_mismatch"
    )
    assert (
        await refusal(rig.store.reserve(request("b", idempotency_key=KEY, **needs))) == "idempotency_conflict"
    )
    for reason, limit in LIMITED:
        assert await refusal(rig.store.reserve(request("b", **needs))) == reason
        for name in limit:
            del needs[name]


async def test_usage_is_counted_without_limits(rig: Rig) -> None:
    for n in range(20):
        assert isinstance(await rig.store.reserve(request(f"t{n}", tokens=1_000)), Reserved)
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.concurrency, status.tokens) == (20, 20, 20_000)


async def test_a_limit_of_0_refuses_everything(rig: Rig) -> None:
    limits_of_0: list[dict[str, Any]] = [
        {"requests_limit": 0},
        {"concurrency_limit": 0},
        {"tokens_limit": 0, "tokens": 1},
    ]
    for limit in limits_of_0:
        assert isinstance(await rig.store.reserve(request("a", **limit)), Refused)


async def test_tokens_are_counted_for_each_model(rig: Rig) -> None:
    assert isinstance(await rig.store.reserve(request("a", tokens=90, tokens_limit=90)), Reserved)
    assert isinstance(
        await rig.store.reserve(request("b", tokens=90, tokens_limit=90, model="claude")), Reserved
    )
    assert await refusal(rig.store.reserve(request("c", tokens=1, tokens_limit=90))) == "tokens:gpt-4"
    assert (await limits(rig.store, WALLET, "claude")).tokens == 90
    assert (await limits(rig.store, WALLET, "nothing")).tokens == 0


# --- concurrent requests


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"requests_limit": 37}, "requests"),
        ({"concurrency_limit": 37}, "concurrency"),
        ({"tokens": 3, "tokens_limit": 37 * 3 + 2}, "tokens:gpt-4"),
        ({"minimum": 27}, "insufficient_credits"),
    ],
)
async def test_a_thousand_concurrent_requests_never_exceed_a_limit(
    rig: Rig, limit: dict[str, Any], reason: str
) -> None:
    needs: dict[str, Any] = {"minimum": 1, **limit}
    answers = await asyncio.gather(*(rig.store.reserve(request(f"t{n}", **needs)) for n in range(1_000)))
    reserved = [answer for answer in answers if isinstance(answer, Reserved)]
    assert len(reserved) == 37
    assert {answer.counter or answer.code for answer in answers if isinstance(answer, Refused)} == {reason}
    assert len({used(each).requests for each in reserved}) == 37
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.concurrency) == (37, 37)
    assert status.available == 1_000 - 37 * needs["minimum"]


async def test_credits_for_a_hundred_tasks_pay_exactly_a_hundred_of_a_thousand(rig: Rig) -> None:
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


async def test_a_window_starts_with_its_first_request_and_lasts_60_seconds(rig: Rig, clock: Clock) -> None:
    assert (await limits(rig.store, WALLET)).requests_reset == 0
    assert used(await rig.store.reserve(request("a", requests_limit=2))).requests_reset == 60
    clock.passes(59.5)
    assert used(await rig.store.reserve(request("b", requests_limit=2))).requests_reset == 0.5
    assert await refusal(rig.store.reserve(request("c", requests_limit=2))) == "requests"
    clock.passes(0.5)
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.requests_reset) == (0, 0)
    clock.passes(7)
    status = used(await rig.store.reserve(request("c", requests_limit=2)))
    assert (status.requests, status.requests_reset, status.concurrency) == (1, 60, 3)


async def test_each_model_has_its_own_token_window(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", tokens=5, model="claude"))
    clock.passes(30)
    status = used(await rig.store.reserve(request("b", tokens=6, tokens_limit=10)))
    assert (status.requests_reset, status.tokens, status.tokens_reset) == (30, 6, 60)
    clock.passes(31)
    assert (await limits(rig.store, WALLET, "claude")).tokens == 0
    status = await limits(rig.store, WALLET)
    assert (status.tokens, status.tokens_reset) == (6, 29)
    assert await refusal(rig.store.reserve(request("c", tokens=5, tokens_limit=10))) == "tokens:gpt-4"


@pytest.mark.parametrize("seconds", [-86_400, -30, 30, 86_400])
async def test_changing_the_clock_opens_and_closes_no_window(rig: Rig, clock: Clock, seconds: float) -> None:
    await rig.store.reserve(request("a"))
    clock.jumps(seconds)
    assert (await limits(rig.store, WALLET)).requests_reset == 60
    clock.passes(59)
    assert await refusal(rig.store.reserve(request("b", requests_limit=1))) == "requests"
    clock.passes(1)
    assert isinstance(await rig.store.reserve(request("b", requests_limit=1)), Reserved)


async def test_setting_the_clock_back_while_no_process_runs_blocks_no_account(rig: Rig, clock: Clock) -> None:
    if not clock.jumping:
        pytest.skip("the server's clock is not set back")
    await rig.store.reserve(request("a", tokens=5))
    await rig.store.settle(settlement("a"))
    await rig.close()
    clock.jumps(-86_400)
    await rig.open()
    reserved = await rig.store.reserve(request("b", requests_limit=1, tokens=5, tokens_limit=5))
    assert isinstance(reserved, Reserved)
    assert used(reserved).requests_reset == 60


async def test_a_window_survives_a_restart(rig: Rig, clock: Clock) -> None:
    await run_task(rig.store, "a")
    await rig.close()
    clock.passes(10)
    await rig.open()
    answer = await rig.store.reserve(request("b", requests_limit=1))
    assert isinstance(answer, Refused)
    assert answer.counter == "requests"
    assert used(answer).requests_reset == 50
