"""Budgets, corrections and the operator's log of several processes on one Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pomelo.stores.accounts import Balance, Grant, OverdrawnError, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.ledger import Reserved
from pomelo.stores.redis.key_names import GRANTED
from tests.contract.ledger_rig import WALLET, abandon, settlement
from tests.contract.redis_rig import FaultyClient, Opener
from tests.contract.test_ledger_budgets import limited
from tests.redis_server import RedisServer


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


async def test_the_id_of_an_adjustment_that_one_of_two_calls_made_is_not_free(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened()
    back, send = Grant("back", WALLET, -1_001, 2.0), store._connection.send

    async def send_late(*command: Any) -> Any:
        """Frees the id only after another call, which had enough credits."""
        if command[0] == "HDEL":
            monkeypatch.undo()
            await store.grant(Grant("more", WALLET, 1, 2.0))
            assert await store.grant(back) == Balance()
        return await send(*command)

    monkeypatch.setattr(store._connection, "send", send_late)
    with pytest.raises(OverdrawnError):
        await store.grant(back)
    assert await store.grant(Grant("back", Wallet(WALLET.account, False), 5, 2.0)) == Balance()


@pytest.mark.parametrize("amount", [-5, 5])
async def test_the_id_of_a_call_that_a_refused_one_frees_meanwhile_is_not_free(
    opened: Opener, server: RedisServer, amount: int
) -> None:
    store = await opened()

    def frees(command: tuple[Any, ...]) -> bool:
        if command[:2] == ("HGET", GRANTED):
            server.do("HDEL", GRANTED, "back")
        return False

    faults = FaultyClient(store, 20.0)
    faults.hits = frees
    change = Grant("back", WALLET, amount, 2.0)
    assert await store.grant(change) == Balance(1_000 + amount)
    faults.end()
    assert await store.grant(replace(change, wallet=Wallet(WALLET.account, False), amount=5)) == Balance()
