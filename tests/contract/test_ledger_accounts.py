"""The accounts and usage roles of every store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.stores.accounts import (
    DEFAULT_ACCOUNT,
    AccountRecord,
    Balance,
    Grant,
    OverdrawnError,
    UnknownAccountError,
    Wallet,
)
from pomelo.stores.base import Store
from pomelo.stores.usage import DIMENSIONS, Dimension, UsageQuery, UsageRecord, UsageTotal, WalletState
from tests.contract.ledger_rig import WALLET, Rig, held, record, request, run_task, settlement, wallets

ALL = UsageQuery()
TEST = Wallet("acme", False)
MIDNIGHT = 1_795_478_400.0
"""2026-11-24, in UTC."""


async def plan(rig: Rig, account: str) -> str:
    """The plan of an account."""
    found = await rig.store.get_account(account)
    assert found is not None
    return found.plan


# --- accounts and grants


async def test_an_account_is_created_once_and_read_back_unchanged(rig: Rig) -> None:
    assert await rig.store.add_account("bee", "free", 2.5)
    assert not await rig.store.add_account("bee", "scale", 9.0)
    assert await rig.store.get_account("bee") == AccountRecord("bee", "free", 2.5)
    assert await rig.store.get_account("nobody") is None
    assert not await rig.store.add_account(DEFAULT_ACCOUNT, "free", 2.0)


async def test_accounts_are_listed_by_name(rig: Rig) -> None:
    for name in ("zoe", "bee", "Ann"):
        await rig.store.add_account(name, "free", 2.0)
    names = [account.name for account in await rig.store.list_accounts()]
    assert names == ["Ann", "acme", "bee", "default", "zoe"]


async def test_accounts_are_listed_page_by_page_with_their_balances(rig: Rig) -> None:
    for name in ("zoe", "bee", "Ann", "{b}", "be", "bee-2"):
        await rig.store.add_account(name, "free", 2.0)
    await rig.store.grant(Grant("bee", Wallet("bee", False), 70, 2.0))
    await rig.store.reserve(request("a", 100))
    await rig.store.settle(settlement("a", 30))
    await rig.store.reserve(request("b", 100))
    for limit in range(1, 10):
        found, after = [], ""
        while page := await rig.store.list_accounts(limit=limit, after=after):
            assert len(page) <= limit
            found += page
            after = page[-1].name
        assert [one.name for one in found] == ["Ann", "acme", "be", "bee", "bee-2", "default", "zoe", "{b}"]
        by_name = {one.name: one for one in found}
        assert (by_name["acme"].live, by_name["acme"].test) == (Balance(1_000, 30, 100), Balance())
        assert (by_name["bee"].live, by_name["bee"].test) == (Balance(), Balance(70))
        assert (by_name["acme"].plan, by_name["acme"].created) == ("pro", 1.0)


async def test_concurrent_creations_of_one_account_succeed_once(rig: Rig) -> None:
    created = await asyncio.gather(*(rig.store.add_account("bee", f"plan{n}", 1.0) for n in range(20)))
    assert sum(created) == 1
    assert await plan(rig, "bee") == f"plan{created.index(True)}"


async def test_changing_the_plan_changes_nothing_else(rig: Rig) -> None:
    assert await rig.store.set_plan("acme", "scale")
    assert await rig.store.get_account("acme") == AccountRecord("acme", "scale", 1.0)
    assert not await rig.store.set_plan("nobody", "scale")
    assert await rig.store.get_account("nobody") is None


async def test_the_default_account_starts_with_test_credits(rig: Rig) -> None:
    assert await plan(rig, DEFAULT_ACCOUNT) == "pro"
    assert await rig.store.balance(Wallet(DEFAULT_ACCOUNT, False)) == Balance(granted=100_000_000)
    assert await rig.store.balance(Wallet(DEFAULT_ACCOUNT, True)) == Balance()
    [grant] = await rig.store.list_grants(Wallet(DEFAULT_ACCOUNT, False))
    assert grant.amount == 100_000_000


async def test_a_grant_adds_to_one_wallet_and_returns_its_balance(rig: Rig) -> None:
    await rig.store.reserve(request("a", 100))
    assert await rig.store.grant(Grant("g", WALLET, 50, 2.0, "gift")) == Balance(1_050, 0, 100)
    assert await rig.store.balance(WALLET) == Balance(1_050, 0, 100)
    assert await rig.store.balance(TEST) == Balance()


async def test_a_grant_id_is_granted_once(rig: Rig) -> None:
    grant = Grant("g", WALLET, 50, 2.0)
    for again in (grant, grant, Grant("g", WALLET, 70, 3.0)):
        assert await rig.store.grant(again) == Balance(1_050)
    # Nor in another wallet, whose balance is returned.
    assert await rig.store.grant(Grant("g", TEST, 50, 2.0)) == Balance()
    assert await rig.store.list_grants(WALLET) == [Grant("first", WALLET, 1_000, 1.0), grant]
    assert await rig.store.list_grants(TEST) == []
    assert TEST not in await wallets(rig.store)


async def test_concurrent_grants_with_one_id_are_granted_once(rig: Rig) -> None:
    await asyncio.gather(*(rig.store.grant(Grant("g", WALLET, 50, 2.0)) for _ in range(50)))
    assert await rig.store.balance(WALLET) == Balance(1_050)


async def test_a_grant_to_an_unknown_account_is_refused_and_does_not_use_up_its_id(rig: Rig) -> None:
    with pytest.raises(UnknownAccountError):
        await rig.store.grant(Grant("g", Wallet("nobody", True), 50, 2.0))
    assert await rig.store.list_grants(Wallet("nobody", True)) == []
    assert await rig.store.grant(Grant("g", WALLET, 50, 2.0)) == Balance(1_050)


async def test_grants_are_listed_oldest_first_with_all_fields(rig: Rig) -> None:
    grants = [Grant(f"g{n}", TEST, n + 1, at, f"ünï {n}") for n, at in enumerate((7.5, 3.25, 5.0))]
    for grant in grants:
        await rig.store.grant(grant)
    assert await rig.store.list_grants(TEST) == [grants[1], grants[2], grants[0]]


async def test_a_grant_is_found_by_its_id_and_wallet(rig: Rig) -> None:
    grant = Grant("g", TEST, 7, 2.5, "ünï 1 {2}")
    await rig.store.grant(grant)
    assert await rig.store.get_grant(TEST, "g") == grant
    assert await rig.store.get_grant(WALLET, "g") is None
    assert await rig.store.get_grant(TEST, "nothing") is None


async def test_large_amounts_are_exact(rig: Rig) -> None:
    await rig.store.grant(Grant("g", TEST, 2**52, 2.0))
    await run_task(rig.store, "a", 2**52 - 1, live=False, output_tokens=2**52 + 1)
    assert await rig.store.balance(TEST) == Balance(2**52, 2**52 - 1)
    [total] = await rig.store.sum_usage(UsageQuery(live=False), ("model",))
    assert (total.cost, total.output_tokens) == (2**52 - 1, 2**52 + 1)


async def test_accounts_and_balances_survive_a_restart(rig: Rig) -> None:
    await run_task(rig.store, "a", 30)
    await rig.store.set_plan("acme", "scale")
    await rig.close()
    await rig.open()
    assert await rig.store.balance(WALLET) == Balance(1_000, 30)
    assert await plan(rig, "acme") == "scale"
    assert len((await rig.store.list_usage(ALL, limit=9))[0]) == 1


# --- usage


@pytest.fixture(name="store_with_usage")
async def _store_with_usage(rig: Rig) -> Store:
    """A store in which nine tasks were settled, over three days."""
    await rig.store.add_account("bee", "pro", 1.0)
    await rig.store.grant(Grant("bee", Wallet("bee", True), 1_000, 1.0))
    await rig.store.grant(Grant("test", TEST, 1_000, 1.0))
    for number, (account, live, model, key) in enumerate(
        [("acme", True, "gpt-4", "k1"), ("acme", False, "claude", "k2"), ("bee", True, "gpt-4", "k3")] * 3
    ):
        at = MIDNIGHT + (number - 3) * 28_800  # three a day, the first at midnight
        await run_task(
            rig.store, f"t{number}", number + 1, account=account, live=live, model=model, key_id=key, at=at,
            input_tokens=1, output_tokens=2, characters=3, images=4, audio_ms=5, output_bytes=6,
        )  # fmt: skip
    return rig.store


def ids(page: tuple[list[UsageRecord], str]) -> str:
    return "".join(record.task_id[1:] for record in page[0])


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (UsageQuery(account="acme"), "764310"),
        (UsageQuery(live=True), "865320"),
        (UsageQuery(live=False), "741"),
        (UsageQuery(account="acme", live=True), "630"),
        (UsageQuery(model="gpt-4"), "865320"),
        (UsageQuery(key_id="k2"), "741"),
        (UsageQuery(since=MIDNIGHT), "876543"),
        (UsageQuery(until=MIDNIGHT), "210"),
        (UsageQuery(since=MIDNIGHT, until=MIDNIGHT + 86_400), "543"),
        (UsageQuery("acme", True, "gpt-4", "k1", MIDNIGHT, MIDNIGHT + 1), "3"),
        (UsageQuery(account="acme", model="nothing"), ""),
        (UsageQuery(account="' OR 1=1 --"), ""),
    ],
)
async def test_a_query_finds_the_records_that_match_all_its_filters(
    store_with_usage: Store, query: UsageQuery, found: str
) -> None:
    assert ids(await store_with_usage.list_usage(query, limit=100)) == found
    assert sum(total.tasks for total in await store_with_usage.sum_usage(query, ("model",))) == len(found)


async def test_records_are_listed_newest_first_page_by_page(store_with_usage: Store) -> None:
    for limit in range(1, 11):
        seen, after = "", ""
        while True:
            page = await store_with_usage.list_usage(ALL, limit=limit, after=after)
            assert len(page[0]) <= limit
            seen, after = seen + ids(page), page[1]
            if not after:
                break
        assert seen == "876543210"


async def test_pages_only_have_the_records_of_the_query(store_with_usage: Store) -> None:
    page = await store_with_usage.list_usage(UsageQuery(account="acme"), limit=4)
    assert ids(page) == "7643"
    page = await store_with_usage.list_usage(UsageQuery(account="acme"), limit=4, after=page[1])
    assert (ids(page), page[1]) == ("10", "")


async def test_new_records_do_not_shift_pages(store_with_usage: Store) -> None:
    page = await store_with_usage.list_usage(ALL, limit=4)
    for name, at in (("tx", MIDNIGHT * 2), ("ty", MIDNIGHT + 5 * 28_800)):
        await run_task(store_with_usage, name, 1, at=at)
    assert ids(await store_with_usage.list_usage(ALL, limit=4, after=page[1])) == "4321"


async def test_records_with_equal_times_are_listed_once_each(rig: Rig) -> None:
    for number in range(25):
        await run_task(rig.store, f"t{number}", 1, at=5.0)
    seen, after = [], ""
    while True:
        page, after = await rig.store.list_usage(ALL, limit=4, after=after)
        seen += [record.task_id for record in page]
        if not after:
            break
    assert sorted(seen) == sorted(f"t{number}" for number in range(25))


@pytest.mark.parametrize("after", ["x", "0", "-1", "zz" * 16, "' OR 1=1 --", "ü" * 32, "0" * 99])
async def test_an_invalid_page_position_is_an_error(store_with_usage: Store, after: str) -> None:
    with pytest.raises(ValueError, match="after"):
        await store_with_usage.list_usage(ALL, limit=4, after=after)


@pytest.mark.parametrize("by", DIMENSIONS)
async def test_sums_are_returned_page_by_page(store_with_usage: Store, by: Dimension) -> None:
    for query in (ALL, UsageQuery(account="acme"), UsageQuery(account="acme", live=True, model="gpt-4")):
        whole = await store_with_usage.sum_usage(query, (by,))
        for limit in range(1, 5):
            found, after = [], None
            while page := await store_with_usage.sum_usage(query, (by,), limit=limit, after=after):
                assert len(page) <= limit
                found += page
                after = page[-1].groups
            assert found == whole


async def test_a_sum_has_every_count(rig: Rig) -> None:
    await rig.store.reserve(request("a", 900))
    counts: dict[str, Any] = {
        "input_tokens": 1,
        "output_tokens": 2,
        "characters": 3,
        "images": 4,
        "audio_ms": 5,
    }
    await rig.store.settle(settlement("a", 1_100, **counts, output_bytes=6, at=MIDNIGHT))
    assert await rig.store.sum_usage(ALL, ("day",)) == [
        UsageTotal(("2026-11-24",), 1, 1, 2, 3, 4, 5, 6, cost=1_000, uncollected=100)
    ]


async def test_without_records_there_are_no_sums(rig: Rig) -> None:
    assert await rig.store.sum_usage(ALL, ("model",)) == []
    assert await rig.store.list_usage(ALL, limit=5) == ([], "")


async def test_a_record_can_be_read_as_soon_as_its_settlement_was_awaited(rig: Rig) -> None:
    for number in range(50):
        await run_task(rig.store, f"t{number}", 1, at=float(number))
        [newest], _ = await rig.store.list_usage(ALL, limit=1)
        assert newest.task_id == f"t{number}"


async def test_drafts_of_running_tasks_have_what_was_noted(rig: Rig) -> None:
    await rig.store.reserve(request("a", 300, request_id="req-ü", provider="openai"))
    await rig.store.reserve(request("b", 0))
    noted = record("a", cost=7, output_tokens=3, provider="openai", prices="image=5")
    await rig.store.note([noted])
    found = sorted(await rig.store.drafts(), key=lambda draft: draft.task_id)
    assert found == [noted, record("b")]
    await rig.store.void(WALLET, "b")
    await rig.store.settle(settlement("a", 7))
    assert await rig.store.drafts() == []


async def test_the_held_amount_is_the_sum_of_the_reservations(rig: Rig) -> None:
    other = Wallet("nobody", False)
    assert await held(rig.store, WALLET) == await held(rig.store, other) == (0, 0)
    await rig.store.reserve(request("a", 300))
    await rig.store.reserve(request("b", 11))
    assert await held(rig.store, WALLET) == (311, 311)
    assert await held(rig.store, other) == (0, 0)
    await rig.store.settle(settlement("a", 7))
    assert await held(rig.store, WALLET) == (11, 11)
    await rig.store.void(WALLET, "b")
    assert await held(rig.store, WALLET) == (0, 0)


async def test_the_state_of_a_wallet_has_its_balance_and_the_sums_of_grants_and_reservations(
    rig: Rig,
) -> None:
    await rig.store.add_account("bee", "pro", 1.0)
    await rig.store.grant(Grant("more", WALLET, 5, 1.0, '{"amount": 9}'))
    await rig.store.grant(Grant("test", TEST, 7, 1.0))
    await rig.store.reserve(request("a", 300))
    await rig.store.reserve(request("b", 11))
    await rig.store.settle(settlement("a", 100))
    found = {state.wallet: state async for page in rig.store.wallet_states() for state in page}
    assert found.pop(Wallet(DEFAULT_ACCOUNT, False)).grants_sum == 100_000_000
    assert found == {
        WALLET: WalletState(WALLET, Balance(1_005, 100, 11), grants_sum=1_005, reservations_sum=11),
        TEST: WalletState(TEST, Balance(7), grants_sum=7, reservations_sum=0),
    }


async def test_the_id_of_a_grant_that_was_refused_may_be_that_of_another_wallet(rig: Rig) -> None:
    with pytest.raises(OverdrawnError):
        await rig.store.grant(Grant("back", WALLET, -1_001, 1.0))
    assert (await rig.store.grant(Grant("back", TEST, 7, 1.0))).granted == 7
    assert await rig.store.get_grant(WALLET, "back") is None
    assert (await rig.store.grant(Grant("back", WALLET, 5, 1.0))).granted == 1_000


async def test_every_wallet_with_a_grant_a_credit_limit_or_a_task_is_listed_once(rig: Rig) -> None:
    await rig.store.add_account("bee", "pro", 1.0)
    await rig.store.add_account("cat", "pro", 1.0)
    await rig.store.grant(Grant("again", WALLET, 5, 1.0))
    await rig.store.set_credit_limit(Wallet("cat", False), 5)
    await run_task(rig.store, "a", 0, account="bee")
    await rig.store.reserve(request("b", 5, live=False))  # refused
    found = await wallets(rig.store)
    assert len(found) == len(set(found))
    assert {wallet for wallet in found if wallet.account != DEFAULT_ACCOUNT} == {
        WALLET, Wallet("bee", True), Wallet("cat", False)
    }  # fmt: skip
