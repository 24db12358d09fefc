"""Budgets of keys, in every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pomelo.stores.ledger import Budget, BudgetUse, Refused, Reserved, ReserveRequest
from tests.contract.ledger_rig import (
    WALLET,
    Rig,
    amount,
    balance,
    record,
    request,
    settlement,
)

DAY = 1_799_971_200.0
NAME = "budget:k1.day"


def limited(
    task_id: str,
    minimum: int = 10,
    maximum: int | None = None,
    *,
    limit: int = 100,
    start: float = DAY,
    name: str = NAME,
    sufficient: int = 0,
) -> ReserveRequest:
    """A task of a key with a budget."""
    task = request(task_id, minimum, maximum, sufficient=sufficient)
    return replace(task, budget=Budget(name, limit, start))


async def refusing(rig: Rig, task: ReserveRequest) -> str:
    """The name of the budget that refuses a task, empty if it is the balance."""
    answer = await rig.store.reserve(task)
    assert isinstance(answer, Refused)
    assert answer.code == "insufficient_credits"
    assert answer.limit_status.available == (await rig.store.balance(WALLET)).available
    return answer.counter


async def left(rig: Rig, limit: int = 100, start: float = DAY, name: str = NAME) -> int:
    """What is left of a budget."""
    task = limited("probe", 0, 10_000, limit=limit, start=start, name=name)
    found = await amount(rig.store.reserve(task))
    await rig.store.void(WALLET, "probe", refund=True)
    (use,) = await rig.store.budget_use(WALLET, [Budget(name, limit, start)])
    assert use.used == limit - found
    return found


async def test_a_budget_limits_what_is_reserved_and_counts_what_is_charged(rig: Rig) -> None:
    assert await amount(rig.store.reserve(limited("a", 10, 80))) == 80
    assert await amount(rig.store.reserve(limited("b", 10, 80))) == 20
    assert await refusing(rig, limited("c", 1)) == NAME
    await rig.store.settle(settlement("a", 30))
    assert await left(rig) == 50
    await rig.store.settle(settlement("b", 20))
    assert await left(rig) == 50
    assert await balance(rig) == (50, 0, 950)


async def test_the_balance_refuses_before_the_budget(rig: Rig) -> None:
    assert await refusing(rig, limited("a", 101)) == NAME
    assert await refusing(rig, limited("b", 1_001)) == ""


@pytest.mark.parametrize("refund", [True, False])
async def test_a_failed_task_gives_its_budget_back(rig: Rig, refund: bool) -> None:
    await rig.store.reserve(limited("a", 100))
    await rig.store.void(WALLET, "a", refund=refund)
    assert await left(rig) == 100


async def test_a_budget_pays_for_exactly_ten_of_a_hundred_concurrent_tasks(rig: Rig) -> None:
    answers = await asyncio.gather(*(rig.store.reserve(limited(f"t{n}", 10)) for n in range(100)))
    assert sum(isinstance(answer, Reserved) for answer in answers) == 10
    assert await left(rig) == 0


async def test_what_costs_more_than_was_reserved_counts_too(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 40))
    assert (await rig.store.settle(settlement("a", 90))).record.cost == 90
    assert await left(rig) == 10


async def test_a_new_period_counts_from_nothing_and_an_earlier_one_is_over(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 60))
    await rig.store.reserve(limited("late", 40))
    await rig.store.settle(settlement("a", 60))
    assert await left(rig, start=DAY + 86_400) == 100
    await rig.store.reserve(limited("b", 70, start=DAY + 86_400))
    await rig.store.settle(settlement("late", 40))
    await rig.store.settle(settlement("b", 70))
    assert await left(rig, start=DAY + 86_400) == 30
    assert await left(rig, start=DAY) == 30  # of a process whose clock is late


async def test_the_use_of_a_budget_is_that_of_its_period_or_of_a_later_one(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 30))
    periods = [Budget(NAME, 100, DAY + moved) for moved in (0.0, -86_400.0, 86_400.0, 0.5)]
    assert await rig.store.budget_use(WALLET, [*periods, Budget("budget:k2.day", 100, DAY)]) == [
        BudgetUse(30, DAY),
        BudgetUse(30, DAY),
        BudgetUse(0, DAY + 86_400.0),
        BudgetUse(0, DAY + 0.5),
        BudgetUse(0, DAY),
    ]
    assert await rig.store.budget_use(WALLET, []) == []


async def test_the_end_of_a_task_of_an_earlier_period_changes_no_later_one(rig: Rig) -> None:
    for task, start in (("a", DAY), ("b", DAY), ("c", DAY + 86_400.0)):
        await rig.store.reserve(limited(task, 30, start=start))
    await rig.store.settle(settlement("a", 10))
    await rig.store.void(WALLET, "b")
    periods = [Budget(NAME, 100, DAY + 86_400.0)]
    assert await rig.store.budget_use(WALLET, periods) == [BudgetUse(30, DAY + 86_400.0)]


async def test_budgets_of_other_keys_and_periods_count_apart(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 60))
    assert await left(rig, name="budget:k2.day") == 100
    assert await left(rig, name="budget:k1.month") == 100
    assert await left(rig) == 40


async def test_a_changed_limit_applies_to_what_was_counted(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 60))
    assert await left(rig, limit=200) == 140
    assert await refusing(rig, limited("b", 1, limit=50)) == NAME


async def test_an_open_ended_task_takes_its_share_of_the_budget(rig: Rig) -> None:
    answer = await rig.store.reserve(limited("a", 1, 10_000, sufficient=2))
    assert isinstance(answer, Reserved)
    assert answer.amount == 100 // 20


async def test_a_crash_gives_back_what_was_not_noted_and_charges_what_was(rig: Rig) -> None:
    await rig.store.reserve(limited("done", 10))
    await rig.store.settle(settlement("done", 10))
    await rig.store.reserve(limited("silent", 20))
    await rig.store.reserve(limited("noted", 50))
    await rig.store.note([record("noted", cost=15)])
    assert await left(rig) == 20
    await rig.crash()
    assert await left(rig) == 100 - 10 - 15


async def test_a_recovered_task_counts_what_it_is_charged(rig: Rig) -> None:
    for task_id, cost in (("silent", 0), ("noted", 15)):
        await rig.store.reserve(limited(task_id, 30))
        await rig.store.note([record(task_id, cost=cost)])
        await rig.store.recover(WALLET, task_id)
    assert await left(rig) == 85


async def test_a_repeated_reserve_and_settle_count_once(rig: Rig) -> None:
    task = limited("a", 60)
    for _ in range(2):
        assert await amount(rig.store.reserve(task)) == 60
    for _ in range(2):
        await rig.store.settle(settlement("a", 25))
    assert await left(rig) == 75


async def test_a_budget_survives_a_restart(rig: Rig) -> None:
    await rig.store.reserve(limited("a", 60))
    await rig.store.settle(settlement("a", 60))
    await rig.close()
    await rig.open()
    assert await left(rig) == 40


@pytest.mark.parametrize("cost", [0, 10])
async def test_a_period_survives_a_restart_although_a_task_of_an_earlier_one_ended_last(
    rig: Rig, cost: int
) -> None:
    await rig.store.reserve(limited("late", 40))
    await rig.store.reserve(limited("a", 30, start=DAY + 86_400.0))
    for task_id, charged in (("a", 30), ("late", cost)):
        await rig.store.settle(settlement(task_id, charged))
    await rig.close()
    await rig.open()
    assert await left(rig, start=DAY + 86_400.0) == 70


async def test_what_was_charged_in_an_earlier_period_does_not_count_after_a_restart(rig: Rig) -> None:
    for day, cost in ((DAY, 60), (DAY + 86_400.0, 30)):
        await rig.store.reserve(limited(f"at {day}", 60, start=day))
        await rig.store.settle(settlement(f"at {day}", cost))
    await rig.close()
    await rig.open()
    assert await left(rig, start=DAY + 86_400.0) == 70


async def test_a_budget_above_the_balance_does_not_replace_it(rig: Rig) -> None:
    assert await amount(rig.store.reserve(limited("a", 10, 5_000, limit=10_000))) == 1_000
