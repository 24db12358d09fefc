"""What every store's ledger keeps to: takes, settlements, voids, and all of them again after a crash."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest

from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    WINDOW,
    Balance,
    Grant,
    IdempotencyKey,
    LimitStatus,
    Reserved,
    Settled,
    UsageQuery,
    Wallet,
)
from tests.contract.ledger_rig import (
    MODEL,
    WALLET,
    clock,
    ending,
    fails,
    lost,
    ran,
    record,
    refused,
    rig,
    taking,
)

__all__ = ["clock", "rig"]

KEY = IdempotencyKey("order-7", b"\x00digest")
ALL = UsageQuery()


async def balance(rig, wallet=WALLET) -> tuple[int, int, int]:
    found = await rig.store.balance(wallet)
    assert found.granted == found.spent + found.held + found.available
    return found.spent, found.held, found.available


# --- taking


async def test_a_take_takes_a_request_a_slot_tokens_and_a_hold(rig):
    taken = await rig.store.reserve(
        taking("a", 100, 300, tokens=50, requests_limit=5, tokens_limit=90, concurrency_limit=3)
    )
    assert taken.held == 300
    standing = taken.limit_status
    assert (standing.available, standing.requests, standing.concurrency, standing.tokens) == (700, 1, 1, 50)
    assert 0 < standing.requests_reset <= WINDOW
    assert 0 < standing.tokens_reset <= WINDOW
    assert await balance(rig) == (0, 300, 700)


async def test_it_holds_all_that_is_available_if_that_is_at_least_the_least(rig):
    assert (await rig.store.reserve(taking("a", 1_000, 5_000))).held == 1_000
    assert await refused(rig.store.reserve(taking("b", 1))) == "insufficient_credits"


@pytest.mark.parametrize(("least", "held"), [(999, 1_000), (1_000, 1_000), (1_001, None)])
async def test_one_microcredit_too_few_is_refused(rig, least, held):
    answer = await rig.store.reserve(taking("a", least, 2_000))
    assert getattr(answer, "held", None) == held


async def test_with_enough_a_task_holds_an_equal_share_for_each_free_slot(rig):
    asked = {"least": 1, "most": 5_000, "sufficient": 10, "concurrency_limit": 4}
    held = [(await rig.store.reserve(taking(f"t{n}", **asked))).held for n in range(4)]
    assert held == [250, 250, 250, 250]


async def test_a_share_is_at_least_enough_and_the_least_and_at_most_what_is_asked_for(rig):
    for changes, held in (
        ({"most": 50}, 50),
        ({"least": 300}, 300),
        ({"sufficient": 400}, 400),
        ({"sufficient": 0}, 1_000),
    ):
        asked = {"least": 1, "most": 5_000, "sufficient": 10, "concurrency_limit": 4} | changes
        assert (await rig.store.reserve(taking("a", **asked))).held == held
        await rig.store.void(WALLET, "a")
    asked = {"least": 1, "most": 5_000, "sufficient": 400, "concurrency_limit": 4}
    assert [(await rig.store.reserve(taking(f"t{n}", **asked))).held for n in range(3)] == [400, 400, 200]
    assert await refused(rig.store.reserve(taking("t3", **asked))) == "insufficient_credits"


async def test_without_a_limit_of_slots_the_balance_has_a_fixed_number_of_shares(rig):
    assert (await rig.store.reserve(taking("a", 1, 5_000, sufficient=1))).held == 1_000 // DEFAULT_SHARES


async def test_a_task_that_is_free_runs_without_credits(rig):
    empty = Wallet("acme", False)
    taken = await rig.store.reserve(taking("a", 0, live=False))
    assert isinstance(taken, Reserved)
    assert taken.held == 0
    assert await rig.store.balance(empty) == Balance()
    assert (await rig.store.settle(ending("a", 0, live=False))).record.cost == 0
    assert empty in await rig.store.wallets()


async def test_live_and_test_and_accounts_have_nothing_in_common(rig):
    await rig.store.add_account("other", "pro", 1.0)
    for number, wallet in enumerate((Wallet("acme", False), Wallet("other", True))):
        await rig.store.grant(Grant(f"g{number}", wallet, 50, 1.0))
    for number, who in enumerate(({}, {"live": False}, {"account": "other"})):
        asked = taking(
            f"t{number}", 50, requests_limit=1, concurrency_limit=1, tokens=5, tokens_limit=5, **who
        )
        assert isinstance(await rig.store.reserve(asked), Reserved)
    assert await balance(rig) == (0, 50, 950)


# --- settling


async def test_a_settlement_charges_frees_the_rest_and_keeps_the_record(rig):
    await rig.store.reserve(taking("a", 10, 300))
    whole = ending(
        "a", 120, provider="openai", provider_model="gpt-4-0613", input_tokens=7, output_tokens=2**40, characters=3,
        images=4, pixels=5, audio_ms=6, processing_ms=8, first_byte_ms=9, output_bytes=10, prices="image=5,x=1",
        price_version="2026-11", source="estimated", complete=False, at=1234.5,
    )  # fmt: skip
    settled = await rig.store.settle(whole)
    assert settled.record == whole.record
    assert (settled.limit_status.available, settled.limit_status.concurrency) == (880, 0)
    assert await balance(rig) == (120, 0, 880)
    assert await rig.store.held() == []
    assert await rig.store.list_usage(ALL, limit=9) == ([whole.record], "")


async def test_a_cost_above_the_hold_comes_out_of_what_is_available(rig):
    await rig.store.reserve(taking("a", 100))
    settled = await rig.store.settle(ending("a", 1_000))
    assert (settled.record.cost, settled.record.uncollected) == (1_000, 0)
    assert await balance(rig) == (1_000, 0, 0)


async def test_what_was_not_enough_is_uncollected_and_what_others_hold_stays_theirs(rig):
    await rig.store.reserve(taking("other", 500))
    await rig.store.reserve(taking("a", 100))
    settled = await rig.store.settle(ending("a", 701))
    assert (settled.record.cost, settled.record.uncollected) == (500, 201)
    assert await balance(rig) == (500, 500, 0)
    [kept], _ = await rig.store.list_usage(ALL, limit=9)
    assert kept == settled.record


async def test_tokens_of_the_settlement_count_in_place_of_the_takes(rig):
    await rig.store.reserve(taking("a", tokens=100))
    await rig.store.reserve(taking("b", tokens=100))
    assert (await rig.store.settle(ending("a", tokens=30))).limit_status.tokens == 130
    assert (await rig.store.settle(ending("b", tokens=400))).limit_status.tokens == 430


async def test_a_task_that_took_no_tokens_and_has_no_limit_of_them_counts_none(rig):
    await rig.store.reserve(taking("a", tokens=100))
    await rig.store.reserve(taking("b"))
    assert (await rig.store.settle(ending("b", tokens=30))).limit_status.tokens == 100
    await rig.store.reserve(taking("c", tokens_limit=100))
    assert (await rig.store.settle(ending("c", tokens=30))).limit_status.tokens == 130


async def test_tokens_of_a_window_that_is_over_change_nothing(rig, clock):
    await rig.store.reserve(taking("a", tokens=100))
    clock.passes(60)
    await rig.store.reserve(taking("b", tokens=5))
    assert (await rig.store.settle(ending("a", tokens=30))).limit_status.tokens == 5
    clock.passes(60)
    assert (await rig.store.settle(ending("b", tokens=30))).limit_status.tokens == 0


async def test_a_settlement_gives_no_request_back(rig):
    await ran(rig.store, "a")
    assert await refused(rig.store.reserve(taking("b", requests_limit=1))) == "rate_limit_exceeded"


async def test_a_task_without_a_hold_can_not_be_settled(rig):
    assert await lost(rig.store.settle(ending("a")))
    await rig.store.reserve(taking("b"))
    assert await lost(rig.store.settle(ending("b", live=False)))
    assert (await rig.store.list_usage(ALL, limit=9))[0] == []
    assert await balance(rig) == (0, 10, 990)


# --- voiding


async def test_a_voided_task_costs_nothing_and_its_request_counts(rig):
    await rig.store.reserve(taking("a", 10, tokens=40))
    await rig.store.void(WALLET, "a")
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.concurrency, standing.tokens, standing.available) == (1, 0, 40, 1_000)
    assert await balance(rig) == (0, 0, 1_000)
    assert await lost(rig.store.settle(ending("a")))


async def test_a_refund_gives_the_request_and_the_tokens_back(rig):
    await rig.store.reserve(taking("a", tokens=40))
    await rig.store.reserve(taking("b", tokens=2))
    await rig.store.void(WALLET, "a", refund=True)
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.concurrency, standing.tokens, standing.available) == (1, 1, 2, 990)
    assert isinstance(
        await rig.store.reserve(taking("c", requests_limit=2, tokens=1, tokens_limit=3)), Reserved
    )


async def test_a_refund_for_a_window_that_is_over_gives_nothing_of_the_next(rig, clock):
    await rig.store.reserve(taking("a", tokens=40))
    clock.passes(60)
    await rig.store.reserve(taking("b", tokens=2))
    await rig.store.void(WALLET, "a", refund=True)
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.tokens, standing.concurrency) == (1, 2, 1)


@pytest.mark.parametrize("refund", [False, True])
async def test_a_voided_task_can_be_taken_again_and_is_settled_once(rig, refund):
    await rig.store.reserve(taking("a", 10, 300))
    await rig.store.void(WALLET, "a", refund=refund)
    assert (await rig.store.reserve(taking("a", 10, 200))).held == 200
    settled = await rig.store.settle(ending("a", 120))
    assert (settled.record.cost, settled.limit_status.available) == (120, 880)
    assert await rig.store.settle(ending("a", 50)) == settled
    assert await balance(rig) == (120, 0, 880)


async def test_voiding_without_a_hold_does_nothing(rig):
    await ran(rig.store, "done")
    await rig.store.reserve(taking("a"))
    before = await rig.store.limit_status(WALLET, MODEL)
    for refund in (False, True):
        await rig.store.void(WALLET, "nothing", refund=refund)
        await rig.store.void(WALLET, "done", refund=refund)
        await rig.store.void(Wallet("acme", False), "a", refund=refund)
    after = await rig.store.limit_status(WALLET, MODEL)
    assert replace(after, requests_reset=0) == replace(before, requests_reset=0)


# --- again, after an unknown outcome


async def test_a_take_again_takes_nothing_more(rig):
    asked = taking(
        "a", 10, 300, tokens=5, requests_limit=1, concurrency_limit=1, tokens_limit=5, idempotency_key=KEY
    )
    first = await rig.store.reserve(asked)
    again = await rig.store.reserve(asked)
    assert isinstance(again, Reserved)
    assert again.held == first.held == 300
    assert (again.limit_status.requests, again.limit_status.concurrency, again.limit_status.tokens) == (
        1,
        1,
        5,
    )
    assert await balance(rig) == (0, 300, 700)


async def test_a_settlement_again_gives_the_first_outcome(rig):
    await rig.store.reserve(taking("a", 10))
    first = await rig.store.settle(ending("a", 1_200))
    for again in (ending("a", 1_200), ending("a", 5)):
        answer = await rig.store.settle(again)
        assert isinstance(answer, Settled)
        assert answer.record == first.record
    assert await balance(rig) == (1_000, 0, 0)
    assert len((await rig.store.list_usage(ALL, limit=9))[0]) == 1


async def test_voiding_again_frees_nothing_twice(rig):
    await rig.store.reserve(taking("a", 10, tokens=3))
    await rig.store.reserve(taking("b", 10, tokens=4))
    for _ in range(3):
        await rig.store.void(WALLET, "a", refund=True)
    standing = await rig.store.limit_status(WALLET, MODEL)
    assert (standing.requests, standing.concurrency, standing.tokens, standing.available) == (1, 1, 4, 990)


async def test_a_settlement_and_a_void_of_one_task_at_once_end_it_once(rig):
    for number, turned in enumerate((False, True)):
        task = f"t{number}"
        await rig.store.reserve(taking(task, 100))
        both = [rig.store.settle(ending(task, 60)), rig.store.void(WALLET, task)]
        await asyncio.gather(*(reversed(both) if turned else both), return_exceptions=True)
    kept, _ = await rig.store.list_usage(ALL, limit=9)
    assert await balance(rig) == (60 * len(kept), 0, 1_000 - 60 * len(kept))
    assert (await rig.store.limit_status(WALLET)).concurrency == 0


# --- a process that dies


async def test_a_task_of_a_dead_process_is_charged_what_was_last_noted(rig):
    await rig.store.reserve(taking("a", 300, tokens=40, idempotency_key=KEY))
    await rig.store.reserve(taking("b", 300))
    for cost in (10, 25):
        assert await rig.store.note([record("a", cost=cost, output_tokens=cost, prices="x=1")]) == []
    assert await balance(rig) == (0, 600, 400)
    await rig.crash()
    assert await balance(rig) == (25, 0, 975)
    [kept], _ = await rig.store.list_usage(ALL, limit=9)
    noted = record("a", cost=25, output_tokens=25, prices="x=1", source="recovered", complete=False)
    assert replace(kept, at=0.0) == noted
    assert kept.at > 0
    assert (await rig.store.limit_status(WALLET)).concurrency == 0
    assert await rig.store.held() == []
    assert isinstance(await rig.store.reserve(taking("c", idempotency_key=KEY)), Reserved)


async def test_who_was_taken_for_dead_may_end_nothing(rig):
    for task in ("a", "b"):
        await rig.store.reserve(taking(task, 300))
    await rig.store.note([record("a", cost=25)])
    await rig.crash()
    assert await rig.store.note([record("a", cost=30), record("b", cost=1)]) == ["a", "b"]
    assert await lost(rig.store.settle(ending("a", 30)))
    assert await lost(rig.store.settle(ending("b", 30)))
    await rig.store.void(WALLET, "a", refund=True)
    assert await balance(rig) == (25, 0, 975)


async def test_a_note_above_the_hold_is_charged_as_a_settlement_is(rig):
    await rig.store.reserve(taking("other", 500))
    await rig.store.reserve(taking("a", 100))
    await rig.store.note([record("a", cost=701), record("other", cost=1)])
    await rig.crash()
    kept, _ = await rig.store.list_usage(ALL, limit=9)
    assert sum(r.cost + r.uncollected for r in kept) == 702
    spent, held, available = await balance(rig)
    assert (spent, held) == (sum(r.cost for r in kept), 0)
    assert available >= 0


async def test_what_was_settled_before_the_crash_stays_settled(rig):
    first = await ran(rig.store, "a", 70)
    await rig.crash()
    assert (await rig.store.settle(ending("a", 70))).record == first.record
    assert await balance(rig) == (70, 0, 930)


async def test_notes_of_tasks_that_never_were_are_told(rig):
    await rig.store.reserve(taking("a"))
    asked = [record("x"), record("a", cost=3), record("a", cost=5, live=False), record("y")]
    assert await rig.store.note(asked) == ["x", "a", "y"]
    assert [held.cost for held in await rig.store.held()] == [3]
    assert await rig.store.note([]) == []


# --- tasks that no process runs


async def test_reservations_are_what_tasks_hold_and_what_was_last_noted(rig):
    assert await rig.store.reservations() == []
    for task, amount in (("b", 70), ("a", 300)):
        await rig.store.reserve(taking(task, amount, at=5.0))
    await ran(rig.store, "done")
    noted = record("b", cost=25, output_tokens=3, at=7.0)
    await rig.store.note([noted])
    for own in (False, True):
        found = await rig.store.reservations(own=own)
        assert [(one.record, one.amount, one.own) for one in found] == [
            (record("a", at=5.0), 300, True),
            (noted, 70, True),
        ]


async def test_a_task_that_is_recovered_is_charged_what_was_last_noted(rig):
    await rig.store.reserve(taking("a", 300, tokens=40, idempotency_key=KEY))
    await rig.store.reserve(taking("b", 300))
    await rig.store.note([record("a", cost=25, output_tokens=25, prices="x=1")])
    for _ in range(2):  # The second call changes nothing.
        await rig.store.recover(WALLET, "a")
    assert await balance(rig) == (25, 300, 675)
    [kept], _ = await rig.store.list_usage(ALL, limit=9)
    noted = record("a", cost=25, output_tokens=25, prices="x=1", source="recovered", complete=False)
    assert replace(kept, at=0.0) == noted
    assert kept.at > 0
    assert (await rig.store.limit_status(WALLET, MODEL)).concurrency == 1
    assert (await rig.store.limit_status(WALLET, MODEL)).tokens == 40
    assert [one.record.task_id for one in await rig.store.reservations(own=True)] == ["b"]
    # A process that still runs it can no longer end it, and its Idempotency-Key is free.
    assert await rig.store.note([record("a", cost=30)]) == ["a"]
    assert await lost(rig.store.settle(ending("a", 30)))
    await rig.store.void(WALLET, "a", refund=True)
    assert await balance(rig) == (25, 300, 675)
    assert isinstance(await rig.store.reserve(taking("c", idempotency_key=KEY)), Reserved)


async def test_a_task_without_a_noted_cost_is_voided_when_it_is_recovered(rig):
    await rig.store.reserve(taking("a", 300))
    await rig.store.recover(WALLET, "a")
    assert await balance(rig) == (0, 0, 1_000)
    assert (await rig.store.list_usage(ALL, limit=9))[0] == []
    assert await lost(rig.store.settle(ending("a", 30)))


async def test_recovering_without_a_hold_does_nothing(rig):
    await ran(rig.store, "done", 70)
    await rig.store.reserve(taking("a"))
    await rig.store.recover(WALLET, "nothing")
    await rig.store.recover(WALLET, "done")
    await rig.store.recover(Wallet("acme", False), "a")
    assert await balance(rig) == (70, 10, 920)
    assert (await rig.store.settle(ending("done", 70))).record.cost == 70
    assert (await rig.store.settle(ending("a", 10))).record.cost == 10


# --- standing


async def test_a_wallet_that_did_nothing_stands_at_nothing(rig):
    assert await rig.store.limit_status(Wallet("nobody", True), MODEL) == LimitStatus(0)
    assert await rig.store.limit_status(WALLET, MODEL) == LimitStatus(1_000)


async def test_the_standing_is_that_after_the_call(rig):
    await rig.store.reserve(taking("a", 100, tokens=7))
    settled = (await rig.store.settle(ending("a", 40, tokens=9))).limit_status
    now = await rig.store.limit_status(WALLET, MODEL)
    assert replace(settled, requests_reset=0, tokens_reset=0) == LimitStatus(960, 1, 0, 0, 9)
    assert replace(now, requests_reset=0, tokens_reset=0) == LimitStatus(960, 1, 0, 0, 9)
    assert now.requests_reset <= settled.requests_reset <= WINDOW


# --- callers who leave


async def _comes(rig, expected) -> bool:
    """Whether the balance comes to that."""
    async with asyncio.timeout(10):
        while await balance(rig) != expected:
            pass  # Each look is a call that gives others their turn.
    return True


async def test_a_caller_who_leaves_stops_nothing(rig):
    async def leave(asked) -> None:
        waiter = asyncio.ensure_future(asked)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)

    await leave(rig.store.reserve(taking("a", 100)))
    await leave(rig.store.reserve(taking("b", 100)))
    await leave(rig.store.settle(ending("a", 60)))
    await leave(rig.store.void(WALLET, "b"))
    assert await _comes(rig, (60, 0, 940))


async def test_what_nobody_awaits_is_done_and_nothing_is_said(rig):
    said: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: said.append(context))
    try:
        rig.store.reserve(taking("a", 100))
        rig.store.settle(ending("a", 60))
        rig.store.settle(ending("nothing"))
        rig.store.void(WALLET, "a")
        assert await _comes(rig, (60, 0, 940))
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert said == []


async def test_what_is_queued_when_the_store_is_closed_is_done(rig):
    asked = [rig.store.reserve(taking(f"t{n}", 1)) for n in range(600)]
    await rig.close()
    answers = await asyncio.gather(*asked)
    assert all(isinstance(answer, Reserved) for answer in answers)
    await rig.open()
    # Their process is gone.
    assert (await rig.store.limit_status(WALLET)).requests == 600


async def test_a_closed_store_is_unavailable(rig):
    store = rig.store
    await rig.close()
    for asked in (
        store.reserve(taking("a")),
        store.settle(ending("a")),
        store.void(WALLET, "a"),
        store.note([record("a")]),
        store.limit_status(WALLET),
        store.balance(WALLET),
        store.grant(Grant("g", WALLET, 5, 1.0)),
        store.get_account("acme"),
        store.list_usage(ALL, limit=1),
        store.sum_usage(ALL, "day"),
        store.held(),
        store.wallets(),
        store.reservations(),
        store.recover(WALLET, "a"),
    ):
        assert await fails(asked) == "store_unavailable"
    await rig.open()
