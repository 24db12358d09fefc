"""The operator's requests, run on the store of this process: keys, accounts, usage records, the audit and
the operator's log."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from pomelo.accounts import budgets, pages
from pomelo.accounts.accounts import AccountOperator, unknown_account
from pomelo.accounts.acts import to_message
from pomelo.accounts.audit import audit
from pomelo.accounts.keys import Keyring
from pomelo.accounts.modes import is_live, to_mode
from pomelo.accounts.plans import Plan
from pomelo.accounts.usage import UsageReader, read_filter, read_groupings, read_time
from pomelo.errors import invalid
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import ModelSet
from pomelo.protobuf import times
from pomelo.stores.accounts import DEFAULT_ACCOUNT, UnknownAccountError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.usage import UsageQuery

MAX_NAME = 64
"""Characters of the name of a key."""

MAX_GRACE = 30 * 86_400
"""Seconds that a key may work after it was replaced."""


class LocalOperator(AccountOperator):
    """Implements `pomelo.service.Operator`.

    A key may be restricted to some of `models`. `now` returns Unix time; `runs` returns whether this process
    runs the task with that id; `server` describes this process.
    """

    def __init__(
        self,
        store: Store,
        keyring: Keyring,
        plans: Mapping[str, Plan],
        usage: UsageReader,
        models: Collection[str],
        now: Callable[[], float] = time.time,
        *,
        runs: Callable[[str], bool] = lambda task_id: False,
        server: Callable[[], pb.GetServerResponse] = pb.GetServerResponse,
    ) -> None:
        super().__init__(store, plans, keyring.forget_account, now)
        self._keyring = keyring
        self._usage = usage
        self._models = models
        self._runs = runs
        self._server = server

    def configure(self, plans: Mapping[str, Plan], models: Collection[str]) -> None:
        self._plans = plans
        self._models = models

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:
        live = is_live(request.mode, default=False)
        models = self._read_models(request)
        if len(request.name) > MAX_NAME or not request.name.isprintable():
            raise invalid("name", f"up to {MAX_NAME} printable characters", maximum=MAX_NAME)
        account = request.account_id or DEFAULT_ACCOUNT
        try:
            record, secret = await self._keyring.create(
                account,
                live=live,
                models=models,
                expires=self._expires(request),
                name=request.name,
                budget=budgets.read_budget(request.budget) if request.HasField("budget") else "",
            )
        except UnknownAccountError as error:
            raise unknown_account(account) from error
        return pb.CreateKeyResponse(key=_key(record), secret=secret)

    async def list_keys(self, request: pb.ListKeysRequest) -> pb.ListKeysResponse:
        await self._check_account(request.account_id)
        size, list_name = pages.page_size(request.page_size), f"keys of {request.account_id}"
        after = pages.read_token(request.page_token, list_name, float, str)
        records = await self._store.list_keys(request.account_id or None, limit=size + 1, after=after)
        outdated = await self._keyring.keys_of_previous_secrets(records)
        used = await budgets.used(self._store, records, self._now())
        keys = [_key(record, record.key_id in outdated, used.get(record.key_id, 0)) for record in records]
        page, token = pages.first_page(
            keys, size, list_name, lambda last: (records[last].created, records[last].key_id)
        )
        return pb.ListKeysResponse(keys=page, next_page_token=token)

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:
        grace = times.from_duration(request.grace)
        if not times.is_duration(request.grace) or not 0 <= grace <= MAX_GRACE:
            raise invalid("grace", "0 seconds to 30 days", minimum=0, maximum=MAX_GRACE)
        record, secret = await self._keyring.rotate(request.id, grace)
        return pb.RotateKeyResponse(key=_key(record), secret=secret)

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:
        return pb.RevokeKeyResponse(key=_key(await self._keyring.revoke(request.id)))

    async def set_key_budget(self, request: pb.SetKeyBudgetRequest) -> pb.SetKeyBudgetResponse:
        budget = budgets.read_budget(request.budget) if request.HasField("budget") else ""
        return pb.SetKeyBudgetResponse(key=_key(await self._keyring.set_budget(request.id, budget)))

    async def list_usage(self, request: pb.ListUsageRequest) -> pb.ListUsageResponse:
        query = await self._read_query(request)
        records, token = await self._usage.list_records(query, request.page_size, request.page_token)
        return pb.ListUsageResponse(records=records, next_page_token=token)

    async def sum_usage(self, request: pb.SumUsageRequest) -> pb.SumUsageResponse:
        query = await self._read_query(request)
        by = read_groupings(request.group_by)
        sums, token = await self._usage.sum_records(query, by, request.page_size, request.page_token)
        return pb.SumUsageResponse(sums=sums, next_page_token=token)

    async def audit_ledger(self, request: pb.AuditLedgerRequest) -> pb.AuditLedgerResponse:
        return await audit(self._store, runs=self._runs, now=self._now)

    async def list_acts(self, request: pb.ListActsRequest) -> pb.ListActsResponse:
        await self._check_account(request.account_id)
        since = read_time(request, "start_time")
        size, list_name = pages.page_size(request.page_size), f"acts of {request.account_id} since {since}"
        after = pages.read_token(request.page_token, list_name, float, str)
        found = await self._store.list_acts(
            request.account_id or None, since=since, limit=size + 1, after=after
        )
        acts = [to_message(act) for act in found]
        page, token = pages.first_page(
            acts, size, list_name, lambda last: (found[last].at, found[last].act_id)
        )
        return pb.ListActsResponse(acts=page, next_page_token=token)

    async def get_server(self, request: pb.GetServerRequest) -> pb.GetServerResponse:
        return self._server()

    async def _read_query(self, request: pb.ListUsageRequest | pb.SumUsageRequest) -> UsageQuery:
        live = is_live(request.mode, default=None)
        await self._check_account(request.account_id)
        return read_filter(request.filter, request.account_id or None, live)

    async def _check_account(self, account_id: str) -> None:
        """Refuses a list of an account that does not exist: it would look as if the account had nothing.
        Empty: all accounts.

        Raises:
            PomeloError: not_found.
        """
        if account_id and await self._store.get_account(account_id) is None:
            raise unknown_account(account_id)

    def _read_models(self, request: pb.CreateKeyRequest) -> list[str]:
        """The models of a new key, each once; empty: all."""
        if not request.HasField("models"):
            return []
        if not request.models.models:
            raise invalid("models", "at least one model, or absent for all")
        for name in request.models.models:
            if name not in self._models:
                raise invalid(
                    "models", f"names of models, and {name[:100]!r} is not a model. See: pomelo models"
                )
        return list(dict.fromkeys(request.models.models))

    def _expires(self, request: pb.CreateKeyRequest) -> float | None:
        expires = read_time(request, "expire_time")
        if expires is not None and expires <= self._now():
            raise invalid("expire_time", "in the future")
        return expires


def _key(record: KeyRecord, previous_secret: bool = False, budget_used: int = 0) -> pb.Key:
    return pb.Key(
        id=record.key_id,
        account_id=record.account,
        mode=to_mode(record.live),
        models=ModelSet(models=record.models) if record.models else None,
        create_time=times.to_timestamp(record.created),
        expire_time=None if record.expires is None else times.to_timestamp(record.expires),
        revoke_time=None if record.revoked is None else times.to_timestamp(record.revoked),
        name=record.name,
        budget=budgets.to_message(record.budget),
        last_use_time=None if record.used is None else times.to_timestamp(record.used),
        previous_secret=previous_secret,
        budget_used_micros=budget_used,
    )
