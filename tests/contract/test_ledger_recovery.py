"""The end of tasks that no process runs any more, in every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.ledger import Reserved
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import (
    KEY,
    WALLET,
    Rig,
    amount,
    balance,
    is_lost,
    record,
    request,
    run_task,
    settlement,
)
from tests.limits import limits

ALL = UsageQuery()


# --- a process that dies


async def test_a_task_of_a_dead_process_is_charged_its_last_noted_cost(rig: Rig) -> None:
    await rig.store.reserve(request("a", 300, tokens=40, idempotency_key=KEY))
    await rig.store.reserve(request("b", 300))
    for cost in (10, 25):
        assert await rig.store.note([record("a", cost=cost, output_tokens=cost, prices="x=1")]) == []
    assert await balance(rig) == (0, 600, 400)
    await rig.crash()
    assert await balance(rig) == (25, 0, 975)
    [stored], _ = await rig.store.list_usage(ALL, limit=9)
    noted = record("a", cost=25, output_tokens=25, prices="x=1", source="recovered", complete=False)
    assert replace(stored, at=0.0) == noted
    assert stored.at > 0
    assert (await limits(rig.store, WALLET)).concurrency == 0
    assert await rig.store.drafts() == []
    assert isinstance(await rig.store.reserve(request("c", idempotency_key=KEY)), Reserved)


async def test_a_process_that_was_considered_dead_can_not_end_its_tasks(rig: Rig) -> None:
    for task in ("a", "b"):
        await rig.store.reserve(request(task, 300))
    await rig.store.note([record("a", cost=25)])
    await rig.crash()
    assert await rig.store.note([record("a", cost=30), record("b", cost=1)]) == ["a", "b"]
    assert await is_lost(rig.store.settle(settlement("a", 30)))
    assert await is_lost(rig.store.settle(settlement("b", 30)))
    await rig.store.void(WALLET, "a", refund=True)
    assert await balance(rig) == (25, 0, 975)


async def test_a_noted_cost_above_the_reservation_is_charged_like_a_settlement(rig: Rig) -> None:
    await rig.store.reserve(request("other", 500))
    await rig.store.reserve(request("a", 100))
    await rig.store.note([record("a", cost=701), record("other", cost=1)])
    await rig.crash()
    stored, _ = await rig.store.list_usage(ALL, limit=9)
    assert sum(r.cost + r.uncollected for r in stored) == 702
    spent, held, available = await balance(rig)
    assert (spent, held) == (sum(r.cost for r in stored), 0)
    assert available >= 0


async def test_a_noted_cost_above_the_balance_is_recorded_as_uncollected(rig: Rig) -> None:
    await rig.store.reserve(request("a", 100))
    await rig.store.note([record("a", cost=1_200)])
    await rig.crash()
    [stored], _ = await rig.store.list_usage(ALL, limit=9)
    assert (stored.cost, stored.uncollected) == (1_000, 200)
    assert await balance(rig) == (1_000, 0, 0)


async def test_a_settlement_before_a_crash_remains(rig: Rig) -> None:
    first = await run_task(rig.store, "a", 70)
    await rig.crash()
    assert (await rig.store.settle(settlement("a", 70))).record == first.record
    assert await balance(rig) == (70, 0, 930)


async def test_notes_of_unknown_tasks_are_reported(rig: Rig) -> None:
    await rig.store.reserve(request("a"))
    noted = [record("x"), record("a", cost=3), record("a", cost=5, live=False), record("y")]
    assert await rig.store.note(noted) == ["x", "a", "y"]
    assert [draft.cost for draft in await rig.store.drafts()] == [3]
    assert await rig.store.note([]) == []


async def test_many_tasks_are_noted_in_one_call(rig: Rig) -> None:
    ids = [f"t{n:03}" for n in range(230)]
    await rig.store.grant(Grant("test", Wallet("acme", False), 9, 1.0))
    for task in ids:
        await rig.store.reserve(request(task, 1, live=task != "t007"))
    await rig.store.void(WALLET, "t105")
    noted = [record(task, cost=number, live=task != "t007") for number, task in enumerate(ids)]
    assert await rig.store.note([*noted, record("x")]) == ["t105", "x"]
    found = [(each.task_id, each.cost) for each in await rig.store.drafts()]
    assert found == [(task, number) for number, task in enumerate(ids) if task != "t105"]


# --- tasks that no process runs


async def test_reservations_have_the_amounts_and_the_last_noted_records(rig: Rig) -> None:
    assert await rig.store.reservations() == []
    for task, reserved in (("b", 70), ("a", 300)):
        await rig.store.reserve(request(task, reserved, at=5.0))
    await run_task(rig.store, "done")
    noted = record("b", cost=25, output_tokens=3, at=7.0)
    await rig.store.note([noted])
    for own in (False, True):
        found = await rig.store.reservations(own=own)
        assert [(one.record, one.amount, one.own) for one in found] == [
            (record("a", at=5.0), 300, True),
            (noted, 70, True),
        ]


async def test_a_recovered_task_is_charged_its_last_noted_cost(rig: Rig) -> None:
    await rig.store.reserve(request("a", 300, tokens=40, idempotency_key=KEY))
    await rig.store.reserve(request("b", 300))
    await rig.store.note([record("a", cost=25, output_tokens=25, prices="x=1")])
    for _ in range(2):  # The second call changes nothing.
        await rig.store.recover(WALLET, "a")
    assert await balance(rig) == (25, 300, 675)
    [stored], _ = await rig.store.list_usage(ALL, limit=9)
    noted = record("a", cost=25, output_tokens=25, prices="x=1", source="recovered", complete=False)
    assert replace(stored, at=0.0) == noted
    assert stored.at > 0
    assert (await limits(rig.store, WALLET)).concurrency == 1
    assert (await limits(rig.store, WALLET)).tokens == 40
    assert [one.record.task_id for one in await rig.store.reservations(own=True)] == ["b"]
    # A process that still runs it can't end it any more, and its Idempotency-Key is free.
    assert await rig.store.note([record("a", cost=30)]) == ["a"]
    assert await is_lost(rig.store.settle(settlement("a", 30)))
    await rig.store.void(WALLET, "a", refund=True)
    assert await balance(rig) == (25, 300, 675)
    assert isinstance(await rig.store.reserve(request("c", idempotency_key=KEY)), Reserved)


async def test_a_task_that_is_being_settled_is_not_charged_again_when_it_is_recovered(rig: Rig) -> None:
    await rig.store.reserve(request("a", 300, tokens=40))
    await rig.store.note([record("a", cost=25)])
    settling = asyncio.ensure_future(rig.store.settle(settlement("a", 70)))
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await asyncio.gather(rig.store.recover(WALLET, "a"), rig.store.recover(WALLET, "a"))
        assert (await settling).record.cost == 70
    assert await balance(rig) == (70, 0, 930)
    assert (await limits(rig.store, WALLET)).concurrency == 0
    assert await amount(rig.store.reserve(request("b", 930))) == 930


async def test_a_task_without_a_noted_cost_is_voided_when_it_is_recovered(rig: Rig) -> None:
    await rig.store.reserve(request("a", 300))
    await rig.store.recover(WALLET, "a")
    assert await balance(rig) == (0, 0, 1_000)
    assert (await rig.store.list_usage(ALL, limit=9))[0] == []
    assert await is_lost(rig.store.settle(settlement("a", 30)))


async def test_recovering_without_a_reservation_does_nothing(rig: Rig) -> None:
    await run_task(rig.store, "done", 70)
    await rig.store.reserve(request("a"))
    await rig.store.recover(WALLET, "nothing")
    await rig.store.recover(WALLET, "done")
    await rig.store.recover(Wallet("acme", False), "a")
    assert await balance(rig) == (70, 10, 920)
    assert (await rig.store.settle(settlement("done", 70))).record.cost == 70
    assert (await rig.store.settle(settlement("a", 10))).record.cost == 10


async def test_only_a_task_that_was_recovered_without_a_charge_can_be_reserved_again(rig: Rig) -> None:
    for task, cost in (("a", 0), ("b", 5)):
        await rig.store.reserve(request(task))
        await rig.store.note([record(task, cost=cost)])
        await rig.store.recover(WALLET, task)
        assert await is_lost(rig.store.reserve(request(task))) == (cost > 0)
