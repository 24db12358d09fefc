"""Credits that the operator takes back or lends, in every store."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from pomelo.accounts.audit import audit
from pomelo.stores.accounts import Balance, Grant, OverdrawnError, UnknownAccountError, Wallet
from pomelo.stores.ledger import Refused, Reserved
from tests.contract.ledger_rig import WALLET, Rig, amount, refusal, request, run_task, settlement

NOBODY = Wallet("nobody", True)


async def findings(rig: Rig) -> list[str]:
    """What the audit finds wrong. The records here have no prices."""
    checks = [found.check for found in (await audit(rig.store)).findings]
    return [check for check in checks if check != "bill"]


def taken(micros: int, grant_id: str = "back") -> Grant:
    """An adjustment that takes credits back."""
    return Grant(grant_id, WALLET, -micros, 2.0, "a zero too many")


async def test_credits_are_taken_back_in_a_row_of_their_own(rig: Rig) -> None:
    assert await rig.store.grant(taken(900)) == Balance(100)
    assert await rig.store.balance(WALLET) == Balance(100)
    assert await rig.store.list_grants(WALLET) == [Grant("first", WALLET, 1_000, 1.0), taken(900)]
    assert await findings(rig) == []


async def test_no_more_is_taken_back_than_is_available(rig: Rig) -> None:
    await run_task(rig.store, "spent", 300)
    await rig.store.reserve(request("held", 200))
    with pytest.raises(OverdrawnError):
        await rig.store.grant(taken(501))
    assert await rig.store.balance(WALLET) == Balance(1_000, 300, 200)
    assert await rig.store.get_grant(WALLET, "back") is None
    assert await rig.store.grant(taken(500)) == Balance(500, 300, 200)
    assert await refusal(rig.store.reserve(request("more", 1))) == "insufficient_credits"
    assert (await rig.store.settle(settlement("held", 200))).record.cost == 200
    assert await rig.store.balance(WALLET) == Balance(500, 500, 0)
    assert await findings(rig) == []


async def test_credits_are_taken_back_once_for_each_id_also_when_none_are_left(rig: Rig) -> None:
    for _ in range(3):
        assert await rig.store.grant(taken(1_000)) == Balance()
    assert await rig.store.grant(taken(5, "first")) == Balance()  # the id of the grant
    assert len(await rig.store.list_grants(WALLET)) == 2


async def test_the_id_of_a_refused_adjustment_is_free_for_every_wallet(rig: Rig) -> None:
    test = Wallet(WALLET.account, False)
    with pytest.raises(OverdrawnError):
        await rig.store.grant(taken(1_001))
    assert await rig.store.grant(Grant("back", test, 5, 2.0)) == Balance(5)
    assert await rig.store.grant(taken(5)) == Balance(1_000)  # it is used now
    assert await findings(rig) == []


async def test_concurrent_adjustments_and_tasks_never_overdraw_a_wallet(rig: Rig) -> None:
    async def take(number: int) -> int:
        try:
            await rig.store.grant(taken(100, f"back{number}"))
        except OverdrawnError:
            return 0
        return 100

    async def reserve(number: int) -> int:
        answer = await rig.store.reserve(request(f"t{number}", 100))
        return answer.amount if isinstance(answer, Reserved) else 0

    both = [work(number) for number in range(20) for work in (take, reserve)]
    assert sum(await asyncio.gather(*both)) == 1_000
    found = await rig.store.balance(WALLET)
    assert (found.available, found.granted) == (0, found.held)
    assert await findings(rig) == []


async def test_an_adjustment_survives_a_crash(rig: Rig) -> None:
    await rig.store.grant(taken(400))
    await rig.crash()
    assert await rig.store.balance(WALLET) == Balance(600)
    assert await rig.store.grant(taken(400)) == Balance(600)
    assert await findings(rig) == []


async def test_an_unknown_account_gets_neither_adjustment_nor_credit_limit(rig: Rig) -> None:
    with pytest.raises(UnknownAccountError):
        await rig.store.grant(Grant("back", NOBODY, -1, 2.0))
    with pytest.raises(UnknownAccountError):
        await rig.store.set_credit_limit(NOBODY, 5)


async def test_a_postpaid_wallet_spends_up_to_its_credit_limit(rig: Rig) -> None:
    assert await rig.store.set_credit_limit(WALLET, 500) == Balance(1_000, credit_limit=500)
    await run_task(rig.store, "a", 1_200)
    assert await rig.store.balance(WALLET) == Balance(1_000, 1_200, 0, 500)
    answer = await rig.store.reserve(request("b", 301))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.limit_status.available) == ("insufficient_credits", 300)
    assert await amount(rig.store.reserve(request("c", 10, 900))) == 300
    assert await findings(rig) == []
    [summary] = await rig.store.list_accounts(limit=1)
    assert summary.live == Balance(1_000, 1_200, 300, 500)


async def test_a_credit_limit_is_not_set_below_what_is_used_of_it(rig: Rig) -> None:
    await rig.store.set_credit_limit(WALLET, 500)
    await run_task(rig.store, "a", 1_200)
    for limit in (0, 199):
        with pytest.raises(OverdrawnError):
            await rig.store.set_credit_limit(WALLET, limit)
    assert await rig.store.set_credit_limit(WALLET, 200) == Balance(1_000, 1_200, 0, 200)
    await rig.store.grant(Grant("paid", WALLET, 200, 3.0))
    assert await rig.store.set_credit_limit(WALLET, 0) == Balance(1_200, 1_200)
    assert await findings(rig) == []


async def test_a_new_wallet_can_be_postpaid(rig: Rig) -> None:
    test = Wallet(WALLET.account, False)
    await rig.store.set_credit_limit(test, 50)
    assert await amount(rig.store.reserve(request("a", 50, live=False))) == 50
    await rig.store.settle(settlement("a", 50, live=False))
    await rig.crash()
    assert await rig.store.balance(test) == Balance(0, 50, 0, 50)
    [summary] = await rig.store.list_accounts(limit=1)
    assert (summary.live, summary.test) == (Balance(1_000), Balance(0, 50, 0, 50))
    assert await refusal(rig.store.reserve(request("b", 1, live=False))) == "insufficient_credits"
    assert await findings(rig) == []


async def test_concurrent_changes_of_a_limit_and_tasks_never_overdraw_a_wallet(rig: Rig) -> None:
    await rig.store.grant(taken(1_000))
    await rig.store.set_credit_limit(WALLET, 1_000)

    async def reserve(number: int) -> int:
        answer = await rig.store.reserve(request(f"t{number}", 100))
        return answer.amount if isinstance(answer, Reserved) else 0

    async def change(limit: int) -> None:
        with suppress(OverdrawnError):
            await rig.store.set_credit_limit(WALLET, limit)

    limits = [900, 1_400, 300, 1_500, 1_100, 1_600, 0, 1_200, 800, 1_300]
    work = [job for number in range(20) for job in (reserve(number), change(limits[number % 10]))]
    results = await asyncio.gather(*work)
    found = await rig.store.balance(WALLET)
    assert found.held == sum(each for each in results if each)
    assert found.available >= 0
    assert await findings(rig) == []


async def test_a_task_between_two_changes_of_a_limit_does_not_overdraw_a_wallet(rig: Rig) -> None:
    await rig.store.set_credit_limit(WALLET, 500)
    raised = asyncio.ensure_future(rig.store.set_credit_limit(WALLET, 700))
    lowered = asyncio.ensure_future(rig.store.set_credit_limit(WALLET, 500))
    await raised
    await rig.store.reserve(request("a", 1_700))
    with suppress(OverdrawnError):
        await lowered
    assert (await rig.store.balance(WALLET)).available >= 0
    assert await findings(rig) == []


async def test_what_a_task_that_is_ending_releases_is_available(rig: Rig) -> None:
    await rig.store.reserve(request("a", 1_000))
    settling = rig.store.settle(settlement("a", 0))
    assert isinstance(await rig.store.reserve(request("b", 1_000)), Reserved)
    await settling
    settling = rig.store.settle(settlement("b", 0))
    await rig.store.grant(taken(1_000))
    await settling
    assert await rig.store.balance(WALLET) == Balance()


async def test_credits_that_are_being_taken_back_can_not_be_reserved(rig: Rig) -> None:
    taking = asyncio.ensure_future(rig.store.grant(taken(1_000)))
    await asyncio.sleep(0)
    reserving = await rig.store.reserve(request("a", 1_000))
    try:
        await taking
    except OverdrawnError:
        assert isinstance(reserving, Reserved)
    else:
        assert isinstance(reserving, Refused)
    assert (await rig.store.balance(WALLET)).available == 0


async def test_a_withdrawal_of_more_than_is_available_takes_nothing_meanwhile(rig: Rig) -> None:
    await rig.store.reserve(request("a", 0))
    taking = asyncio.ensure_future(rig.store.grant(taken(1_001)))
    await asyncio.sleep(0)
    assert await amount(rig.store.reserve(request("b", 1_000))) == 1_000
    with pytest.raises(OverdrawnError):
        await taking
    assert await rig.store.balance(WALLET) == Balance(1_000, 0, 1_000)


async def test_a_task_can_end_in_a_wallet_without_credits_whose_limit_was_set_to_what_it_was(
    rig: Rig,
) -> None:
    await rig.store.add_account("bee", "pro", 1.0)
    assert await rig.store.set_credit_limit(Wallet("bee", True), 0) == Balance()
    await run_task(rig.store, "a", 0, account="bee")
    assert await rig.store.balance(Wallet("bee", True)) == Balance()
