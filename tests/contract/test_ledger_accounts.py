"""What every store keeps to about accounts, grants, and the reading of usage records."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.stores.accounts import DEFAULT_ACCOUNT, AccountRecord, Balance, Grant, UnknownAccountError, Wallet
from pomelo.stores.usage import GROUPS, UsageQuery, UsageTotal, WalletState
from tests.contract.ledger_rig import WALLET, held, record, request, rig, run_task, settlement, wallets

__all__ = ["rig"]

ALL = UsageQuery()
TEST = Wallet("acme", False)
MIDNIGHT = 1_795_478_400.0
"""2026-11-24, in UTC."""


# --- accounts and grants


async def test_an_account_is_made_once_and_comes_back_as_it_was_made(rig):
    assert await rig.store.add_account("bee", "free", 2.5)
    assert not await rig.store.add_account("bee", "scale", 9.0)
    assert await rig.store.get_account("bee") == AccountRecord("bee", "free", 2.5)
    assert await rig.store.get_account("nobody") is None
    assert not await rig.store.add_account(DEFAULT_ACCOUNT, "free", 2.0)


async def test_accounts_are_listed_by_name(rig):
    for name in ("zoe", "bee", "Ann"):
        await rig.store.add_account(name, "free", 2.0)
    names = [account.name for account in await rig.store.list_accounts()]
    assert names == ["Ann", "acme", "bee", "default", "zoe"]


async def test_accounts_are_listed_page_by_page_with_their_balances(rig):
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


async def test_of_many_who_make_one_account_one_does(rig):
    made = await asyncio.gather(*(rig.store.add_account("bee", f"plan{n}", 1.0) for n in range(20)))
    assert sum(made) == 1
    assert (await rig.store.get_account("bee")).plan == f"plan{made.index(True)}"


async def test_a_plan_is_changed_and_nothing_else(rig):
    assert await rig.store.set_plan("acme", "scale")
    assert await rig.store.get_account("acme") == AccountRecord("acme", "scale", 1.0)
    assert not await rig.store.set_plan("nobody", "scale")
    assert await rig.store.get_account("nobody") is None


async def test_the_account_that_every_store_has_begins_with_test_credits(rig):
    assert (await rig.store.get_account(DEFAULT_ACCOUNT)).plan == "pro"
    assert await rig.store.balance(Wallet(DEFAULT_ACCOUNT, False)) == Balance(granted=100_000_000)
    assert await rig.store.balance(Wallet(DEFAULT_ACCOUNT, True)) == Balance()
    [grant] = await rig.store.list_grants(Wallet(DEFAULT_ACCOUNT, False))
    assert grant.amount == 100_000_000


async def test_a_grant_adds_to_one_wallet_and_the_balance_comes_back(rig):
    await rig.store.reserve(request("a", 100))
    assert await rig.store.grant(Grant("g", WALLET, 50, 2.0, "gift")) == Balance(1_050, 0, 100)
    assert await rig.store.balance(WALLET) == Balance(1_050, 0, 100)
    assert await rig.store.balance(TEST) == Balance()


async def test_a_grant_happens_once_for_its_id(rig):
    given = Grant("g", WALLET, 50, 2.0)
    for again in (given, given, Grant("g", WALLET, 70, 3.0)):
        assert await rig.store.grant(again) == Balance(1_050)
    # Not even in another wallet, whose balance comes back.
    assert await rig.store.grant(Grant("g", TEST, 50, 2.0)) == Balance()
    assert await rig.store.list_grants(WALLET) == [Grant("first", WALLET, 1_000, 1.0), given]
    assert await rig.store.list_grants(TEST) == []
    assert TEST not in await wallets(rig.store)


async def test_a_grant_many_times_at_once_happens_once(rig):
    await asyncio.gather(*(rig.store.grant(Grant("g", WALLET, 50, 2.0)) for _ in range(50)))
    assert await rig.store.balance(WALLET) == Balance(1_050)


async def test_a_grant_to_an_unknown_account_is_refused_and_its_id_stays_free(rig):
    with pytest.raises(UnknownAccountError):
        await rig.store.grant(Grant("g", Wallet("nobody", True), 50, 2.0))
    assert await rig.store.list_grants(Wallet("nobody", True)) == []
    assert await rig.store.grant(Grant("g", WALLET, 50, 2.0)) == Balance(1_050)


async def test_grants_are_listed_oldest_first_with_all_that_they_say(rig):
    given = [Grant(f"g{n}", TEST, n + 1, at, f"ünï {n}") for n, at in enumerate((7.5, 3.25, 5.0))]
    for grant in given:
        await rig.store.grant(grant)
    assert await rig.store.list_grants(TEST) == [given[1], given[2], given[0]]


async def test_a_grant_is_found_by_its_id_and_wallet(rig):
    given = Grant("g", TEST, 7, 2.5, "ünï 1 {2}")
    await rig.store.grant(given)
    assert await rig.store.get_grant(TEST, "g") == given
    assert await rig.store.get_grant(WALLET, "g") is None
    assert await rig.store.get_grant(TEST, "nothing") is None


async def test_what_is_large_stays_exact(rig):
    await rig.store.grant(Grant("g", TEST, 2**52, 2.0))
    await run_task(rig.store, "a", 2**52 - 1, live=False, output_tokens=2**52 + 1)
    assert await rig.store.balance(TEST) == Balance(2**52, 2**52 - 1)
    [total] = await rig.store.sum_usage(UsageQuery(live=False), "model")
    assert (total.cost, total.output_tokens) == (2**52 - 1, 2**52 + 1)


async def test_accounts_and_money_outlive_the_process(rig):
    await run_task(rig.store, "a", 30)
    await rig.store.set_plan("acme", "scale")
    await rig.close()
    await rig.open()
    assert await rig.store.balance(WALLET) == Balance(1_000, 30)
    assert (await rig.store.get_account("acme")).plan == "scale"
    assert len((await rig.store.list_usage(ALL, limit=9))[0]) == 1


# --- usage


@pytest.fixture(name="used")
async def _used(rig):
    """A store in which nine tasks were settled, over three days."""
    await rig.store.add_account("bee", "pro", 1.0)
    await rig.store.grant(Grant("bee", Wallet("bee", True), 1_000, 1.0))
    await rig.store.grant(Grant("test", TEST, 1_000, 1.0))
    for number, (account, live, model, key) in enumerate(
        [("acme", True, "gpt-4", "k1"), ("acme", False, "claude", "k2"), ("bee", True, "gpt-4", "k3")] * 3
    ):
        at = MIDNIGHT + (number - 3) * 28_800  # Three a day, the first at midnight.
        await run_task(
            rig.store, f"t{number}", number + 1, account=account, live=live, model=model, key_id=key, at=at,
            input_tokens=1, output_tokens=2, characters=3, images=4, audio_ms=5, output_bytes=6,
        )  # fmt: skip
    return rig.store


def ids(page) -> str:
    return "".join(record.task_id[1:] for record in page[0])


async def test_records_are_listed_newest_first(used):
    assert ids(await used.list_usage(ALL, limit=100)) == "876543210"


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
async def test_a_query_finds_what_fits_all_that_is_given(used, query, found):
    assert ids(await used.list_usage(query, limit=100)) == found
    assert sum(total.tasks for total in await used.sum_usage(query, "model")) == len(found)


async def test_pages_go_on_where_the_last_one_ended(used):
    for limit in range(1, 11):
        seen, after = "", ""
        while True:
            page = await used.list_usage(ALL, limit=limit, after=after)
            assert len(page[0]) <= limit
            seen, after = seen + ids(page), page[1]
            if not after:
                break
        assert seen == "876543210"


async def test_pages_are_of_the_query(used):
    page = await used.list_usage(UsageQuery(account="acme"), limit=4)
    assert ids(page) == "7643"
    page = await used.list_usage(UsageQuery(account="acme"), limit=4, after=page[1])
    assert (ids(page), page[1]) == ("10", "")


async def test_records_that_come_meanwhile_shift_nothing(used):
    page = await used.list_usage(ALL, limit=4)
    for name, at in (("tx", MIDNIGHT * 2), ("ty", MIDNIGHT + 5 * 28_800)):
        await run_task(used, name, 1, at=at)
    assert ids(await used.list_usage(ALL, limit=4, after=page[1])) == "4321"


async def test_records_of_one_moment_are_all_listed_once(rig):
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
async def test_a_place_that_was_not_given_is_an_error(used, after):
    with pytest.raises(ValueError, match="after"):
        await used.list_usage(ALL, limit=4, after=after)


@pytest.mark.parametrize(
    ("by", "tasks", "cost"),
    [
        ("model", {"claude": 3, "gpt-4": 6}, {"claude": 15, "gpt-4": 30}),
        ("key", {"k1": 3, "k2": 3, "k3": 3}, {"k1": 12, "k2": 15, "k3": 18}),
        ("account", {"acme": 6, "bee": 3}, {"acme": 27, "bee": 18}),
        (
            "day",
            {"2026-11-23": 3, "2026-11-24": 3, "2026-11-25": 3},
            {"2026-11-23": 6, "2026-11-24": 15, "2026-11-25": 24},
        ),
    ],
)
async def test_sums_are_by_group_and_in_order(used, by, tasks, cost):
    totals = await used.sum_usage(ALL, by)
    assert [total.group for total in totals] == sorted(tasks)
    assert {total.group: total.tasks for total in totals} == tasks
    assert {total.group: total.cost for total in totals} == cost


@pytest.mark.parametrize("by", GROUPS)
async def test_sums_are_given_page_by_page(used, by):
    for query in (ALL, UsageQuery(account="acme"), UsageQuery(account="acme", live=True, model="gpt-4")):
        whole = await used.sum_usage(query, by)
        for limit in range(1, 5):
            found, after = [], ""
            while page := await used.sum_usage(query, by, limit=limit, after=after):
                assert len(page) <= limit
                found += page
                after = page[-1].group
            assert found == whole


async def test_a_sum_has_every_count(rig):
    await rig.store.reserve(request("a", 900))
    counts = {"input_tokens": 1, "output_tokens": 2, "characters": 3, "images": 4, "audio_ms": 5}
    await rig.store.settle(settlement("a", 1_100, **counts, output_bytes=6, at=MIDNIGHT))
    assert await rig.store.sum_usage(ALL, "day") == [
        UsageTotal("2026-11-24", 1, 1, 2, 3, 4, 5, 6, cost=1_000, uncollected=100)
    ]


async def test_without_records_there_are_no_sums(rig):
    assert await rig.store.sum_usage(ALL, "model") == []
    assert await rig.store.list_usage(ALL, limit=5) == ([], "")


async def test_sums_are_by_what_there_is(rig):
    with pytest.raises(ValueError, match="by"):
        await rig.store.sum_usage(ALL, "wire")


async def test_a_record_can_be_read_as_soon_as_its_settlement_was_awaited(rig):
    for number in range(50):
        await run_task(rig.store, f"t{number}", 1, at=float(number))
        [newest], _ = await rig.store.list_usage(ALL, limit=1)
        assert newest.task_id == f"t{number}"


async def test_what_running_tasks_hold_is_told_with_what_was_noted(rig):
    await rig.store.reserve(request("a", 300, request_id="req-ü", provider="openai"))
    await rig.store.reserve(request("b", 0))
    noted = record("a", cost=7, output_tokens=3, provider="openai", prices="image=5")
    await rig.store.note([noted])
    found = sorted(await rig.store.drafts(), key=lambda held: held.task_id)
    assert found == [noted, record("b")]
    await rig.store.void(WALLET, "b")
    await rig.store.settle(settlement("a", 7))
    assert await rig.store.drafts() == []


async def test_what_is_held_is_what_tasks_hold(rig):
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


async def test_the_state_of_a_wallet_has_its_balance_and_the_sums_of_grants_and_holds(rig):
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


async def test_every_wallet_that_had_a_grant_or_a_hold_is_told_once(rig):
    await rig.store.add_account("bee", "pro", 1.0)
    await rig.store.grant(Grant("again", WALLET, 5, 1.0))
    await run_task(rig.store, "a", 0, account="bee")
    await rig.store.reserve(request("b", 5, live=False))  # Refused.
    found = await wallets(rig.store)
    assert len(found) == len(set(found))
    assert {wallet for wallet in found if wallet.account != DEFAULT_ACCOUNT} == {WALLET, Wallet("bee", True)}
