"""The operator's requests on a store of this process: pages of keys, expiry times, grants, and the audit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts.keys import Keyring
from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.pages import MAX_PAGE_BYTES
from pomelo.accounts.plans import BUILTIN
from pomelo.accounts.usage import UsageReader
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import ModelSet
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.stores import open_store
from tests.unit.accounts.audited_store import ACME, ACME_TEST, add_account, reserve, run

NOW = 1_600.0
SECRET = b"r" * 64
LONG = [f"model-{number:04}-{'x' * 200}" for number in range(2_000)]
"""Names of models whose sum is larger than a third of a page."""


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[LocalOperator]:
    """An operator whose clock stands still, on a store with the account acme; task_1 runs."""
    async with open_store(f"sqlite:{tmp_path / 'pomelo.db'}") as store:
        await add_account(store)
        await reserve(store, "task_1")
        keyring, usage = Keyring(store, SECRET), UsageReader(store, SECRET)
        runs = {"task_1"}.__contains__
        yield LocalOperator(store, keyring, BUILTIN, usage, ["gpt-4", *LONG], lambda: NOW, runs=runs)


async def test_pages_of_keys_have_each_key_once_and_belong_to_one_account(operator: LocalOperator) -> None:
    created = [(await operator.create_key(pb.CreateKeyRequest(account_id="acme"))).key for _ in range(5)]
    await operator.create_key(pb.CreateKeyRequest())
    pages: list[list[pb.Key]] = []
    token = ""
    while token or not pages:
        request = pb.ListKeysRequest(account_id="acme", page_size=2, page_token=token)
        page = await operator.list_keys(request)
        pages.append(list(page.keys))
        token = page.next_page_token
        if token:
            other = pb.ListKeysRequest(page_size=2, page_token=token)
            with pytest.raises(PomeloError) as caught:
                await operator.list_keys(other)
            assert (caught.value.code, caught.value.field) == ("invalid_parameter", "page_token")
    assert list(map(len, pages)) == [2, 2, 1]
    listed = [key.id for page in pages for key in page]
    assert sorted(listed) == sorted(key.id for key in created)


async def test_a_page_of_keys_ends_before_it_is_too_large(operator: LocalOperator) -> None:
    for _ in range(4):
        await operator.create_key(pb.CreateKeyRequest(account_id="acme", models=ModelSet(models=LONG)))
    page = await operator.list_keys(pb.ListKeysRequest(account_id="acme"))
    assert (len(page.keys), page.ByteSize() <= MAX_PAGE_BYTES + 1000) == (2, True)
    rest = await operator.list_keys(pb.ListKeysRequest(account_id="acme", page_token=page.next_page_token))
    assert len({key.id for key in (*page.keys, *rest.keys)}) == 4
    assert not rest.next_page_token


@pytest.mark.parametrize(
    ("expires", "message"),
    [
        (Timestamp(seconds=int(NOW)), "Invalid expire_time: must be in the future"),
        (Timestamp(seconds=2**60), "Invalid expire_time: must be "),
    ],
)
async def test_an_expiry_that_is_not_in_the_future_or_no_time_is_refused(
    operator: LocalOperator, expires: Timestamp, message: str
) -> None:
    with pytest.raises(PomeloError) as caught:
        await operator.create_key(pb.CreateKeyRequest(expire_time=expires))
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "expire_time")
    assert caught.value.message.startswith(message)
    next_second = Timestamp(seconds=int(NOW) + 1)
    key = (await operator.create_key(pb.CreateKeyRequest(expire_time=next_second))).key
    assert key.expire_time == next_second


async def test_an_unknown_model_is_named_by_its_first_hundred_characters(operator: LocalOperator) -> None:
    with pytest.raises(PomeloError) as caught:
        await operator.create_key(pb.CreateKeyRequest(models=ModelSet(models=["gpt-4", "y" * 101])))
    assert f"'{'y' * 100}' is not a model" in caught.value.message


async def test_a_grant_with_too_long_a_note_is_refused(operator: LocalOperator) -> None:
    request = pb.GrantCreditsRequest(account_id="acme", amount_micros=5, note="n" * 10_000)
    with pytest.raises(PomeloError) as caught:
        await operator.grant_credits(request)
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "note")


async def test_a_new_account_has_the_plan_and_the_live_credits_of_its_request(
    operator: LocalOperator,
) -> None:
    request = pb.CreateAccountRequest(id="new", plan="scale", live_micros=7)
    account = (await operator.create_account(request)).account
    assert (account.plan, account.live.granted_micros) == ("scale", 7)


async def test_usage_is_of_the_mode_that_is_asked_for(operator: LocalOperator) -> None:
    await run(operator._store, "live", ACME)
    await run(operator._store, "test", ACME_TEST)
    for mode, found in (
        (Mode.MODE_LIVE, ["live"]),
        (Mode.MODE_TEST, ["test"]),
        (Mode.MODE_UNSPECIFIED, ["live", "test"]),
    ):
        request = pb.ListUsageRequest(account_id="acme", mode=mode)
        records = (await operator.list_usage(request)).records
        assert sorted(record.id for record in records) == found


async def test_the_audit_finds_a_reservation_of_a_task_that_does_not_run(operator: LocalOperator) -> None:
    assert not (await operator.audit_ledger(pb.AuditLedgerRequest())).findings
    await reserve(operator._store, "task_2")
    (finding,) = (await operator.audit_ledger(pb.AuditLedgerRequest())).findings
    assert "task_2" in str(finding)
    assert "no process runs it" in str(finding)
