"""Idempotency-Keys in every store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer, Reserved
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import (
    KEY,
    WALLET,
    Clock,
    Rig,
    balance,
    refusal,
    request,
    settlement,
)
from tests.limits import used

ALL = UsageQuery()
DAY = 24 * 3600.0


async def test_the_same_request_while_the_first_is_running_is_a_conflict(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    assert await refusal(rig.store.reserve(request("b", idempotency_key=KEY))) == "idempotency_conflict"
    assert await balance(rig) == (0, 10, 990)


async def test_a_key_of_another_request_is_a_mismatch_before_and_after_its_end(rig: Rig) -> None:
    other = IdempotencyKey(KEY.key, b"other")
    await rig.store.reserve(request("a", idempotency_key=KEY))
    assert await refusal(rig.store.reserve(request("b", idempotency_key=other))) == "idempotency_mismatch"
    await rig.store.settle(settlement("a", answer=b"hello"))
    assert await refusal(rig.store.reserve(request("b", idempotency_key=other))) == "idempotency_mismatch"


async def test_an_answer_is_replayed_even_if_every_limit_is_exceeded(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    settled = await rig.store.settle(settlement("a", 10, answer=b"\x00\xffanswer", at=5.5))
    needs: dict[str, Any] = {
        "requests_limit": 0,
        "concurrency_limit": 0,
        "tokens": 1,
        "tokens_limit": 0,
        "minimum": 10**9,
    }
    for task in ("b", "a"):
        answer = await rig.store.reserve(request(task, idempotency_key=KEY, **needs))
        assert isinstance(answer, ReplayedAnswer)
        assert (answer.record, answer.answer) == (settled.record, b"\x00\xffanswer")
        assert (used(answer).requests, used(answer).available) == (1, 990)
    assert await balance(rig) == (10, 0, 990)


async def test_a_replayed_answer_has_the_cost_that_was_charged(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    settled = await rig.store.settle(settlement("a", 1_003, answer=b"hello"))
    answer = await rig.store.reserve(request("b", idempotency_key=KEY))
    assert isinstance(answer, ReplayedAnswer)
    assert answer.record == settled.record
    assert (answer.record.cost, answer.record.uncollected) == (1_000, 3)


async def test_an_empty_answer_is_replayed(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a", answer=b""))
    answer = await rig.store.reserve(request("b", idempotency_key=KEY))
    assert isinstance(answer, ReplayedAnswer)
    assert answer.answer == b""


async def test_a_settlement_without_answer_or_a_void_frees_the_key(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a"))
    await rig.store.reserve(request("b", idempotency_key=IdempotencyKey(KEY.key, b"second")))
    await rig.store.void(WALLET, "b")
    assert isinstance(
        await rig.store.reserve(request("c", idempotency_key=IdempotencyKey(KEY.key, b"third"))), Reserved
    )


async def test_an_answer_without_a_key_is_not_stored(rig: Rig) -> None:
    await rig.store.reserve(request("a"))
    await rig.store.settle(settlement("a", answer=b"hello"))
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), Reserved)


async def test_one_of_many_concurrent_requests_with_one_key_runs(rig: Rig) -> None:
    answers = await asyncio.gather(
        *(rig.store.reserve(request(f"t{n}", idempotency_key=KEY)) for n in range(100))
    )
    assert sum(isinstance(answer, Reserved) for answer in answers) == 1
    assert await balance(rig) == (0, 10, 990)


async def test_an_answer_is_stored_for_24_hours(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    clock.passes(100)
    await rig.store.settle(settlement("a", answer=b"hello"))
    clock.passes(DAY - 0.5)
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), ReplayedAnswer)
    clock.passes(0.5)
    reserved = await rig.store.reserve(request("b", idempotency_key=IdempotencyKey(KEY.key, b"other")))
    assert isinstance(reserved, Reserved)
    assert await refusal(rig.store.reserve(request("c", idempotency_key=KEY))) == "idempotency_mismatch"


async def test_an_answer_is_stored_for_24_hours_although_the_clock_was_behind_at_the_start(
    rig: Rig, clock: Clock
) -> None:
    clock.jumps(2 * DAY)
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a", answer=b"hello", at=clock.wall))
    clock.passes(DAY - 1)
    await rig.crash()
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), ReplayedAnswer)
    clock.passes(1)
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), Reserved)


async def test_an_answer_is_not_stored_longer_although_the_clock_was_ahead_for_a_moment(
    rig: Rig, clock: Clock
) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a", answer=b"hello", at=clock.wall + 100 * DAY))
    await rig.crash()
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), ReplayedAnswer)
    clock.passes(DAY)
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), Reserved)


async def test_a_key_that_is_used_again_after_24_hours_has_the_later_answer(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a", 3, answer=b"earlier"))
    clock.passes(DAY + 1)
    other = IdempotencyKey(KEY.key, b"other")
    await rig.store.reserve(request("b", idempotency_key=other))
    await rig.store.settle(settlement("b", 5, answer=b"later"))
    clock.passes(DAY - 1)
    replayed = await rig.store.reserve(request("c", idempotency_key=other))
    assert isinstance(replayed, ReplayedAnswer)
    assert (replayed.answer, replayed.record.task_id, replayed.record.cost) == (b"later", "b", 5)


@pytest.mark.parametrize("settled", [False, True])
async def test_each_wallet_has_its_own_keys(rig: Rig, settled: bool) -> None:
    await rig.store.grant(Grant("test", Wallet(WALLET.account, False), 1_000, 1.0))
    await rig.store.reserve(request("test", idempotency_key=KEY, live=False))
    if settled:
        await rig.store.settle(settlement("test", answer=b"hello", live=False))
    assert isinstance(await rig.store.reserve(request("a", idempotency_key=KEY)), Reserved)


async def test_the_key_of_a_task_that_runs_longer_than_24_hours_is_not_free(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    clock.passes(DAY * 2)
    assert await refusal(rig.store.reserve(request("b", idempotency_key=KEY))) == "idempotency_conflict"


async def test_an_answer_survives_a_restart(rig: Rig) -> None:
    await rig.store.reserve(request("a", idempotency_key=KEY))
    await rig.store.settle(settlement("a", answer=b"hello"))
    await rig.close()
    await rig.open()
    assert isinstance(await rig.store.reserve(request("b", idempotency_key=KEY)), ReplayedAnswer)
