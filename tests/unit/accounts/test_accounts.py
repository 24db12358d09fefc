"""Accounts: what the operator's office does with them, and what a key's holder sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.accounts.access import Access
from pomelo.accounts.accounts import AccountAdmin, LocalAccounts
from pomelo.accounts.plans import BUILTIN, TEST_CREDITS, Plan
from pomelo.accounts.usage import UsageReader
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.stores import open_store
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from tests.unit.accounts.audited_store import run

CREDIT = 1_000_000


@pytest.fixture
async def store(tmp_path) -> AsyncIterator[Store]:
    async with open_store(f"sqlite:{tmp_path / 'pomelo.db'}") as opened:
        yield opened


@pytest.fixture
def changed() -> list[str]:
    """The accounts whose plan was changed."""
    return []


@pytest.fixture
def office(store, changed) -> AccountAdmin:
    plans = {**BUILTIN, "team": Plan("team", concurrent=3, models=frozenset({"gpt-4", "flux-1-pro"}))}
    return AccountAdmin(store, plans, plan_changed=changed.append, now=lambda: 1234.5)


async def refusal(asked) -> tuple[str, str | None]:
    with pytest.raises(PomeloError) as caught:
        await asked
    return caught.value.code, caught.value.field


async def test_a_new_account_is_free_and_has_test_credits_once(office, store):
    made = await office.create("acme", "", 0)
    assert (made.name, made.plan, made.create_time.ToMilliseconds()) == ("acme", "free", 1_234_500)
    assert made.limits == pb.PlanLimits(
        requests_per_minute=20, concurrent_requests=2, tokens_per_minute=40_000
    )
    assert made.live == pb.Balance()
    assert made.test == pb.Balance(granted_micros=TEST_CREDITS, available_micros=TEST_CREDITS)
    assert await refusal(office.create("acme", "pro", CREDIT)) == ("invalid_parameter", "name")
    assert await office.show("acme") == made
    (grant,) = await store.list_grants(Wallet("acme", False))
    assert grant.amount == TEST_CREDITS


async def test_a_new_account_has_the_plan_and_the_credits_that_are_named(office):
    made = await office.create("acme", "team", 5 * CREDIT)
    assert made.limits == pb.PlanLimits(concurrent_requests=3, models=["flux-1-pro", "gpt-4"])
    assert made.live == pb.Balance(granted_micros=5 * CREDIT, available_micros=5 * CREDIT)


@pytest.mark.parametrize(
    ("name", "plan", "micros", "field"),
    [
        ("", "", 0, "name"),
        ("a b", "", 0, "name"),
        ("a/b", "", 0, "name"),
        ("ä", "", 0, "name"),
        ("a\n", "", 0, "name"),
        ("n" * 65, "", 0, "name"),
        ("acme", "nothing", 0, "plan"),
        ("acme", "", -1, "live_micros"),
        ("acme", "", 2**62, "live_micros"),
    ],
)
async def test_an_account_that_can_not_be_made_is_refused_and_not_made(office, name, plan, micros, field):
    assert (await refusal(office.create(name, plan, micros)))[1] == field
    assert [account.name for account in (await office.list(0, ""))[0]] == ["default"]


async def test_credits_are_given_once_for_each_id(office):
    await office.create("acme", "", 0)
    for _ in range(3):
        after = await office.grant("acme", 7, live=True, note="thanks", grant_id="order-1")
        assert after.live.granted_micros == 7
    assert (await office.grant("acme", 7, live=True)).live.granted_micros == 14
    assert (await office.grant("acme", 7, live=True)).live.granted_micros == 21
    assert (await office.grant("acme", 7, live=False)).test.granted_micros == TEST_CREDITS + 7


async def test_an_id_that_another_grant_has_is_refused_and_gives_nothing(office):
    await office.create("acme", "", 0)
    await office.grant("acme", 7, live=True, grant_id="order-1")
    before = (await office.list(0, ""))[0]
    for name, amount, live in (("acme", 8, True), ("acme", 7, False), ("default", 7, True)):
        asked = office.grant(name, amount, live=live, grant_id="order-1")
        assert await refusal(asked) == ("invalid_parameter", "grant_id")
    assert (await office.list(0, ""))[0] == before


@pytest.mark.parametrize(
    ("name", "amount", "more", "field"),
    [
        ("", 1, {}, "name"),
        ("nobody", 1, {}, "name"),
        ("default", 0, {}, "amount_micros"),
        ("default", -1, {}, "amount_micros"),
        ("default", 2**60, {}, "amount_micros"),
        ("default", 1, {"note": "n" * 201}, "note"),
        ("default", 1, {"grant_id": "g" * 65}, "grant_id"),
        ("default", 1, {"grant_id": "test:default"}, "grant_id"),
    ],
)
async def test_a_grant_that_can_not_be_given_is_refused(office, name, amount, more, field):
    before = (await office.list(0, ""))[0]
    assert (await refusal(office.grant(name, amount, live=True, **more)))[1] == field
    assert (await office.list(0, ""))[0] == before


async def test_nobody_is_given_more_than_any_store_counts_exactly(office):
    for _ in range(9):
        await office.grant("default", 10**15, live=True)
    assert await refusal(office.grant("default", 1, live=True)) == ("invalid_parameter", "amount_micros")


async def test_a_change_of_plan_is_told_and_one_to_nowhere_refused(office, changed):
    assert (await office.set_plan("default", "team")).plan == "team"
    assert changed == ["default"]
    assert await refusal(office.set_plan("default", "nothing")) == ("invalid_parameter", "plan")
    assert await refusal(office.set_plan("default", "")) == ("missing_parameter", "plan")
    assert await refusal(office.set_plan("nobody", "pro")) == ("not_found", "name")
    assert changed == ["default"]


async def test_an_account_whose_plan_is_gone_is_told_without_limits(store, office):
    await store.set_plan("default", "old")
    for found in (await office.show("default"), ((await office.list(0, ""))[0])[0]):
        assert found.plan == "old"
        assert not found.HasField("limits")


# --- the holder of a key


class OneKey:
    """Takes every call for one of this principal."""

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    async def authenticate(self, call: Call) -> Principal:
        return self._principal


def accounts_of(store: Store, live: bool, account: str = "default") -> LocalAccounts:
    keys: Any = OneKey(Principal(account, "key", live, plan="pro"))
    access = Access(keys, BUILTIN, Catalog.load(), Ledger(store, BUILTIN))
    return LocalAccounts(store, UsageReader(store, b"s" * 32), access)


def call(**headers: str) -> Call:
    return Call.from_headers({n.replace("_", "-"): v for n, v in headers.items()}.get, protocol="rest")


async def test_a_key_sees_its_own_side_alone(store, office):
    await office.create("other", "pro", CREDIT)
    await office.grant("default", CREDIT, live=True)
    await run(store, "task_live", Wallet("default", True))
    await run(store, "task_test", Wallet("default", False))
    await run(store, "task_other", Wallet("other", True))
    for live, task, granted in ((True, "task_live", CREDIT), (False, "task_test", TEST_CREDITS)):
        found = await accounts_of(store, live).get_account(call())
        assert (found.name, found.plan, found.live) == ("default", "pro", live)
        assert found.limits.requests_per_minute == 300
        spent = found.balance.spent_micros
        assert spent > 0
        assert found.balance == pb.Balance(
            granted_micros=granted, spent_micros=spent, available_micros=granted - spent
        )
        usage = await accounts_of(store, live).list_usage(pb.ListUsageRequest(), call())
        assert [record.id for record in usage.records] == [task]
        sums = await accounts_of(store, live).list_usage(
            pb.ListUsageRequest(group_by=pb.USAGE_GROUP_KEY), call()
        )
        assert [total.tasks for total in sums.totals] == [1]


async def test_a_key_is_told_nothing_by_account_and_its_headers_are_looked_at(store):
    by_account = pb.ListUsageRequest(group_by=pb.USAGE_GROUP_ACCOUNT)
    assert await refusal(accounts_of(store, True).list_usage(by_account, call())) == (
        "invalid_parameter",
        "group_by",
    )
    bad = call(x_request_timeout="soon")
    assert (await refusal(accounts_of(store, True).get_account(bad)))[1] == "X-Request-Timeout"
    assert (await refusal(accounts_of(store, True).list_usage(by_account, bad)))[1] == "X-Request-Timeout"
