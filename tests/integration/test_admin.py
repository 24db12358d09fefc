"""AdminService over the Unix socket of a running app: its results and its errors, neither with a secret."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.key_format import parse
from pomelo.app import App
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.gen.v1.account_service_pb2 import Balance, ModelSet, PlanLimits, UsageFilter
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.status import from_rpc_error
from tests.calls import bearer, failure, reason_of
from tests.tasks import text_task

UNKNOWN: Any = 9
"""A mode that does not exist."""
PAST = Timestamp(seconds=1)
NO_TIME = Timestamp(nanos=-1)


@pytest.fixture
async def admin(app: App) -> AsyncIterator[AdminServiceStub]:
    """A stub of the service."""
    async with grpc.aio.insecure_channel(f"unix:{app.settings.admin_socket}") as channel:
        yield AdminServiceStub(channel)


async def test_only_the_owner_can_use_the_socket(app: App) -> None:
    mode = app.settings.admin_socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_a_new_key_is_a_test_key_of_the_default_account_by_default(admin: AdminServiceStub) -> None:
    created = await admin.CreateKey(pb.CreateKeyRequest())
    assert parse(created.secret) == created.key.id
    assert (created.key.account_id, created.key.mode) == ("default", Mode.MODE_TEST)
    assert not created.key.HasField("models")
    assert created.key.HasField("create_time")
    assert not created.key.HasField("expire_time")
    assert not created.key.HasField("revoke_time")


async def test_duplicate_models_of_a_key_are_removed_in_order(admin: AdminServiceStub) -> None:
    created = await admin.CreateKey(
        pb.CreateKeyRequest(models=ModelSet(models=["gpt-4", "flux-1-pro", "gpt-4"]))
    )
    assert created.key.models == ModelSet(models=["gpt-4", "flux-1-pro"])


async def test_an_expiry_time_keeps_its_milliseconds(admin: AdminServiceStub) -> None:
    end = Timestamp(seconds=4_000_000_000, nanos=250_000_000)
    created = await admin.CreateKey(pb.CreateKeyRequest(expire_time=end))
    assert created.key.expire_time == end


async def test_listed_and_revoked_keys_have_no_secret(admin: AdminServiceStub) -> None:
    created = await admin.CreateKey(pb.CreateKeyRequest())
    listed = await admin.ListKeys(pb.ListKeysRequest(page_size=1_000))
    revoked = await admin.RevokeKey(pb.RevokeKeyRequest(id=created.key.id))
    assert created.key in listed.keys
    assert revoked.key.HasField("revoke_time")
    secret = created.secret[22:54]
    assert secret not in str(listed)
    assert secret not in str(revoked)
    times = [key.create_time.ToNanoseconds() for key in listed.keys]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [
        ("CreateKey", pb.CreateKeyRequest(account_id="nobody"), "not_found", "account_id"),
        ("CreateKey", pb.CreateKeyRequest(models=ModelSet()), "invalid_parameter", "models"),
        ("CreateKey", pb.CreateKeyRequest(models=ModelSet(models=["gpt-5"])), "invalid_parameter", "models"),
        ("CreateKey", pb.CreateKeyRequest(mode=UNKNOWN), "invalid_parameter", "mode"),
        ("CreateKey", pb.CreateKeyRequest(expire_time=PAST), "invalid_parameter", "expire_time"),
        ("RotateKey", pb.RotateKeyRequest(), "missing_parameter", "id"),
        ("RotateKey", pb.RotateKeyRequest(id="nothing"), "not_found", "id"),
        ("RevokeKey", pb.RevokeKeyRequest(), "missing_parameter", "id"),
        ("RevokeKey", pb.RevokeKeyRequest(id="\x00'--"), "not_found", "id"),
        ("CreateAccount", pb.CreateAccountRequest(), "missing_parameter", "id"),
        ("CreateAccount", pb.CreateAccountRequest(id="default"), "invalid_parameter", "id"),
        ("CreateAccount", pb.CreateAccountRequest(id="x", plan="none"), "invalid_parameter", "plan"),
        ("GetAccount", pb.GetAccountRequest(id="nobody"), "not_found", "id"),
        (
            "GrantCredits",
            pb.GrantCreditsRequest(account_id="nobody", amount_micros=1),
            "not_found",
            "account_id",
        ),
        ("GrantCredits", pb.GrantCreditsRequest(account_id="default"), "invalid_parameter", "amount_micros"),
        (
            "GrantCredits",
            pb.GrantCreditsRequest(account_id="default", amount_micros=1, mode=UNKNOWN),
            "invalid_parameter",
            "mode",
        ),
        (
            "SetAccountPlan",
            pb.SetAccountPlanRequest(account_id="nobody", plan="pro"),
            "not_found",
            "account_id",
        ),
        (
            "SetAccountPlan",
            pb.SetAccountPlanRequest(account_id="default", plan="none"),
            "invalid_parameter",
            "plan",
        ),
        ("ListUsage", pb.ListUsageRequest(account_id="nobody"), "not_found", "account_id"),
        ("ListUsage", pb.ListUsageRequest(mode=UNKNOWN), "invalid_parameter", "mode"),
        (
            "ListUsage",
            pb.ListUsageRequest(filter=UsageFilter(start_time=NO_TIME)),
            "invalid_parameter",
            "filter.start_time",
        ),
        ("ListUsage", pb.ListUsageRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("ListUsage", pb.ListUsageRequest(page_token="x"), "invalid_parameter", "page_token"),
        ("SumUsage", pb.SumUsageRequest(account_id="nobody"), "not_found", "account_id"),
        ("SumUsage", pb.SumUsageRequest(mode=UNKNOWN), "invalid_parameter", "mode"),
        (
            "SumUsage",
            pb.SumUsageRequest(filter=UsageFilter(end_time=NO_TIME)),
            "invalid_parameter",
            "filter.end_time",
        ),
        ("SumUsage", pb.SumUsageRequest(group_by=[pb.UsageGrouping()]), "missing_parameter", "group_by"),
        ("SumUsage", pb.SumUsageRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("SumUsage", pb.SumUsageRequest(page_token="x"), "invalid_parameter", "page_token"),
        ("ListKeys", pb.ListKeysRequest(account_id="nobody"), "not_found", "account_id"),
        ("ListKeys", pb.ListKeysRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("ListKeys", pb.ListKeysRequest(page_token="x"), "invalid_parameter", "page_token"),
        ("ListAccounts", pb.ListAccountsRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("ListAccounts", pb.ListAccountsRequest(page_token="x"), "invalid_parameter", "page_token"),
    ],
)
async def test_an_error_names_the_field_in_its_details(
    admin: AdminServiceStub, method: str, request_: Message, code: str, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(admin, method)(request_)
    error = from_rpc_error(caught.value)
    assert (error.code, error.field) == (code, field)


# --- accounts


async def test_a_key_is_created_only_for_an_existing_account(admin: AdminServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await admin.CreateKey(pb.CreateKeyRequest(account_id="keyed"))
    await admin.CreateAccount(pb.CreateAccountRequest(id="keyed"))
    assert (await admin.CreateKey(pb.CreateKeyRequest(account_id="keyed"))).key.account_id == "keyed"


async def test_credits_are_live_by_default_and_granted_once_per_grant_id(admin: AdminServiceStub) -> None:
    created = await admin.CreateAccount(pb.CreateAccountRequest(id="endowed", live_micros=5))
    assert created.account.live == Balance(granted_micros=5, available_micros=5)
    request = pb.GrantCreditsRequest(account_id="endowed", amount_micros=7, grant_id="endowed-1")
    for _ in range(2):
        assert (await admin.GrantCredits(request)).account.live.granted_micros == 12
    request = pb.GrantCreditsRequest(account_id="endowed", amount_micros=7, mode=Mode.MODE_TEST)
    after = (await admin.GrantCredits(request)).account
    assert (after.live.granted_micros, after.test.granted_micros) == (12, 100_000_007)
    listed = (await admin.ListAccounts(pb.ListAccountsRequest())).accounts
    assert after in listed
    assert [account.id for account in listed] == sorted(account.id for account in listed)
    account = (
        await admin.SetAccountPlan(pb.SetAccountPlanRequest(account_id="endowed", plan="unlimited"))
    ).account
    assert account.limits == PlanLimits()
    assert (await admin.GetAccount(pb.GetAccountRequest(id="endowed"))).account == account


async def test_usage_is_of_all_accounts_or_of_one_mode_of_an_account(
    admin: AdminServiceStub, app: App, channel: grpc.aio.Channel
) -> None:
    await admin.CreateAccount(pb.CreateAccountRequest(id="busy", plan="pro"))
    key = (await admin.CreateKey(pb.CreateKeyRequest(account_id="busy"))).secret
    request = RunTaskRequest(spec=text_task())
    response = await TaskServiceStub(channel).RunTask(request, metadata=bearer(key))
    listed = await admin.ListUsage(pb.ListUsageRequest(account_id="busy"))
    assert [record.id for record in listed.records] == [response.result.id]
    live = pb.ListUsageRequest(account_id="busy", mode=Mode.MODE_LIVE)
    assert not (await admin.ListUsage(live)).records
    by = [pb.UsageGrouping(operator_dimension=each) for each in pb.OperatorDimension.values() if each]
    sums = (await admin.SumUsage(pb.SumUsageRequest(group_by=by))).sums
    assert [(list(row.groups), row.tasks) for row in sums if row.groups[0] == "busy"] == [
        (["busy", "test"], 1)
    ]


async def test_the_audit_of_the_running_app_finds_nothing(admin: AdminServiceStub) -> None:
    report = await admin.AuditLedger(pb.AuditLedgerRequest())
    assert not report.findings
    assert report.wallets >= 2


async def test_an_unknown_field_of_a_request_is_refused(admin: AdminServiceStub) -> None:
    request = pb.CreateKeyRequest()
    request.MergeFromString(b"\xf8\x3f\x01")  # field 1023
    error = await failure(admin.CreateKey(request))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    assert (error.details() or "").startswith("Unknown field 1023 of the request:")
