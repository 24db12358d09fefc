"""The operator's requests that change money by hand, disable accounts, limit keys, and list what was done."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.keys import CACHE_SECONDS, Keyring
from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.plans import BUILTIN
from pomelo.accounts.usage import UsageReader
from pomelo.call import KeyBudget, Principal
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import Balance
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.stores.base import Store
from tests.unit.accounts.audited_store import ACME, add_account, reserve, run
from tests.unit.accounts.key_rig import ROOT, call
from tests.unit.clock import Clock
from tests.unit.refusals import refused


async def error_of(attempt: Awaitable[object], code: str) -> PomeloError:
    with refused(code) as caught:
        await attempt
    return caught.value


FIVE_A_DAY = pb.Budget(limit_micros=5_000_000, period=pb.BUDGET_PERIOD_DAY)


@pytest.fixture
async def operator(store: Store, keyring: Keyring, clock: Clock) -> LocalOperator:
    await add_account(store)
    return LocalOperator(
        store, keyring, BUILTIN, UsageReader(store, b"s" * 32), {"gpt-4"}, clock, runs=lambda task_id: True
    )


async def authenticate(keyring: Keyring, key: str) -> Principal:
    return await keyring.authenticate(call(key))


async def create_key(operator: LocalOperator, **values: Any) -> pb.CreateKeyResponse:
    return await operator.create_key(pb.CreateKeyRequest(account_id="acme", mode=Mode.MODE_LIVE, **values))


async def acts(operator: LocalOperator, **values: Any) -> set[tuple[str, str, str]]:
    """The action and the values of all acts. Here they have the same time, and no order."""
    found = (await operator.list_acts(pb.ListActsRequest(**values))).acts
    return {(act.action, act.old_value, act.new_value) for act in found}


def adjustment(amount: int, adjustment_id: str = "a1", **values: Any) -> pb.AdjustCreditsRequest:
    request = {"account_id": "acme", "note": "a typing error"} | values
    return pb.AdjustCreditsRequest(amount_micros=amount, adjustment_id=adjustment_id, **request)


# --- credits


async def test_an_adjustment_takes_credits_back_once(operator: LocalOperator, store: Store) -> None:
    for _ in range(2):
        account = (await operator.adjust_credits(adjustment(-900_000))).account
        assert account.live == Balance(granted_micros=100_000, available_micros=100_000)
    account = (await operator.adjust_credits(adjustment(5, "a2", mode=Mode.MODE_TEST))).account
    assert account.test.granted_micros == 1_000_005
    assert await acts(operator) == {
        ("adjust_credits", "1", "0.1"),
        ("adjust_credits", "1", "1.000005"),
    }


async def test_an_adjustment_with_the_id_of_a_grant_of_the_same_amount_is_refused(
    operator: LocalOperator, store: Store
) -> None:
    grant = pb.GrantCreditsRequest(account_id="acme", amount_micros=5, grant_id="a1")
    await operator.grant_credits(grant)
    error = await error_of(operator.adjust_credits(adjustment(5)), "invalid_parameter")
    assert error.field == "adjustment_id"
    await operator.adjust_credits(adjustment(5, "a2"))
    grant.grant_id = "a2"
    assert (await error_of(operator.grant_credits(grant), "invalid_parameter")).field == "grant_id"
    assert (await store.balance(ACME)).granted == 1_000_010


async def test_an_adjustment_takes_back_only_what_is_available(operator: LocalOperator, store: Store) -> None:
    spent = (await run(store, "t1")).cost
    await reserve(store, "t2", maximum=5_000)
    available = 1_000_000 - spent - 5_000
    error = await error_of(operator.adjust_credits(adjustment(-available - 1)), "invalid_parameter")
    assert error.field == "amount_micros"
    assert error.values["minimum"] == str(-available)
    account = (await operator.adjust_credits(adjustment(-available))).account
    assert (account.live.held_micros, account.live.available_micros) == (5_000, 0)
    assert not (await operator.audit_ledger(pb.AuditLedgerRequest())).findings


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (adjustment(-1, account_id=""), "missing_parameter", "account_id"),
        (adjustment(-1, account_id="nobody"), "not_found", "account_id"),
        (adjustment(0), "missing_parameter", "amount_micros"),
        (adjustment(10**15 + 1), "invalid_parameter", "amount_micros"),
        (adjustment(-(10**15) - 1), "invalid_parameter", "amount_micros"),
        (adjustment(-1, note=" "), "missing_parameter", "note"),
        (adjustment(-1, note="n" * 201), "invalid_parameter", "note"),
        (adjustment(-1, "no spaces"), "invalid_parameter", "adjustment_id"),
        (adjustment(-1, "acme-True"), "invalid_parameter", "adjustment_id"),  # the id of a grant
    ],
)
async def test_an_invalid_adjustment_changes_nothing(
    operator: LocalOperator, store: Store, request_: pb.AdjustCreditsRequest, code: str, field: str
) -> None:
    assert (await error_of(operator.adjust_credits(request_), code)).field == field
    assert (await store.balance(ACME)).granted == 1_000_000
    assert not await acts(operator)


async def test_a_credit_limit_is_part_of_the_credits_that_are_given_in_all(
    operator: LocalOperator, store: Store
) -> None:
    billion = 10**15
    given = pb.GrantCreditsRequest(account_id="acme", amount_micros=billion, mode=Mode.MODE_LIVE)
    await operator.adjust_credits(adjustment(-1_000_000))
    await operator.set_credit_limit(pb.SetCreditLimitRequest(account_id="acme", credit_limit_micros=billion))
    for _ in range(8):
        await operator.grant_credits(given)
    one = pb.GrantCreditsRequest(account_id="acme", amount_micros=1, mode=Mode.MODE_LIVE)
    await error_of(operator.grant_credits(one), "invalid_parameter")
    await error_of(operator.adjust_credits(adjustment(1, "a2")), "invalid_parameter")
    lower = pb.SetCreditLimitRequest(account_id="acme", credit_limit_micros=billion - 1)
    await operator.set_credit_limit(lower)
    account = (await operator.grant_credits(one)).account
    assert account.live.available_micros == 9 * billion


async def test_an_account_is_postpaid_until_it_has_paid(operator: LocalOperator, store: Store) -> None:
    await operator.adjust_credits(adjustment(-1_000_000))
    limit = pb.SetCreditLimitRequest(account_id="acme", credit_limit_micros=10_000)
    account = (await operator.set_credit_limit(limit)).account
    assert account.live == Balance(credit_limit_micros=10_000, available_micros=10_000)
    spent = (await run(store, "t1")).cost
    prepaid = pb.SetCreditLimitRequest(account_id="acme")
    error = await error_of(operator.set_credit_limit(prepaid), "invalid_parameter")
    assert (error.field, error.values["minimum"]) == ("credit_limit_micros", str(spent))
    assert not (await operator.audit_ledger(pb.AuditLedgerRequest())).findings
    await operator.grant_credits(pb.GrantCreditsRequest(account_id="acme", amount_micros=spent))
    account = (await operator.set_credit_limit(prepaid)).account
    assert account.live == Balance(granted_micros=spent, spent_micros=spent)
    assert await acts(operator) >= {
        ("set_credit_limit", "0", "0.01"),
        ("set_credit_limit", "0.01", "0"),
    }


@pytest.mark.parametrize("limit", [-1, 10**15 + 1])
async def test_a_credit_limit_out_of_range_is_refused(operator: LocalOperator, limit: int) -> None:
    request = pb.SetCreditLimitRequest(account_id="acme", credit_limit_micros=limit)
    error = await error_of(operator.set_credit_limit(request), "invalid_parameter")
    assert error.field == "credit_limit_micros"


# --- accounts


async def test_the_keys_of_a_disabled_account_are_refused_until_it_is_enabled(
    operator: LocalOperator, keyring: Keyring
) -> None:
    key = (await create_key(operator)).secret
    await authenticate(keyring, key)
    disabled = (await operator.disable_account(pb.DisableAccountRequest(account_id="acme"))).account
    assert disabled.disable_time.seconds == 1_000
    error = await error_of(authenticate(keyring, key), "invalid_api_key")
    assert error.message == "The account of this API key is disabled. Ask the operator of the service"
    wrong = key[:30] + ("a" if key[30] != "a" else "b") + key[31:]
    assert "disabled" not in (await error_of(authenticate(keyring, wrong), "invalid_api_key")).message
    enabled = (await operator.enable_account(pb.EnableAccountRequest(account_id="acme"))).account
    assert not enabled.HasField("disable_time")
    assert (await authenticate(keyring, key)).account == "acme"
    assert await acts(operator) >= {
        ("disable_account", "enabled", "disabled"),
        ("enable_account", "disabled", "enabled"),
    }


async def test_another_process_refuses_a_disabled_account_within_the_time_of_its_cache(
    operator: LocalOperator, store: Store, clock: Clock
) -> None:
    other = Keyring(store, ROOT, clock=clock, monotonic=clock)
    key = (await create_key(operator)).secret
    await authenticate(other, key)
    await operator.disable_account(pb.DisableAccountRequest(account_id="acme"))
    clock.now += CACHE_SECONDS
    await error_of(authenticate(other, key), "invalid_api_key")


# --- keys


async def test_a_key_has_a_name_and_a_budget_that_can_be_changed(
    operator: LocalOperator, keyring: Keyring
) -> None:
    created = await create_key(operator, name="website", budget=FIVE_A_DAY)
    key_id = created.key.id
    assert (created.key.name, created.key.budget) == ("website", FIVE_A_DAY)
    principal = await authenticate(keyring, created.secret)
    assert principal.budget == KeyBudget(f"budget:{key_id}.day", 5_000_000, "day")
    more = pb.Budget(limit_micros=7_500_000, period=pb.BUDGET_PERIOD_MONTH)
    changed = await operator.set_key_budget(pb.SetKeyBudgetRequest(id=key_id, budget=more))
    assert changed.key.budget == more
    principal = await authenticate(keyring, created.secret)
    assert principal.budget == KeyBudget(f"budget:{key_id}.month", 7_500_000, "month")
    changed = await operator.set_key_budget(pb.SetKeyBudgetRequest(id=key_id))
    assert not changed.key.HasField("budget")
    assert (await authenticate(keyring, created.secret)).budget is None
    assert await acts(operator) == {
        ("create_key", "", "name website; all models; budget 5/day"),
        ("set_key_budget", "5/day", "7.5/month"),
        ("set_key_budget", "7.5/month", "none"),
    }
    missing = pb.SetKeyBudgetRequest(id="nothing", budget=FIVE_A_DAY)
    await error_of(operator.set_key_budget(missing), "not_found")


@pytest.mark.parametrize("name", ["n" * 65, "two\nlines", "\x1b[31m"])
async def test_a_name_that_can_not_be_shown_is_refused(operator: LocalOperator, name: str) -> None:
    assert (await error_of(create_key(operator, name=name), "invalid_parameter")).field == "name"


async def test_a_rotated_key_works_during_its_grace_period_and_shares_its_budget(
    operator: LocalOperator, keyring: Keyring, clock: Clock
) -> None:
    first = await create_key(operator, name="website", budget=FIVE_A_DAY)
    rotation = pb.RotateKeyRequest(id=first.key.id)
    rotation.grace.FromSeconds(3_600)
    second = await operator.rotate_key(rotation)
    assert (second.key.name, second.key.budget) == ("website", FIVE_A_DAY)
    error = await error_of(operator.rotate_key(rotation), "invalid_parameter")
    assert error.message.endswith(f"Rotate its successor {second.key.id}")
    third = await operator.rotate_key(pb.RotateKeyRequest(id=second.key.id))
    budgets = {(await authenticate(keyring, key)).budget for key in (first.secret, third.secret)}
    assert budgets == {KeyBudget(f"budget:{first.key.id}.day", 5_000_000, "day")}
    await error_of(authenticate(keyring, second.secret), "invalid_api_key")
    clock.now += 3_599
    await authenticate(keyring, first.secret)
    clock.now += 1
    await error_of(authenticate(keyring, first.secret), "invalid_api_key")
    assert await acts(operator) >= {
        ("rotate_key", "", f"{second.key.id}; the old key expires 1970-01-01T01:16:40Z"),
        ("rotate_key", "", third.key.id),
    }


@pytest.mark.parametrize(("lifetime", "works"), [(1_800, 1_800), (7_200, 3_600)])
async def test_a_grace_period_shortens_the_life_of_a_key_and_never_extends_it(
    operator: LocalOperator, keyring: Keyring, clock: Clock, lifetime: int, works: int
) -> None:
    expires = Timestamp(seconds=int(clock.now) + lifetime)
    old = await create_key(operator, expire_time=expires)
    rotation = pb.RotateKeyRequest(id=old.key.id)
    rotation.grace.FromSeconds(3_600)
    assert (await operator.rotate_key(rotation)).key.expire_time == expires
    clock.now += works - 1
    await authenticate(keyring, old.secret)
    clock.now += 1
    await error_of(authenticate(keyring, old.secret), "invalid_api_key")


@pytest.mark.parametrize("grace", [0, 60])
async def test_neither_a_revoked_key_nor_an_expired_one_is_rotated(
    operator: LocalOperator, clock: Clock, grace: int
) -> None:
    revoked = (await create_key(operator)).key
    await operator.revoke_key(pb.RevokeKeyRequest(id=revoked.id))
    expired = (await create_key(operator, expire_time=Timestamp(seconds=int(clock.now) + 5))).key
    clock.now += 5
    for key, state in ((revoked, "revoked"), (expired, "expired")):
        rotation = pb.RotateKeyRequest(id=key.id)
        rotation.grace.FromSeconds(grace)
        error = await error_of(operator.rotate_key(rotation), "invalid_parameter")
        assert error.field == "id"
        assert state in error.message
    assert len((await operator.list_keys(pb.ListKeysRequest(account_id="acme"))).keys) == 2


@pytest.mark.parametrize(("seconds", "nanos"), [(-1, 0), (30 * 86_400 + 1, 0), (5, -1)])
async def test_a_grace_period_out_of_range_is_refused(
    operator: LocalOperator, seconds: int, nanos: int
) -> None:
    key = (await create_key(operator)).key
    request = pb.RotateKeyRequest(id=key.id)
    request.grace.seconds, request.grace.nanos = seconds, nanos
    assert (await error_of(operator.rotate_key(request), "invalid_parameter")).field == "grace"
    request.grace.FromSeconds(30 * 86_400)
    assert (await operator.rotate_key(request)).secret


async def test_the_minute_of_the_last_use_is_stored_apart_from_calls(
    operator: LocalOperator, keyring: Keyring, clock: Clock
) -> None:
    created = await create_key(operator)

    async def last_use() -> int | None:
        (key,) = (await operator.list_keys(pb.ListKeysRequest(account_id="acme"))).keys
        return key.last_use_time.seconds if key.HasField("last_use_time") else None

    clock.now = 1_210.0
    await authenticate(keyring, created.secret)
    assert await last_use() is None
    await keyring.save_use()
    assert await last_use() == 1_200
    clock.now = 1_290.0
    await authenticate(keyring, created.secret)
    await keyring.save_use()
    assert await last_use() == 1_260
    await error_of(authenticate(keyring, created.secret[:-1] + "!"), "invalid_api_key")
    clock.now = 1_400.0
    await keyring.save_use()
    assert await last_use() == 1_260


# --- the log


async def test_the_log_is_listed_in_pages_with_notes_and_never_a_key(
    operator: LocalOperator, clock: Clock
) -> None:
    await operator.create_account(pb.CreateAccountRequest(id="bee", plan="pro", live_micros=7))
    clock.now += 10
    created = await create_key(operator)
    await operator.revoke_key(pb.RevokeKeyRequest(id=created.key.id))
    await operator.set_account_plan(pb.SetAccountPlanRequest(account_id="bee", plan="scale"))
    await operator.adjust_credits(adjustment(-1))
    request, pages = pb.ListActsRequest(page_size=2), list[pb.Act]()
    while True:
        page = await operator.list_acts(request)
        pages += page.acts
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert len({act.id for act in pages}) == len(pages) == 7
    assert created.secret[-30:] not in str(pages)
    (adjusted,) = [act for act in pages if act.action == "adjust_credits"]
    assert (adjusted.account_id, adjusted.mode, adjusted.note) == ("acme", Mode.MODE_LIVE, "a typing error")
    assert adjusted.time.seconds == 1_010
    (revoked,) = [act for act in pages if act.action == "revoke_key"]
    assert revoked.key_id == created.key.id
    assert await acts(operator, account_id="bee") == {
        ("create_account", "", "pro"),
        ("grant_credits", "0", "100"),
        ("grant_credits", "0", "0.000007"),
        ("set_plan", "pro", "scale"),
    }
    since = pb.ListActsRequest()
    since.start_time.FromSeconds(1_010)
    assert len((await operator.list_acts(since)).acts) == 4
    await error_of(operator.list_acts(pb.ListActsRequest(account_id="nobody")), "not_found")
    token = pb.ListActsRequest(page_token=request.page_token, account_id="acme")
    await error_of(operator.list_acts(token), "invalid_parameter")
    token = pb.ListActsRequest(page_token=request.page_token)
    token.start_time.FromSeconds(1_010)
    await error_of(operator.list_acts(token), "invalid_parameter")


async def test_a_name_of_the_maximum_length_is_accepted(operator: LocalOperator) -> None:
    assert (await create_key(operator, name="n" * 64)).key.name == "n" * 64
