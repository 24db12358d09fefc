"""Accounts: how the operator manages them, and what the holder of a key sees."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
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
from tests.calls import call_of
from tests.unit.accounts.audited_store import run

CREDIT = 1_000_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(f"sqlite:{tmp_path / 'pomelo.db'}") as opened:
        yield opened


@pytest.fixture
def changed() -> list[str]:
    """The accounts for which `plan_changed` was called."""
    return []


@pytest.fixture
def admin(store: Store, changed: list[str]) -> AccountAdmin:
    plans = {**BUILTIN, "team": Plan("team", concurrent=3, models=frozenset({"gpt-4", "flux-1-pro"}))}
    return AccountAdmin(store, plans, plan_changed=changed.append, now=lambda: 1234.5)


async def error_of(request: Awaitable[object]) -> tuple[str, str | None]:
    with pytest.raises(PomeloError) as caught:
        await request
    return caught.value.code, caught.value.field


async def test_a_new_account_is_free_and_has_test_credits_once(admin: AccountAdmin, store: Store) -> None:
    account = await admin.create("acme", "", 0)
    assert (account.name, account.plan, account.create_time.ToMilliseconds()) == ("acme", "free", 1_234_500)
    assert account.limits == pb.PlanLimits(
        requests_per_minute=20, concurrent_requests=2, tokens_per_minute=40_000
    )
    assert account.live == pb.Balance()
    assert account.test == pb.Balance(granted_micros=TEST_CREDITS, available_micros=TEST_CREDITS)
    assert await error_of(admin.create("acme", "pro", CREDIT)) == ("invalid_parameter", "name")
    assert await admin.show("acme") == account
    (grant,) = await store.list_grants(Wallet("acme", False))
    assert grant.amount == TEST_CREDITS


async def test_a_new_account_has_the_requested_plan_and_credits(admin: AccountAdmin) -> None:
    account = await admin.create("acme", "team", 5 * CREDIT)
    assert account.limits == pb.PlanLimits(concurrent_requests=3, models=["flux-1-pro", "gpt-4"])
    assert account.live == pb.Balance(granted_micros=5 * CREDIT, available_micros=5 * CREDIT)


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
async def test_an_invalid_account_is_refused_and_not_created(
    admin: AccountAdmin, name: str, plan: str, micros: int, field: str
) -> None:
    assert (await error_of(admin.create(name, plan, micros)))[1] == field
    assert [one.name for one in (await admin.list(0, ""))[0]] == ["default"]


async def test_credits_are_granted_once_for_each_id(admin: AccountAdmin) -> None:
    await admin.create("acme", "", 0)
    for _ in range(3):
        after = await admin.grant("acme", 7, live=True, note="thanks", grant_id="order-1")
        assert after.live.granted_micros == 7
    assert (await admin.grant("acme", 7, live=True)).live.granted_micros == 14
    assert (await admin.grant("acme", 7, live=True)).live.granted_micros == 21
    assert (await admin.grant("acme", 7, live=False)).test.granted_micros == TEST_CREDITS + 7


async def test_the_id_of_a_different_grant_is_refused_and_grants_nothing(admin: AccountAdmin) -> None:
    await admin.create("acme", "", 0)
    await admin.grant("acme", 7, live=True, grant_id="order-1")
    before = (await admin.list(0, ""))[0]
    for name, amount, live in (("acme", 8, True), ("acme", 7, False), ("default", 7, True)):
        request = admin.grant(name, amount, live=live, grant_id="order-1")
        assert await error_of(request) == ("invalid_parameter", "grant_id")
    assert (await admin.list(0, ""))[0] == before


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
async def test_an_invalid_grant_is_refused(
    admin: AccountAdmin, name: str, amount: int, more: dict[str, str], field: str
) -> None:
    before = (await admin.list(0, ""))[0]
    assert (await error_of(admin.grant(name, amount, live=True, **more)))[1] == field
    assert (await admin.list(0, ""))[0] == before


async def test_a_grant_above_the_total_that_stores_count_exactly_is_refused(admin: AccountAdmin) -> None:
    for _ in range(9):
        await admin.grant("default", 10**15, live=True)
    assert await error_of(admin.grant("default", 1, live=True)) == ("invalid_parameter", "amount_micros")


async def test_a_change_of_plan_is_reported_and_an_unknown_plan_refused(
    admin: AccountAdmin, changed: list[str]
) -> None:
    assert (await admin.set_plan("default", "team")).plan == "team"
    assert changed == ["default"]
    assert await error_of(admin.set_plan("default", "nothing")) == ("invalid_parameter", "plan")
    assert await error_of(admin.set_plan("default", "")) == ("missing_parameter", "plan")
    assert await error_of(admin.set_plan("nobody", "pro")) == ("not_found", "name")
    assert changed == ["default"]


async def test_an_account_whose_plan_was_removed_is_shown_without_limits(
    store: Store, admin: AccountAdmin
) -> None:
    await store.set_plan("default", "old")
    for account in (await admin.show("default"), ((await admin.list(0, ""))[0])[0]):
        assert account.plan == "old"
        assert not account.HasField("limits")


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


async def test_a_key_sees_only_its_account_in_its_mode(store: Store, admin: AccountAdmin) -> None:
    await admin.create("other", "pro", CREDIT)
    await admin.grant("default", CREDIT, live=True)
    await run(store, "task_live", Wallet("default", True))
    await run(store, "task_test", Wallet("default", False))
    await run(store, "task_other", Wallet("other", True))
    for live, task, granted in ((True, "task_live", CREDIT), (False, "task_test", TEST_CREDITS)):
        account = await accounts_of(store, live).get_account(call_of(None))
        assert (account.name, account.plan, account.live) == ("default", "pro", live)
        assert account.limits.requests_per_minute == 300
        spent = account.balance.spent_micros
        assert spent > 0
        assert account.balance == pb.Balance(
            granted_micros=granted, spent_micros=spent, available_micros=granted - spent
        )
        usage = await accounts_of(store, live).list_usage(pb.ListUsageRequest(), call_of(None))
        assert [record.id for record in usage.records] == [task]
        sums = await accounts_of(store, live).list_usage(
            pb.ListUsageRequest(group_by=pb.USAGE_GROUP_KEY), call_of(None)
        )
        assert [total.tasks for total in sums.totals] == [1]


async def test_a_key_can_not_group_usage_by_account_and_its_headers_are_checked(store: Store) -> None:
    by_account = pb.ListUsageRequest(group_by=pb.USAGE_GROUP_ACCOUNT)
    assert await error_of(accounts_of(store, True).list_usage(by_account, call_of(None))) == (
        "invalid_parameter",
        "group_by",
    )
    bad = call_of(None, x_request_timeout="soon")
    assert (await error_of(accounts_of(store, True).get_account(bad)))[1] == "X-Request-Timeout"
    assert (await error_of(accounts_of(store, True).list_usage(by_account, bad)))[1] == "X-Request-Timeout"
