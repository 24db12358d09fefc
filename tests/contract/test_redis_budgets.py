"""Budgets, corrections and the operator's log of several processes on one Redis."""

from __future__ import annotations

import asyncio

from pomelo.stores.accounts import Grant, OverdrawnError
from pomelo.stores.acts import Act
from pomelo.stores.ledger import Reserved
from tests.contract.ledger_rig import WALLET, abandon, settlement
from tests.contract.redis_rig import Opener
from tests.contract.test_ledger_budgets import limited


async def test_a_budget_pays_for_exactly_ten_of_a_hundred_tasks_of_two_processes(opened: Opener) -> None:
    first = await opened()
    second = await opened()

    async def run(number: int) -> bool:
        store = (first, second)[number % 2]
        answer = await store.reserve(limited(f"t{number}", 10))
        if isinstance(answer, Reserved):
            await store.settle(settlement(f"t{number}", 10))
        return isinstance(answer, Reserved)

    assert sum(await asyncio.gather(*(run(number) for number in range(100)))) == 10
    assert (await first.balance(WALLET)).spent == 100


async def test_the_budget_of_a_killed_process_is_given_back(opened: Opener) -> None:
    killed = await opened(heartbeat=0.02, dead_after=0.3)
    await killed.reserve(limited("a", 100))
    await abandon(killed)
    other = await opened(heartbeat=0.02, dead_after=0.3)
    async with asyncio.timeout(30):
        while not isinstance(await other.reserve(limited("b", 100)), Reserved):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_two_processes_take_back_no_more_than_is_available(opened: Opener) -> None:
    first = await opened()
    second = await opened()

    async def take(number: int) -> bool:
        act = Act(f"act{number:02}", float(number), "adjust_credits", WALLET.account)
        try:
            back = Grant(f"back{number}", WALLET, -100, 2.0)
            await (first, second)[number % 2].grant(back, act)
        except OverdrawnError:
            return False
        return True

    taken = await asyncio.gather(*(take(number) for number in range(40)))
    assert sum(taken) == 10
    listed = await asyncio.gather(*(store.list_acts(limit=100) for store in (first, second) * 5))
    for acts in listed:
        assert sorted(int(act.new) for act in acts) == list(range(0, 1_000, 100))
    assert [act.act_id for act in listed[0]] == sorted((act.act_id for act in listed[0]), reverse=True)
