"""Accounts: how the operator manages them, and what the holder of a key sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.accounts.access import Access
from pomelo.accounts.accounts import AccountOperator, LocalAccounts
from pomelo.accounts.plans import BUILTIN, TEST_CREDITS, Plan
from pomelo.accounts.usage import UsageReader
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery
from tests.calls import call_of
from tests.unit.accounts.audited_store import reserve, run
from tests.unit.refusals import refused
from tests.waiting import until

CREDIT = 1_000_000
MODES = {False: Mode.MODE_TEST, True: Mode.MODE_LIVE}


@pytest.fixture
def changed() -> list[str]:
    """The accounts for which `account_changed` was called."""
    return []


class Admin:
    """Sends requests to an operator of accounts."""

    def __init__(self, operator: AccountOperator) -> None:
        self._operator = operator

    async def create(self, account_id: str, plan: str, live_micros: int) -> admin_pb.Account:
        request = admin_pb.CreateAccountRequest(id=account_id, plan=plan, live_micros=live_micros)
        return (await self._operator.create_account(request)).account

    async def list(self, size: int, token: str) -> tuple[list[admin_pb.Account], str]:
        request = admin_pb.ListAccountsRequest(page_size=size, page_token=token)
        page = await self._operator.list_accounts(request)
        return [*page.accounts], page.next_page_token

    async def get(self, account_id: str) -> admin_pb.Account:
        return (await self._operator.get_account(admin_pb.GetAccountRequest(id=account_id))).account

    async def grant(self, account_id: str, amount: int, *, live: bool, **more: Any) -> admin_pb.Account:
        values: dict[str, Any] = {"account_id": account_id, "amount_micros": amount, "mode": MODES[live]}
        return (await self._operator.grant_credits(admin_pb.GrantCreditsRequest(**values, **more))).account

    async def set_plan(self, account_id: str, plan: str) -> admin_pb.Account:
        request = admin_pb.SetAccountPlanRequest(account_id=account_id, plan=plan)
        return (await self._operator.set_account_plan(request)).account


@pytest.fixture
def admin(store: Store, changed: list[str]) -> Admin:
    plans = {**BUILTIN, "team": Plan("team", concurrent=3, models=frozenset({"gpt-4", "flux-1-pro"}))}
    return Admin(AccountOperator(store, plans, changed.append, lambda: 1234.5))


async def test_a_new_account_is_free_and_has_test_credits_once(admin: Admin, store: Store) -> None:
    account = await admin.create("acme", "", 0)
    assert (account.id, account.plan, account.create_time.ToMilliseconds()) == ("acme", "free", 1_234_500)
    assert account.limits == pb.PlanLimits(
        requests_per_minute=20, concurrent_requests=2, tokens_per_minute=40_000
    )
    assert account.live == pb.Balance()
    assert account.test == pb.Balance(granted_micros=TEST_CREDITS, available_micros=TEST_CREDITS)
    with refused("invalid_parameter", "id"):
        await admin.create("acme", "pro", CREDIT)
    assert await admin.get("acme") == account
    (grant,) = await store.list_grants(Wallet("acme", False))
    assert grant.amount == TEST_CREDITS


async def test_a_creation_that_was_interrupted_is_completed_when_it_is_repeated(
    admin: Admin, store: Store
) -> None:
    for name, given in (("acme", 0), ("blue", 5 * CREDIT)):
        await store.add_account(name, "free", 1.0)
        if given:
            await store.grant(Grant(f"live:{name}", Wallet(name, True), given, 1.0, "to begin with"))
        with refused("invalid_parameter", field="id"):
            await admin.create(name, "pro", 5 * CREDIT)
        if given:
            with refused("invalid_parameter", field="id"):
                await admin.create(name, "free", 6 * CREDIT)
        account = await admin.create(name, "free", 5 * CREDIT)
        assert (account.live.granted_micros, account.test.granted_micros) == (5 * CREDIT, TEST_CREDITS)
        with refused("invalid_parameter", field="id"):
            await admin.create(name, "free", 5 * CREDIT)
        await store.grant(Grant(f"less of {name}", Wallet(name, False), -TEST_CREDITS, 2.0, "taken back"))
        with refused("invalid_parameter", field="id"):
            await admin.create(name, "free", 5 * CREDIT)


@pytest.mark.parametrize("given", [0, 1])
async def test_a_creation_that_fails_before_any_of_its_grants_is_completed_when_it_is_repeated(
    admin: Admin, store: Store, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    grants = []

    async def fail(grant: Grant, act: Any = None) -> Any:
        grants.append(grant)
        if len(grants) > given:
            raise PomeloError("store_unavailable")
        return await grant_credits(grant, act)

    grant_credits = store.grant
    with monkeypatch.context() as patch:
        patch.setattr(store, "grant", fail)
        with refused("store_unavailable"):
            await admin.create("acme", "free", 5 * CREDIT)
    account = await admin.create("acme", "free", 5 * CREDIT)
    assert (account.live.granted_micros, account.test.granted_micros) == (5 * CREDIT, TEST_CREDITS)


async def test_a_new_account_has_the_requested_plan_and_credits(admin: Admin) -> None:
    account = await admin.create("acme", "team", 5 * CREDIT)
    assert account.limits == pb.PlanLimits(
        concurrent_requests=3, models=pb.ModelSet(models=["flux-1-pro", "gpt-4"])
    )
    assert account.live == pb.Balance(granted_micros=5 * CREDIT, available_micros=5 * CREDIT)


@pytest.mark.parametrize(
    ("name", "plan", "micros", "code", "field"),
    [
        ("", "", 0, "missing_parameter", "id"),
        *[(name, "", 0, "invalid_parameter", "id") for name in ("a b", "a/b", "ä", "a\n", "n" * 65)],
        ("acme", "nothing", 0, "invalid_parameter", "plan"),
        *[("acme", "", micros, "invalid_parameter", "live_micros") for micros in (-1, 10**15 + 1, 2**62)],
    ],
)
async def test_an_invalid_account_is_refused_and_not_created(
    admin: Admin, name: str, plan: str, micros: int, code: str, field: str
) -> None:
    with refused(code, field):
        await admin.create(name, plan, micros)
    assert [one.id for one in (await admin.list(0, ""))[0]] == ["default"]


async def test_amounts_and_notes_may_have_their_maximum(admin: Admin, store: Store) -> None:
    assert (await admin.create("acme", "", 10**15)).live.granted_micros == 10**15
    await admin.grant("acme", 1, live=False, note="n" * 200, grant_id="g" * 64)
    grant = Grant("g" * 64, Wallet("acme", False), 1, 1234.5, "n" * 200)
    assert grant in await store.list_grants(Wallet("acme", False))


async def test_accounts_are_listed_in_pages_with_their_balances(admin: Admin, store: Store) -> None:
    for name in "abc":
        await admin.create(name, "", 5)
    await reserve(store, "task_1", Wallet("a", True), maximum=3)
    first, token = await admin.list(2, "")
    second, end = await admin.list(2, token)
    assert [account.id for account in (*first, *second)] == ["a", "b", "c", "default"]
    assert (len(first), end) == (2, "")
    assert first[0] == await admin.get("a")
    assert first[0].live == pb.Balance(granted_micros=5, held_micros=3, available_micros=2)


async def test_credits_are_granted_once_for_each_id(admin: Admin) -> None:
    await admin.create("acme", "", 0)
    for _ in range(3):
        after = await admin.grant("acme", 7, live=True, note="thanks", grant_id="order-1")
        assert after.live.granted_micros == 7
    assert (await admin.grant("acme", 7, live=True)).live.granted_micros == 14
    assert (await admin.grant("acme", 7, live=True)).live.granted_micros == 21
    assert (await admin.grant("acme", 7, live=False)).test.granted_micros == TEST_CREDITS + 7


async def test_the_id_of_a_different_grant_is_refused_and_grants_nothing(admin: Admin) -> None:
    await admin.create("acme", "", 0)
    await admin.grant("acme", 7, live=True, grant_id="order-1")
    before = (await admin.list(0, ""))[0]
    for name, amount, live in (("acme", 8, True), ("acme", 7, False), ("default", 7, True)):
        with refused("invalid_parameter", "grant_id"):
            await admin.grant(name, amount, live=live, grant_id="order-1")
    assert (await admin.list(0, ""))[0] == before


@pytest.mark.parametrize(
    ("name", "amount", "more", "code", "field"),
    [
        ("", 1, {}, "missing_parameter", "account_id"),
        ("nobody", 1, {}, "not_found", "account_id"),
        *[("default", n, {}, "invalid_parameter", "amount_micros") for n in (0, -1, 10**15 + 1, 2**60)],
        ("default", 1, {"note": "n" * 201}, "invalid_parameter", "note"),
        ("default", 1, {"grant_id": "g" * 65}, "invalid_parameter", "grant_id"),
        ("default", 1, {"grant_id": "test:default"}, "invalid_parameter", "grant_id"),
    ],
)
async def test_an_invalid_grant_is_refused(
    admin: Admin, name: str, amount: int, more: dict[str, str], code: str, field: str
) -> None:
    before = (await admin.list(0, ""))[0]
    with refused(code, field):
        await admin.grant(name, amount, live=True, **more)
    assert (await admin.list(0, ""))[0] == before


async def test_a_grant_above_the_total_that_stores_count_exactly_is_refused(admin: Admin) -> None:
    for _ in range(9):
        await admin.grant("default", 10**15, live=True)
    with refused("invalid_parameter", "amount_micros"):
        await admin.grant("default", 1, live=True)


@pytest.mark.parametrize(
    ("name", "amount", "note", "values"),
    [
        ("nobody", 1, "", {"account": "nobody"}),
        (
            "default",
            0,
            "",
            {"expected": "1 to 1,000,000,000,000,000", "minimum": "1", "maximum": "1000000000000000"},
        ),
        ("default", 1, "n" * 201, {"expected": "up to 200 characters", "maximum": "200"}),
    ],
)
async def test_the_values_of_a_refused_grant_are_those_that_its_message_names(
    admin: Admin, name: str, amount: int, note: str, values: dict[str, str]
) -> None:
    with pytest.raises(PomeloError) as caught:
        await admin.grant(name, amount, live=True, note=note)
    assert caught.value.values == values


async def test_a_change_of_plan_is_reported_and_an_unknown_plan_refused(
    admin: Admin, changed: list[str]
) -> None:
    assert (await admin.set_plan("default", "team")).plan == "team"
    assert changed == ["default"]
    for name, plan, code, field in (
        ("default", "nothing", "invalid_parameter", "plan"),
        ("default", "", "missing_parameter", "plan"),
        ("nobody", "pro", "not_found", "account_id"),
    ):
        with refused(code, field):
            await admin.set_plan(name, plan)
    assert changed == ["default"]


async def test_an_account_whose_plan_was_removed_is_shown_without_limits(store: Store, admin: Admin) -> None:
    await store.set_plan("default", "old")
    for account in (await admin.get("default"), ((await admin.list(0, ""))[0])[0]):
        assert account.plan == "old"
        assert not account.HasField("limits")


# --- the holder of a key


class OneKey:
    """Takes every call for one of this principal."""

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    async def authenticate(self, call: Call) -> Principal:
        return self._principal


def accounts_of(store: Store, live: bool) -> LocalAccounts:
    keys: Any = OneKey(Principal("default", "key", live, plan="pro"))
    access = Access(keys, BUILTIN, Catalog.load(), Ledger(store))
    return LocalAccounts(store, UsageReader(store, b"s" * 32), access)


async def test_a_key_sees_only_its_account_in_its_mode(store: Store, admin: Admin) -> None:
    await admin.create("other", "pro", CREDIT)
    await admin.grant("default", CREDIT, live=True)
    await run(store, "task_live", Wallet("default", True))
    await run(store, "task_test", Wallet("default", False))
    await run(store, "task_other", Wallet("other", True))
    for live, task, granted in ((True, "task_live", CREDIT), (False, "task_test", TEST_CREDITS)):
        accounts = accounts_of(store, live)
        account = await accounts.get_account(call_of(None))
        assert (account.id, account.plan, account.mode) == ("default", "pro", MODES[live])
        assert account.limits.requests_per_minute == 300
        spent = account.balance.spent_micros
        assert spent > 0
        assert account.balance == pb.Balance(
            granted_micros=granted, spent_micros=spent, available_micros=granted - spent
        )
        usage = await accounts.list_usage(pb.ListUsageRequest(), call_of(None))
        assert [record.id for record in usage.records] == [task]
        by_key = pb.SumUsageRequest(group_by=[pb.UsageGrouping(dimension=pb.USAGE_DIMENSION_KEY)])
        sums = await accounts.sum_usage(by_key, call_of(None))
        assert [row.tasks for row in sums.sums] == [1]


async def test_the_records_and_the_sums_of_usage_are_returned_in_pages(store: Store, admin: Admin) -> None:
    await admin.grant("default", CREDIT, live=True)
    for number in range(3):
        await run(store, f"task_{number}", Wallet("default", True), key_id=f"key_{number}")
    accounts = accounts_of(store, True)
    records, sums = pb.ListUsageRequest(page_size=2), pb.SumUsageRequest(page_size=2)
    sums.group_by.add(dimension=pb.USAGE_DIMENSION_KEY)
    for sizes in ([2, 2], [1, 1]):
        listed = await accounts.list_usage(records, call_of(None))
        summed = await accounts.sum_usage(sums, call_of(None))
        assert [len(listed.records), len(summed.sums)] == sizes
        records.page_token, sums.page_token = listed.next_page_token, summed.next_page_token
    assert (records.page_token, sums.page_token) == ("", "")


async def test_a_key_can_not_group_usage_by_account_and_its_headers_are_checked(store: Store) -> None:
    # The number of a field that only the operator's groupings have.
    by_account = admin_pb.UsageGrouping(operator_dimension=admin_pb.OPERATOR_DIMENSION_ACCOUNT)
    grouping = pb.UsageGrouping.FromString(by_account.SerializeToString())
    accounts, sums = accounts_of(store, True), pb.SumUsageRequest(group_by=[grouping])
    with refused("missing_parameter", "group_by"):
        await accounts.sum_usage(sums, call_of(None))
    bad = call_of(None, x_request_timeout="soon")
    with refused("invalid_parameter", "X-Request-Timeout"):
        await accounts.get_account(bad)
    with refused("invalid_parameter", "X-Request-Timeout"):
        await accounts.list_usage(pb.ListUsageRequest(page_size=-1), bad)
    with refused("invalid_parameter", "X-Request-Timeout"):
        await accounts.sum_usage(sums, bad)


async def test_a_refused_report_takes_no_place_of_another(store: Store) -> None:
    accounts = accounts_of(store, True)
    for _ in range(3):
        with refused("invalid_parameter", "page_token"):
            await accounts.list_usage(pb.ListUsageRequest(page_token="unknown"), call_of(None))
    assert not (await accounts.list_usage(pb.ListUsageRequest(), call_of(None))).records


async def test_an_account_runs_two_reports_at_a_time_and_the_others_wait(store: Store) -> None:
    started: list[str | None] = []
    go_on = asyncio.Event()

    class Slow:
        async def list_usage(self, query: UsageQuery, *, limit: int, after: str) -> tuple[list[Any], str]:
            return await self.sum_usage(query), ""

        async def sum_usage(self, query: UsageQuery, *_: object, **__: object) -> list[Any]:
            started.append(query.account)
            await go_on.wait()
            return []

    slow: Any = Slow()
    keys: Any = OneKey(Principal("default", "key", True, plan="pro"))
    access = Access(keys, BUILTIN, Catalog.load(), Ledger(store))
    accounts = LocalAccounts(store, UsageReader(slow, b"s" * 32), access)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        reports = [
            group.create_task(report)
            for _ in range(5)
            for report in (
                accounts.list_usage(pb.ListUsageRequest(), call_of(None)),
                accounts.sum_usage(pb.SumUsageRequest(), call_of(None)),
            )
        ]
        await until(lambda: len(started) == 2)
        keys._principal = Principal("other", "key", True, plan="pro")
        group.create_task(accounts.sum_usage(pb.SumUsageRequest(), call_of(None)))
        await until(lambda: "other" in started)
        assert started == ["default", "default", "other"]
        keys._principal = Principal("default", "key", True, plan="pro")
        with refused("deadline_exceeded"):
            await accounts.sum_usage(pb.SumUsageRequest(), call_of(None, 0.05))
        for left in reports[8:]:
            left.cancel()
        go_on.set()
    assert started[3:] == ["default"] * 6  # who leaves gives up the turn
