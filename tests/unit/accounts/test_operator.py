"""The operator's requests: keys in pages, modes, and times in the past."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.keys import Keyring
from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.pages import MAX_PAGE_BYTES
from pomelo.accounts.plans import BUILTIN, TEST_CREDITS
from pomelo.accounts.usage import UsageReader
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1 import account_service_pb2 as account_pb
from pomelo.gen.v1.account_service_pb2 import ModelSet
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.stores.base import Store
from tests.unit.accounts.audited_store import ACME, ACME_TEST, add_account, reserve, run
from tests.unit.accounts.key_rig import ROOT
from tests.unit.clock import Clock
from tests.unit.refusals import refused

LONG = [f"model-{number:04}-{'x' * 200}" for number in range(2_000)]
"""Names of models, which have more than a third of the bytes of a page."""

UNKNOWN: Any = 9
"""A mode that does not exist."""


@pytest.fixture
def operator(store: Store, keyring: Keyring, clock: Clock) -> LocalOperator:
    usage = UsageReader(store, b"s" * 32)
    runs = {"task_1"}.__contains__
    return LocalOperator(store, keyring, BUILTIN, usage, {"gpt-4", *LONG}, clock, runs=runs)


async def test_a_key_is_created_listed_rotated_and_revoked(operator: LocalOperator, clock: Clock) -> None:
    request = pb.CreateKeyRequest(mode=Mode.MODE_LIVE, models=ModelSet(models=["gpt-4", "gpt-4"]))
    request.expire_time.FromSeconds(1_001)
    created = await operator.create_key(request)
    key = created.key
    assert created.secret.startswith(f"pml_live_{key.id}_")
    assert key == pb.Key(
        id=key.id,
        account_id="default",
        mode=Mode.MODE_LIVE,
        models=ModelSet(models=["gpt-4"]),
        create_time=Timestamp(seconds=1_000),
        expire_time=Timestamp(seconds=1_001),
    )
    assert list((await operator.list_keys(pb.ListKeysRequest())).keys) == [key]
    rotated = await operator.rotate_key(pb.RotateKeyRequest(id=key.id))
    assert rotated.secret.startswith(f"pml_live_{rotated.key.id}_")
    revoked = await operator.revoke_key(pb.RevokeKeyRequest(id=key.id))
    assert revoked.key.revoke_time == Timestamp(seconds=1_000)


async def test_a_list_of_keys_says_which_need_the_previous_secret(
    operator: LocalOperator, store: Store, clock: Clock
) -> None:
    old = (await operator.create_key(pb.CreateKeyRequest())).key
    both = Keyring(store, b"n" * 64, clock=clock, monotonic=clock, previous=[ROOT])
    rotating = LocalOperator(store, both, BUILTIN, UsageReader(store, b"s" * 32), {"gpt-4"}, clock)
    new = (await rotating.create_key(pb.CreateKeyRequest())).key
    for asked, outdated in ((operator, set[str]()), (rotating, {old.id})):
        keys = (await asked.list_keys(pb.ListKeysRequest())).keys
        assert {key.id for key in keys} == {old.id, new.id}
        assert {key.id for key in keys if key.previous_secret} == outdated


@pytest.mark.parametrize(
    ("request_", "code", "field", "message"),
    [
        (
            pb.CreateKeyRequest(models=ModelSet(models=["gpt-4", "y" * 101])),
            *("invalid_parameter", "models", f"'{'y' * 100}' is not a model"),
        ),
        (pb.CreateKeyRequest(models=ModelSet()), "invalid_parameter", "models", "at least one model"),
        (pb.CreateKeyRequest(account_id="nobody"), "not_found", "account_id", "no account 'nobody'"),
        *[
            (pb.CreateKeyRequest(name=name), "invalid_parameter", "name", "up to 64 printable characters")
            for name in ("x" * 65, "a\nb")
        ],
        (pb.CreateKeyRequest(mode=UNKNOWN), "invalid_parameter", "mode", "MODE_TEST or MODE_LIVE"),
        *[
            (pb.CreateKeyRequest(expire_time=time), "invalid_parameter", "expire_time", message)
            for time, message in (
                (Timestamp(seconds=1_000), "^Invalid expire_time: must be in the future"),
                (Timestamp(nanos=-1), "^Invalid expire_time: must be a time"),
                (Timestamp(seconds=2**60), "^Invalid expire_time: must be a time"),
            )
        ],
    ],
)
async def test_an_invalid_key_is_refused_and_not_created(
    operator: LocalOperator, request_: pb.CreateKeyRequest, code: str, field: str, message: str
) -> None:
    with refused(code, field, message):
        await operator.create_key(request_)
    assert not (await operator.list_keys(pb.ListKeysRequest())).keys


async def test_a_new_key_is_a_test_key_by_default(operator: LocalOperator) -> None:
    assert (await operator.create_key(pb.CreateKeyRequest())).key.mode == Mode.MODE_TEST


async def test_a_missing_key_id_is_refused(operator: LocalOperator) -> None:
    with refused("missing_parameter", "id"):
        await operator.rotate_key(pb.RotateKeyRequest())
    with refused("missing_parameter", "id"):
        await operator.revoke_key(pb.RevokeKeyRequest())


@pytest.mark.parametrize("count", [2, 3, 4, 5])
async def test_keys_are_listed_in_pages_oldest_first(
    operator: LocalOperator, clock: Clock, store: Store, count: int
) -> None:
    await add_account(store)
    ids = []
    for _ in range(count):
        ids.append((await operator.create_key(pb.CreateKeyRequest(account_id="acme"))).key.id)
        await operator.create_key(pb.CreateKeyRequest())
        clock.now += 0.25
    request, pages = pb.ListKeysRequest(account_id="acme", page_size=2), []
    while True:
        response = await operator.list_keys(request)
        pages.append([key.id for key in response.keys])
        request.page_token = response.next_page_token
        if not response.next_page_token:
            break
        with refused("invalid_parameter", "page_token"):
            await operator.list_keys(pb.ListKeysRequest(page_size=2, page_token=response.next_page_token))
    assert pages == [ids[at : at + 2] for at in range(0, count, 2)]
    with refused("invalid_parameter", "page_token"):
        first = await operator.list_keys(pb.ListKeysRequest(page_size=1))
        await operator.list_keys(pb.ListKeysRequest(account_id="acme", page_token=first.next_page_token))


async def test_a_page_of_keys_ends_before_it_is_too_large(operator: LocalOperator) -> None:
    for _ in range(4):
        await operator.create_key(pb.CreateKeyRequest(models=ModelSet(models=LONG)))
    page = await operator.list_keys(pb.ListKeysRequest())
    assert (len(page.keys), page.ByteSize() <= MAX_PAGE_BYTES + 1000) == (2, True)
    rest = await operator.list_keys(pb.ListKeysRequest(page_token=page.next_page_token))
    assert len({key.id for key in (*page.keys, *rest.keys)}) == 4
    assert not rest.next_page_token


async def test_an_account_is_created_listed_shown_and_its_plan_set(operator: LocalOperator) -> None:
    created = await operator.create_account(pb.CreateAccountRequest(id="acme", plan="pro", live_micros=7))
    assert (created.account.plan, created.account.live.granted_micros) == ("pro", 7)
    listed = await operator.list_accounts(pb.ListAccountsRequest(page_size=1))
    assert [account.id for account in listed.accounts] == ["acme"]
    rest = await operator.list_accounts(pb.ListAccountsRequest(page_token=listed.next_page_token))
    assert ([account.id for account in rest.accounts], rest.next_page_token) == (["default"], "")
    changed = await operator.set_account_plan(pb.SetAccountPlanRequest(account_id="acme", plan="scale"))
    assert changed.account.plan == "scale"
    assert (await operator.get_account(pb.GetAccountRequest(id="acme"))).account == changed.account


@pytest.mark.parametrize(
    ("mode", "live", "test"),
    [(Mode.MODE_UNSPECIFIED, 5, 0), (Mode.MODE_LIVE, 5, 0), (Mode.MODE_TEST, 0, 5)],
)
async def test_credits_are_granted_in_live_mode_unless_test_mode_is_requested(
    operator: LocalOperator, mode: Mode.ValueType, live: int, test: int
) -> None:
    request = pb.GrantCreditsRequest(account_id="default", amount_micros=5, mode=mode)
    account = (await operator.grant_credits(request)).account
    assert account.live.granted_micros == live
    assert account.test.granted_micros == TEST_CREDITS + test


@pytest.mark.parametrize(
    ("mode", "ids"),
    [
        (Mode.MODE_UNSPECIFIED, {"task_live", "task_test"}),
        *[(Mode.MODE_LIVE, {"task_live"}), (Mode.MODE_TEST, {"task_test"})],
    ],
)
async def test_usage_is_of_one_mode_or_of_both(
    operator: LocalOperator, store: Store, mode: Mode.ValueType, ids: set[str]
) -> None:
    await add_account(store)
    await run(store, "task_live", ACME)
    await run(store, "task_test", ACME_TEST)
    for account in ("acme", ""):
        listed = await operator.list_usage(pb.ListUsageRequest(account_id=account, mode=mode))
        assert {record.id for record in listed.records} == ids
        sums = await operator.sum_usage(pb.SumUsageRequest(account_id=account, mode=mode))
        assert [row.tasks for row in sums.sums] == [len(ids)]
    with refused("not_found", "account_id"):
        await operator.list_usage(pb.ListUsageRequest(account_id="nobody", mode=mode))
    with refused("not_found", "account_id"):
        await operator.sum_usage(pb.SumUsageRequest(account_id="nobody", mode=mode))


@pytest.mark.parametrize(
    ("method", "request_", "entries"),
    [
        ("list_usage", pb.ListUsageRequest(page_size=2), "records"),
        (
            "sum_usage",
            pb.SumUsageRequest(
                page_size=2, group_by=[pb.UsageGrouping(dimension=account_pb.USAGE_DIMENSION_KEY)]
            ),
            "sums",
        ),
        ("list_acts", pb.ListActsRequest(page_size=2), "acts"),
    ],
)
async def test_reports_are_returned_in_pages(
    operator: LocalOperator, store: Store, method: str, request_: Any, entries: str
) -> None:
    await add_account(store)
    for number in range(3):
        await run(store, f"task_{number}", ACME, key_id=f"key_{number}")
        await operator.create_key(pb.CreateKeyRequest())
    first = await getattr(operator, method)(request_)
    rest = type(request_)()
    rest.CopyFrom(request_)
    rest.page_token = first.next_page_token
    second = await getattr(operator, method)(rest)
    assert [len(getattr(page, entries)) for page in (first, second)] == [2, 1]
    assert second.next_page_token == ""


async def test_an_audit_knows_the_running_tasks_and_the_time(
    operator: LocalOperator, store: Store, clock: Clock
) -> None:
    await add_account(store)
    for task_id in ("task_1", "task_2"):
        await reserve(store, task_id)  # at 1,000 s
    (finding,) = (await operator.audit_ledger(pb.AuditLedgerRequest())).findings
    assert (finding.subject, "no process runs it" in finding.detail) == ("task_2", True)
    clock.now += 86_400.0
    findings = (await operator.audit_ledger(pb.AuditLedgerRequest())).findings
    assert {one.subject for one in findings} == {"task_1", "task_2"}
