"""The operator's requests, run on the store of this process: keys, accounts, usage records, and the audit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from pomelo import times
from pomelo.accounts import pages
from pomelo.accounts.accounts import AccountAdmin, unknown_account
from pomelo.accounts.audit import audit
from pomelo.accounts.keys import Keyring
from pomelo.accounts.usage import UsageReader, read_time
from pomelo.errors import invalid, missing
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.stores.accounts import DEFAULT_ACCOUNT, UnknownAccountError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord


class LocalOperator:
    """Implements `pomelo.service.Operator`.

    A key may be restricted to some of `models`. `now` returns Unix time; `runs` returns whether this process
    runs the task with that id.
    """

    def __init__(
        self,
        store: Store,
        keyring: Keyring,
        accounts: AccountAdmin,
        usage: UsageReader,
        models: Collection[str],
        now: Callable[[], float] = time.time,
        *,
        runs: Callable[[str], bool] = lambda task_id: False,
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._accounts = accounts
        self._usage = usage
        self._models = models
        self._now = now
        self._runs = runs

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:
        _check_mode(request.mode)
        for name in request.models:
            if name not in self._models:
                raise invalid(
                    "models", f"names of models, and {name[:100]!r} is not a model. See: pomelo models"
                )
        account = request.account or DEFAULT_ACCOUNT
        try:
            record, secret = await self._keyring.create(
                account,
                live=request.mode == pb.KEY_MODE_LIVE,
                models=dict.fromkeys(request.models),
                expires=self._expires(request),
            )
        except UnknownAccountError as error:
            raise unknown_account(account, "account") from error
        return pb.CreateKeyResponse(key=_key(record), secret=secret)

    async def list_keys(self, request: pb.ListKeysRequest) -> pb.ListKeysResponse:
        size, list_name = pages.page_size(request.page_size), f"keys of {request.account}"
        after: tuple[float, str] | None = None
        if request.page_token:
            created, key_id = pages.read_token(request.page_token, list_name, float, str)
            after = (created, key_id)
        records = await self._keyring.list(request.account or None, limit=size + 1, after=after)
        keys = [_key(record) for record in records]
        count = min(size, pages.fitting(keys))
        token = ""
        if count < len(keys):
            token = pages.make_token(list_name, records[count - 1].created, records[count - 1].key_id)
        return pb.ListKeysResponse(keys=keys[:count], next_page_token=token)

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:
        record, secret = await self._keyring.rotate(_key_id(request.key_id))
        return pb.RotateKeyResponse(key=_key(record), secret=secret)

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:
        return pb.RevokeKeyResponse(key=_key(await self._keyring.revoke(_key_id(request.key_id))))

    async def create_account(self, request: pb.CreateAccountRequest) -> pb.CreateAccountResponse:
        account = await self._accounts.create(request.name, request.plan, request.live_micros)
        return pb.CreateAccountResponse(account=account)

    async def list_accounts(self, request: pb.ListAccountsRequest) -> pb.ListAccountsResponse:
        accounts, token = await self._accounts.list(request.page_size, request.page_token)
        return pb.ListAccountsResponse(accounts=accounts, next_page_token=token)

    async def show_account(self, request: pb.ShowAccountRequest) -> pb.ShowAccountResponse:
        return pb.ShowAccountResponse(account=await self._accounts.show(request.name))

    async def grant_credits(self, request: pb.GrantCreditsRequest) -> pb.GrantCreditsResponse:
        _check_mode(request.mode)
        account = await self._accounts.grant(
            request.name,
            request.amount_micros,
            live=request.mode != pb.KEY_MODE_TEST,
            note=request.note,
            grant_id=request.grant_id,
        )
        return pb.GrantCreditsResponse(account=account)

    async def set_plan(self, request: pb.SetPlanRequest) -> pb.SetPlanResponse:
        return pb.SetPlanResponse(account=await self._accounts.set_plan(request.name, request.plan))

    async def query_usage(self, request: pb.QueryUsageRequest) -> pb.QueryUsageResponse:
        _check_mode(request.mode)
        if request.account and await self._store.get_account(request.account) is None:
            raise unknown_account(request.account, "account")
        live = None if request.mode == pb.KEY_MODE_UNSPECIFIED else request.mode == pb.KEY_MODE_LIVE
        usage = await self._usage.list(request.query, request.account or None, live)
        return pb.QueryUsageResponse(usage=usage)

    async def audit(self, request: pb.AuditRequest) -> pb.AuditResponse:
        return await audit(self._store, runs=self._runs, now=self._now)

    def _expires(self, request: pb.CreateKeyRequest) -> float | None:
        expires = read_time(request, "expire_time")
        if expires is not None and expires <= self._now():
            raise invalid("expire_time", "in the future")
        return expires


def _check_mode(mode: int) -> None:
    if mode not in pb.KeyMode.values():
        raise invalid("mode", "KEY_MODE_TEST or KEY_MODE_LIVE")


def _key_id(key_id: str) -> str:
    if not key_id:
        raise missing("key_id")
    return key_id


def _key(record: KeyRecord) -> pb.Key:
    return pb.Key(
        key_id=record.key_id,
        account=record.account,
        mode=pb.KEY_MODE_LIVE if record.live else pb.KEY_MODE_TEST,
        models=record.models,
        create_time=times.to_timestamp(record.created),
        expire_time=None if record.expires is None else times.to_timestamp(record.expires),
        revoke_time=None if record.revoked is None else times.to_timestamp(record.revoked),
    )
