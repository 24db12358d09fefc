"""What the operator does: `AdminService` over the keyring, the accounts, the usage records and the audit.

`pomelo.server.main.open_admin` serves it on the unix socket; where no server runs, the command line asks an
`AdminServicer` on a store that it opened itself, by the methods in lower case. It checks what is asked for;
how keys, accounts and records are made and kept is for those to say who keep them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from pomelo import times
from pomelo.accounts import pages
from pomelo.accounts.accounts import AccountAdmin, unknown_account
from pomelo.accounts.audit import audit
from pomelo.accounts.keys import Keyring
from pomelo.accounts.usage import UsageReader
from pomelo.errors import invalid, missing
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceServicer
from pomelo.server.calls import answering
from pomelo.server.limits import Running
from pomelo.server.rpc import Rpc
from pomelo.stores.accounts import DEFAULT_ACCOUNT, UnknownAccountError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord


class AdminServicer(AdminServiceServicer):
    """pomelo.v1.AdminService. `models` are the names that a key may be confined to; `now` is Unix time;
    `runs` returns whether this process runs the task with that id."""

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
        self.running = Running()

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:
        """Makes a key.

        Raises:
            PomeloError: not_found (the account), invalid_parameter, store_unavailable.
        """
        _check_mode(request.mode)
        for name in request.models:
            if name not in self._models:
                raise invalid("models", f"names of models, and {name[:100]!r} is none. See: pomelo models")
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
        """A page of the keys of an account, or of all.

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        size, what = pages.page_size(request.page_size), f"keys of {request.account}"
        after: tuple[float, str] | None = None
        if request.page_token:
            created, key_id = pages.read_token(request.page_token, what, float, str)
            after = (created, key_id)
        records = await self._keyring.list(request.account or None, limit=size + 1, after=after)
        keys = [_key(record) for record in records]
        count = min(size, pages.fitting(keys))
        token = ""
        if count < len(keys):
            token = pages.make_token(what, records[count - 1].created, records[count - 1].key_id)
        return pb.ListKeysResponse(keys=keys[:count], next_page_token=token)

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:
        """Makes a key like another one, and ends the other.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
        record, secret = await self._keyring.rotate(_key_id(request.key_id))
        return pb.RotateKeyResponse(key=_key(record), secret=secret)

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:
        """Ends a key.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        return pb.RevokeKeyResponse(key=_key(await self._keyring.revoke(_key_id(request.key_id))))

    async def create_account(self, request: pb.CreateAccountRequest) -> pb.CreateAccountResponse:
        """Makes an account.

        Raises:
            PomeloError: missing_parameter, invalid_parameter, store_unavailable.
        """
        account = await self._accounts.create(request.name, request.plan, request.live_micros)
        return pb.CreateAccountResponse(account=account)

    async def list_accounts(self, request: pb.ListAccountsRequest) -> pb.ListAccountsResponse:
        """A page of accounts.

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        accounts, token = await self._accounts.list(request.page_size, request.page_token)
        return pb.ListAccountsResponse(accounts=accounts, next_page_token=token)

    async def show_account(self, request: pb.ShowAccountRequest) -> pb.ShowAccountResponse:
        """One account.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        return pb.ShowAccountResponse(account=await self._accounts.show(request.name))

    async def grant_credits(self, request: pb.GrantCreditsRequest) -> pb.GrantCreditsResponse:
        """Gives credits: live ones, unless asked otherwise.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
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
        """Puts an account on another plan.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
        return pb.SetPlanResponse(account=await self._accounts.set_plan(request.name, request.plan))

    async def query_usage(self, request: pb.QueryUsageRequest) -> pb.QueryUsageResponse:
        """Usage of one account or all.

        Raises:
            PomeloError: not_found, invalid_parameter, store_unavailable.
        """
        _check_mode(request.mode)
        if request.account and await self._store.get_account(request.account) is None:
            raise unknown_account(request.account, "account")
        live = None if request.mode == pb.KEY_MODE_UNSPECIFIED else request.mode == pb.KEY_MODE_LIVE
        usage = await self._usage.list(request.query, request.account or None, live)
        return pb.QueryUsageResponse(usage=usage)

    async def audit(self, request: pb.AuditRequest) -> pb.AuditResponse:
        """Recomputes every balance and bill.

        Raises:
            PomeloError: store_unavailable.
        """
        return await audit(self._store, runs=self._runs, now=self._now)

    # --- the same over gRPC

    @answering
    async def CreateKey(self, request: pb.CreateKeyRequest, rpc: Rpc) -> pb.CreateKeyResponse:
        """See the contract."""
        return await self.create_key(request)

    @answering
    async def ListKeys(self, request: pb.ListKeysRequest, rpc: Rpc) -> pb.ListKeysResponse:
        """See the contract."""
        return await self.list_keys(request)

    @answering
    async def RotateKey(self, request: pb.RotateKeyRequest, rpc: Rpc) -> pb.RotateKeyResponse:
        """See the contract."""
        return await self.rotate_key(request)

    @answering
    async def RevokeKey(self, request: pb.RevokeKeyRequest, rpc: Rpc) -> pb.RevokeKeyResponse:
        """See the contract."""
        return await self.revoke_key(request)

    @answering
    async def CreateAccount(self, request: pb.CreateAccountRequest, rpc: Rpc) -> pb.CreateAccountResponse:
        """See the contract."""
        return await self.create_account(request)

    @answering
    async def ListAccounts(self, request: pb.ListAccountsRequest, rpc: Rpc) -> pb.ListAccountsResponse:
        """See the contract."""
        return await self.list_accounts(request)

    @answering
    async def ShowAccount(self, request: pb.ShowAccountRequest, rpc: Rpc) -> pb.ShowAccountResponse:
        """See the contract."""
        return await self.show_account(request)

    @answering
    async def GrantCredits(self, request: pb.GrantCreditsRequest, rpc: Rpc) -> pb.GrantCreditsResponse:
        """See the contract."""
        return await self.grant_credits(request)

    @answering
    async def SetPlan(self, request: pb.SetPlanRequest, rpc: Rpc) -> pb.SetPlanResponse:
        """See the contract."""
        return await self.set_plan(request)

    @answering
    async def QueryUsage(self, request: pb.QueryUsageRequest, rpc: Rpc) -> pb.QueryUsageResponse:
        """See the contract."""
        return await self.query_usage(request)

    @answering
    async def Audit(self, request: pb.AuditRequest, rpc: Rpc) -> pb.AuditResponse:
        """See the contract."""
        return await self.audit(request)

    def _expires(self, request: pb.CreateKeyRequest) -> float | None:
        if not request.HasField("expire_time"):
            return None
        try:
            expires = times.from_timestamp(request.expire_time)
        except ValueError as error:
            raise invalid("expire_time", str(error)) from None
        if expires <= self._now():
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
