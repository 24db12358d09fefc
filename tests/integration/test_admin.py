"""AdminService over the Unix socket of a running app: its results and its errors, neither with a secret."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.keys import parse
from pomelo.app import App
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import USAGE_GROUP_ACCOUNT, Balance, ListUsageRequest
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.status import from_rpc_error
from tests.calls import bearer
from tests.tasks import text_task

UNKNOWN: Any = 9
"""A mode that does not exist."""
PAST = Timestamp(seconds=1)
LARGE_PAGE = ListUsageRequest(page_size=1001)


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
    assert parse(created.secret) == created.key.key_id
    assert (created.key.account, created.key.mode) == ("default", pb.KEY_MODE_TEST)
    assert list(created.key.models) == []
    assert created.key.HasField("create_time")
    assert not created.key.HasField("expire_time")
    assert not created.key.HasField("revoke_time")


async def test_duplicate_models_of_a_key_are_removed_in_order(admin: AdminServiceStub) -> None:
    created = await admin.CreateKey(pb.CreateKeyRequest(models=["gpt-4", "flux-1-pro", "gpt-4"]))
    assert list(created.key.models) == ["gpt-4", "flux-1-pro"]


async def test_an_expiry_time_keeps_its_milliseconds(admin: AdminServiceStub) -> None:
    end = Timestamp(seconds=4_000_000_000, nanos=250_000_000)
    created = await admin.CreateKey(pb.CreateKeyRequest(expire_time=end))
    assert created.key.expire_time == end


async def test_listed_and_revoked_keys_have_no_secret(admin: AdminServiceStub) -> None:
    created = await admin.CreateKey(pb.CreateKeyRequest())
    listed = await admin.ListKeys(pb.ListKeysRequest(page_size=1_000))
    revoked = await admin.RevokeKey(pb.RevokeKeyRequest(key_id=created.key.key_id))
    assert created.key in listed.keys
    assert revoked.key.HasField("revoke_time")
    secret = created.secret[22:54]
    assert secret not in str(listed)
    assert secret not in str(revoked)
    times = [key.create_time.ToNanoseconds() for key in listed.keys]
    assert times == sorted(times)
    assert not (await admin.ListKeys(pb.ListKeysRequest(account="nobody"))).keys


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [
        ("CreateKey", pb.CreateKeyRequest(account="nobody"), "not_found", "account"),
        ("CreateKey", pb.CreateKeyRequest(models=["gpt-5"]), "invalid_parameter", "models"),
        ("CreateKey", pb.CreateKeyRequest(mode=UNKNOWN), "invalid_parameter", "mode"),
        ("CreateKey", pb.CreateKeyRequest(expire_time=PAST), "invalid_parameter", "expire_time"),
        ("RotateKey", pb.RotateKeyRequest(), "missing_parameter", "key_id"),
        ("RotateKey", pb.RotateKeyRequest(key_id="nothing"), "not_found", "key_id"),
        ("RevokeKey", pb.RevokeKeyRequest(), "missing_parameter", "key_id"),
        ("RevokeKey", pb.RevokeKeyRequest(key_id="\x00'--"), "not_found", "key_id"),
        ("CreateAccount", pb.CreateAccountRequest(), "missing_parameter", "name"),
        ("CreateAccount", pb.CreateAccountRequest(name="default"), "invalid_parameter", "name"),
        ("CreateAccount", pb.CreateAccountRequest(name="x", plan="none"), "invalid_parameter", "plan"),
        ("ShowAccount", pb.ShowAccountRequest(name="nobody"), "not_found", "name"),
        ("GrantCredits", pb.GrantCreditsRequest(name="nobody", amount_micros=1), "not_found", "name"),
        ("GrantCredits", pb.GrantCreditsRequest(name="default"), "invalid_parameter", "amount_micros"),
        (
            "GrantCredits",
            pb.GrantCreditsRequest(name="default", amount_micros=1, mode=UNKNOWN),
            "invalid_parameter",
            "mode",
        ),
        ("SetPlan", pb.SetPlanRequest(name="nobody", plan="pro"), "not_found", "name"),
        ("SetPlan", pb.SetPlanRequest(name="default", plan="none"), "invalid_parameter", "plan"),
        ("QueryUsage", pb.QueryUsageRequest(account="nobody"), "not_found", "account"),
        ("QueryUsage", pb.QueryUsageRequest(mode=UNKNOWN), "invalid_parameter", "mode"),
        ("ListKeys", pb.ListKeysRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("ListKeys", pb.ListKeysRequest(page_token="x"), "invalid_parameter", "page_token"),
        ("ListAccounts", pb.ListAccountsRequest(page_size=-1), "invalid_parameter", "page_size"),
        ("ListAccounts", pb.ListAccountsRequest(page_token="x"), "invalid_parameter", "page_token"),
        ("QueryUsage", pb.QueryUsageRequest(query=LARGE_PAGE), "invalid_parameter", "page_size"),
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
        await admin.CreateKey(pb.CreateKeyRequest(account="keyed"))
    await admin.CreateAccount(pb.CreateAccountRequest(name="keyed"))
    assert (await admin.CreateKey(pb.CreateKeyRequest(account="keyed"))).key.account == "keyed"


async def test_credits_are_live_by_default_and_granted_once_per_grant_id(admin: AdminServiceStub) -> None:
    created = await admin.CreateAccount(pb.CreateAccountRequest(name="endowed", live_micros=5))
    assert created.account.live == Balance(granted_micros=5, available_micros=5)
    request = pb.GrantCreditsRequest(name="endowed", amount_micros=7, grant_id="endowed-1")
    for _ in range(2):
        assert (await admin.GrantCredits(request)).account.live.granted_micros == 12
    request = pb.GrantCreditsRequest(name="endowed", amount_micros=7, mode=pb.KEY_MODE_TEST)
    after = (await admin.GrantCredits(request)).account
    assert (after.live.granted_micros, after.test.granted_micros) == (12, 100_000_007)
    listed = (await admin.ListAccounts(pb.ListAccountsRequest())).accounts
    assert after in listed
    assert [account.name for account in listed] == sorted(account.name for account in listed)
    account = (await admin.SetPlan(pb.SetPlanRequest(name="endowed", plan="unlimited"))).account
    assert account.limits.requests_per_minute == 0
    assert (await admin.ShowAccount(pb.ShowAccountRequest(name="endowed"))).account == account


async def test_usage_is_of_all_accounts_or_of_one_mode_of_an_account(
    admin: AdminServiceStub, app: App, channel: grpc.aio.Channel
) -> None:
    await admin.CreateAccount(pb.CreateAccountRequest(name="busy", plan="pro"))
    key = (await admin.CreateKey(pb.CreateKeyRequest(account="busy"))).secret
    request = RunTaskRequest(spec=text_task())
    response = await TaskServiceStub(channel).RunTask(request, metadata=bearer(key))
    report = await admin.QueryUsage(pb.QueryUsageRequest(account="busy"))
    assert [record.id for record in report.usage.records] == [response.result.id]
    live = pb.QueryUsageRequest(account="busy", mode=pb.KEY_MODE_LIVE)
    assert not (await admin.QueryUsage(live)).usage.records
    by_account = pb.QueryUsageRequest(query=ListUsageRequest(group_by=USAGE_GROUP_ACCOUNT))
    totals = (await admin.QueryUsage(by_account)).usage.totals
    assert [total.tasks for total in totals if total.group == "busy"] == [1]


async def test_the_audit_of_the_running_app_finds_nothing(admin: AdminServiceStub) -> None:
    report = await admin.Audit(pb.AuditRequest())
    assert not report.findings
    assert report.wallets >= 2
