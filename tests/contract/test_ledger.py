"""The ledger role of every store: reservations, settlements, voids, repeated and cancelled calls."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable
from typing import Any

import pytest

from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.ledger import DEFAULT_SHARES, Reserved, Settled
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import (
    KEY,
    WALLET,
    Clock,
    Rig,
    amount,
    balance,
    error_code,
    is_lost,
    record,
    refusal,
    request,
    run_task,
    settlement,
    wallets,
)
from tests.limits import WINDOW, Used, limits, used

ALL = UsageQuery()


# --- reserving


async def test_reserving_counts_a_request_a_concurrent_task_tokens_and_credits(rig: Rig) -> None:
    reserved = await rig.store.reserve(
        request("a", 100, 300, tokens=50, requests_limit=5, tokens_limit=90, concurrency_limit=3)
    )
    assert isinstance(reserved, Reserved)
    assert reserved.amount == 300
    status = used(reserved)
    assert (status.available, status.requests, status.concurrency, status.tokens) == (700, 1, 1, 50)
    assert 0 < status.requests_reset <= WINDOW
    assert 0 < status.tokens_reset <= WINDOW
    assert await balance(rig) == (0, 300, 700)


async def test_all_available_credits_are_reserved_if_they_cover_the_minimum(rig: Rig) -> None:
    assert await amount(rig.store.reserve(request("a", 1_000, 5_000))) == 1_000
    assert await refusal(rig.store.reserve(request("b", 1))) == "insufficient_credits"


async def test_a_task_may_need_more_than_any_balance(rig: Rig) -> None:
    assert await refusal(rig.store.reserve(request("a", 10**18))) == "insufficient_credits"
    assert await amount(rig.store.reserve(request("b", 10, 10**18, sufficient=10**17))) == 1_000


@pytest.mark.parametrize(("minimum", "expected"), [(999, 1_000), (1_000, 1_000), (1_001, None)])
async def test_one_microcredit_too_few_is_refused(rig: Rig, minimum: int, expected: int | None) -> None:
    answer = await rig.store.reserve(request("a", minimum, 2_000))
    assert getattr(answer, "amount", None) == expected


async def test_with_a_sufficient_amount_a_task_reserves_an_equal_share_for_each_task_that_may_start(
    rig: Rig,
) -> None:
    needs: dict[str, Any] = {"minimum": 1, "maximum": 5_000, "sufficient": 10, "concurrency_limit": 4}
    amounts = [await amount(rig.store.reserve(request(f"t{n}", **needs))) for n in range(4)]
    assert amounts == [250, 250, 250, 250]


async def test_a_share_is_limited_by_the_sufficient_the_minimum_and_the_maximum_amount(rig: Rig) -> None:
    for changes, expected in (
        ({"maximum": 50}, 50),
        ({"concurrency_limit": 6}, 166),  # rounded down
        ({"minimum": 300}, 300),
        ({"sufficient": 400}, 400),
        ({"sufficient": 0}, 1_000),
    ):
        needs: dict[str, Any] = {"minimum": 1, "maximum": 5_000, "sufficient": 10, "concurrency_limit": 4}
        needs |= changes
        assert await amount(rig.store.reserve(request("a", **needs))) == expected
        assert (await balance(rig))[1] == expected
        await rig.store.void(WALLET, "a")
    needs = {"minimum": 1, "maximum": 5_000, "sufficient": 400, "concurrency_limit": 4}
    assert [await amount(rig.store.reserve(request(f"t{n}", **needs))) for n in range(3)] == [400, 400, 200]
    assert await refusal(rig.store.reserve(request("t3", **needs))) == "insufficient_credits"


async def test_without_a_concurrency_limit_the_balance_has_a_fixed_number_of_shares(rig: Rig) -> None:
    assert await amount(rig.store.reserve(request("a", 1, 5_000, sufficient=1))) == 1_000 // DEFAULT_SHARES


async def test_a_free_task_runs_without_credits(rig: Rig) -> None:
    empty = Wallet("acme", False)
    reserved = await rig.store.reserve(request("a", 0, live=False))
    assert isinstance(reserved, Reserved)
    assert reserved.amount == 0
    assert await rig.store.balance(empty) == Balance()
    assert (await rig.store.settle(settlement("a", 0, live=False))).record.cost == 0
    assert empty in await wallets(rig.store)


async def test_modes_and_accounts_have_separate_limits_and_credits(rig: Rig) -> None:
    await rig.store.add_account("other", "pro", 1.0)
    for number, wallet in enumerate((Wallet("acme", False), Wallet("other", True))):
        await rig.store.grant(Grant(f"g{number}", wallet, 50, 1.0))
    owners: tuple[dict[str, Any], ...] = ({}, {"live": False}, {"account": "other"})
    for number, who in enumerate(owners):
        new = request(
            f"t{number}", 50, requests_limit=1, concurrency_limit=1, tokens=5, tokens_limit=5, **who
        )
        assert isinstance(await rig.store.reserve(new), Reserved)
    assert await balance(rig) == (0, 50, 950)


# --- settling


async def test_a_settlement_charges_the_cost_releases_the_rest_and_writes_the_record(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10, 300))
    complete = settlement(
        "a", 120, provider="openai", provider_model="gpt-4-0613", input_tokens=7, output_tokens=2**40, characters=3,
        images=4, pixels=5, audio_ms=6, processing_ms=8, first_byte_ms=9, output_bytes=10, prices="image=5,x=1",
        price_version="2026-11", source="estimated", complete=False, at=1234.5,
    )  # fmt: skip
    settled = await rig.store.settle(complete)
    assert settled.record == complete.record
    assert (used(settled).available, used(settled).concurrency) == (880, 0)
    assert await balance(rig) == (120, 0, 880)
    assert await rig.store.drafts() == []
    assert await rig.store.list_usage(ALL, limit=9) == ([complete.record], "")


async def test_a_cost_above_the_reservation_is_charged_to_the_available_credits(rig: Rig) -> None:
    await rig.store.reserve(request("a", 100))
    settled = await rig.store.settle(settlement("a", 1_000))
    assert (settled.record.cost, settled.record.uncollected) == (1_000, 0)
    assert await balance(rig) == (1_000, 0, 0)


async def test_a_cost_above_the_available_credits_is_uncollected_and_leaves_other_reservations_alone(
    rig: Rig,
) -> None:
    await rig.store.reserve(request("other", 500))
    await rig.store.reserve(request("a", 100))
    settled = await rig.store.settle(settlement("a", 701))
    assert (settled.record.cost, settled.record.uncollected) == (500, 201)
    assert await balance(rig) == (500, 500, 0)
    [stored], _ = await rig.store.list_usage(ALL, limit=9)
    assert stored == settled.record


async def test_tokens_of_the_settlement_replace_the_reserved_tokens(rig: Rig) -> None:
    await rig.store.reserve(request("a", tokens=100))
    await rig.store.reserve(request("b", tokens=100))
    assert used(await rig.store.settle(settlement("a", tokens=30))).tokens == 130
    assert used(await rig.store.settle(settlement("b", tokens=400))).tokens == 430


async def test_a_task_without_reserved_tokens_and_token_limit_counts_no_tokens(rig: Rig) -> None:
    await rig.store.reserve(request("a", tokens=100))
    await rig.store.reserve(request("b"))
    assert used(await rig.store.settle(settlement("b", tokens=30))).tokens == 100
    await rig.store.reserve(request("c", tokens_limit=100))
    assert used(await rig.store.settle(settlement("c", tokens=30))).tokens == 130


async def test_tokens_of_an_ended_window_change_nothing(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", tokens=100))
    clock.passes(60)
    await rig.store.reserve(request("b", tokens=5))
    assert used(await rig.store.settle(settlement("a", tokens=30))).tokens == 5
    clock.passes(60)
    assert used(await rig.store.settle(settlement("b", tokens=30))).tokens == 0


async def test_a_settlement_does_not_return_the_request(rig: Rig) -> None:
    await run_task(rig.store, "a")
    assert await refusal(rig.store.reserve(request("b", requests_limit=1))) == "requests"


async def test_a_task_without_a_reservation_can_not_be_settled(rig: Rig) -> None:
    assert await is_lost(rig.store.settle(settlement("a")))
    await rig.store.reserve(request("b"))
    assert await is_lost(rig.store.settle(settlement("b", live=False)))
    assert (await rig.store.list_usage(ALL, limit=9))[0] == []
    assert await balance(rig) == (0, 10, 990)


# --- voiding


async def test_a_voided_task_costs_nothing_and_its_request_counts(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10, tokens=40))
    await rig.store.void(WALLET, "a")
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.concurrency, status.tokens, status.available) == (1, 0, 40, 1_000)
    assert await balance(rig) == (0, 0, 1_000)
    assert await is_lost(rig.store.settle(settlement("a")))


async def test_a_refund_returns_the_request_and_the_tokens(rig: Rig) -> None:
    await rig.store.reserve(request("a", tokens=40))
    await rig.store.reserve(request("b", tokens=2))
    await rig.store.void(WALLET, "a", refund=True)
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.concurrency, status.tokens, status.available) == (1, 1, 2, 990)
    assert isinstance(
        await rig.store.reserve(request("c", requests_limit=2, tokens=1, tokens_limit=3)), Reserved
    )


async def test_a_refund_for_an_ended_window_does_not_change_the_next_one(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", tokens=40))
    clock.passes(60)
    await rig.store.reserve(request("b", tokens=2))
    await rig.store.void(WALLET, "a", refund=True)
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.tokens, status.concurrency) == (1, 2, 1)


@pytest.mark.parametrize("refund", [False, True])
async def test_a_voided_task_can_be_reserved_again_and_is_settled_once(rig: Rig, refund: bool) -> None:
    await rig.store.reserve(request("a", 10, 300))
    await rig.store.void(WALLET, "a", refund=refund)
    assert await amount(rig.store.reserve(request("a", 10, 200))) == 200
    settled = await rig.store.settle(settlement("a", 120))
    assert (settled.record.cost, used(settled).available) == (120, 880)
    assert await rig.store.settle(settlement("a", 50)) == settled
    assert await balance(rig) == (120, 0, 880)


async def test_voiding_without_a_reservation_does_nothing(rig: Rig) -> None:
    await run_task(rig.store, "done")
    await rig.store.reserve(request("a"))
    before = await limits(rig.store, WALLET)
    for refund in (False, True):
        await rig.store.void(WALLET, "nothing", refund=refund)
        await rig.store.void(WALLET, "done", refund=refund)
        await rig.store.void(Wallet("acme", False), "a", refund=refund)
    after = await limits(rig.store, WALLET)
    assert after._replace(requests_reset=0) == before._replace(requests_reset=0)


# --- repeated calls after an unknown outcome


async def test_a_repeated_reserve_reserves_nothing_more(rig: Rig) -> None:
    same = request(
        "a", 10, 300, tokens=5, requests_limit=1, concurrency_limit=1, tokens_limit=5, idempotency_key=KEY
    )
    first = await rig.store.reserve(same)
    again = await rig.store.reserve(same)
    assert isinstance(first, Reserved)
    assert isinstance(again, Reserved)
    assert again.amount == first.amount == 300
    assert used(again).without_resets() == Used(700, 1, 0, 1, 5)
    assert await balance(rig) == (0, 300, 700)


async def test_a_repeated_settlement_returns_the_first_result(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10))
    first = await rig.store.settle(settlement("a", 1_200))
    for again in (settlement("a", 1_200), settlement("a", 5)):
        answer = await rig.store.settle(again)
        assert isinstance(answer, Settled)
        assert answer.record == first.record
    assert await balance(rig) == (1_000, 0, 0)
    assert len((await rig.store.list_usage(ALL, limit=9))[0]) == 1


async def test_a_reserve_that_is_repeated_while_its_task_ends_reserves_nothing(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10))
    settling = rig.store.settle(settlement("a", 7))
    assert await is_lost(rig.store.reserve(request("a", 10)))
    await settling
    assert await balance(rig) == (7, 0, 993)


async def test_a_repeated_void_releases_nothing_twice(rig: Rig) -> None:
    await rig.store.reserve(request("a", 10, tokens=3))
    await rig.store.reserve(request("b", 10, tokens=4))
    for _ in range(3):
        await rig.store.void(WALLET, "a", refund=True)
    status = await limits(rig.store, WALLET)
    assert (status.requests, status.concurrency, status.tokens, status.available) == (1, 1, 4, 990)


async def test_a_concurrent_settlement_and_void_end_a_task_once(rig: Rig) -> None:
    for number, turned in enumerate((False, True)):
        task = f"t{number}"
        await rig.store.reserve(request(task, 100))
        calls = [rig.store.settle(settlement(task, 60)), rig.store.void(WALLET, task)]
        await asyncio.gather(*(reversed(calls) if turned else calls), return_exceptions=True)
    stored, _ = await rig.store.list_usage(ALL, limit=9)
    assert await balance(rig) == (60 * len(stored), 0, 1_000 - 60 * len(stored))
    assert (await limits(rig.store, WALLET)).concurrency == 0


# --- limit status


async def test_the_limit_status_of_an_unused_wallet_is_zero(rig: Rig) -> None:
    assert await limits(rig.store, Wallet("nobody", True)) == Used(0)
    assert await limits(rig.store, WALLET) == Used(1_000)


async def test_the_limit_status_is_that_after_the_call(rig: Rig) -> None:
    await rig.store.reserve(request("a", 100, tokens=7))
    settled = used(await rig.store.settle(settlement("a", 40, tokens=9)))
    now = await limits(rig.store, WALLET)
    assert settled.without_resets() == Used(960, 1, 0, 0, 9)
    assert now.without_resets() == Used(960, 1, 0, 0, 9)
    assert now.requests_reset <= settled.requests_reset <= WINDOW


# --- cancelled callers


async def _reaches(rig: Rig, expected: tuple[int, int, int]) -> bool:
    """Waits until the wallet has that balance."""
    async with asyncio.timeout(20):
        while await balance(rig) != expected:
            pass  # each call lets other tasks run
    return True


async def test_a_cancelled_caller_does_not_stop_its_operation(rig: Rig) -> None:
    async def cancel(call: Awaitable[object]) -> None:
        waiter = asyncio.ensure_future(call)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)

    await cancel(rig.store.reserve(request("a", 100)))
    await cancel(rig.store.reserve(request("b", 100)))
    await cancel(rig.store.settle(settlement("a", 60)))
    await cancel(rig.store.void(WALLET, "b"))
    assert await _reaches(rig, (60, 0, 940))


async def test_operations_that_are_not_awaited_complete_without_warnings(rig: Rig) -> None:
    warnings: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: warnings.append(context))
    try:
        rig.store.reserve(request("a", 100))
        rig.store.settle(settlement("a", 60))
        rig.store.settle(settlement("nothing"))
        rig.store.void(WALLET, "a")
        assert await _reaches(rig, (60, 0, 940))
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert warnings == []


async def test_operations_queued_when_the_store_is_closed_are_done(rig: Rig) -> None:
    calls = [rig.store.reserve(request(f"t{n}", 1)) for n in range(600)]
    await rig.close()
    answers = await asyncio.gather(*calls)
    assert all(isinstance(answer, Reserved) for answer in answers)
    await rig.open()
    # The store has recovered the tasks, but their requests still count.
    assert (await limits(rig.store, WALLET)).requests == 600


async def test_a_closed_store_is_unavailable(rig: Rig) -> None:
    store = rig.store
    await rig.close()
    for call in (
        store.reserve(request("a")),
        store.settle(settlement("a")),
        store.void(WALLET, "a"),
        store.note([record("a")]),
        store.limit_status(WALLET),
        store.balance(WALLET),
        store.grant(Grant("g", WALLET, 5, 1.0)),
        store.get_account("acme"),
        store.list_usage(ALL, limit=1),
        store.sum_usage(ALL, ("day",)),
        store.drafts(),
        wallets(store),
        store.reservations(),
        store.recover(WALLET, "a"),
    ):
        assert await error_code(call) == "store_unavailable"
    await rig.open()
