"""Accounts: what a key's holder sees of its account, and how the operator manages all accounts."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from pomelo.accounts import pages
from pomelo.accounts.access import Access
from pomelo.accounts.acts import new_act
from pomelo.accounts.budgets import MAX_MICROS, check_amount
from pomelo.accounts.modes import is_live, to_mode
from pomelo.accounts.plans import NEW_ACCOUNTS, TEST_CREDITS, Plan
from pomelo.accounts.usage import UsageReader, read_filter, read_groupings
from pomelo.call import MODE_NAMES, Call, before_deadline
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.ids import new_id
from pomelo.money import MAX_TOTAL_CREDITS, MICROS, format_credits
from pomelo.protobuf import times
from pomelo.runtime.in_flight import FairSemaphore
from pomelo.stores.accounts import (
    AccountRecord,
    AccountStore,
    Balance,
    Grant,
    OverdrawnError,
    Wallet,
)
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery

MAX_NOTE = 200

_REPORTS = 2
"""Reports of usage that run for an account at a time: one may read every record, and take 20 MiB."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IDS = "1 to 64 letters, digits, dots, dashes or underscores"


class LocalAccounts:
    """The account of a key, in the key's mode; implements `pomelo.service.AccountService` in this process."""

    def __init__(self, store: AccountStore, usage: UsageReader, access: Access) -> None:
        self._store = store
        self._usage = usage
        self._access = access
        self._reports = FairSemaphore(_REPORTS)

    async def get_account(self, call: Call) -> pb.Account:
        principal = await self._access.identify(call)
        plan = self._access.plan(principal)
        balance = await self._store.balance(Wallet(principal.account, principal.live))
        return pb.Account(
            id=principal.account,
            plan=plan.name,
            limits=_limits(plan),
            mode=to_mode(principal.live),
            balance=_balance(balance),
        )

    async def list_usage(self, request: pb.ListUsageRequest, call: Call) -> pb.ListUsageResponse:
        async with self._report(request.filter, call) as query:
            records, token = await self._usage.list_records(query, request.page_size, request.page_token)
        return pb.ListUsageResponse(records=records, next_page_token=token)

    async def sum_usage(self, request: pb.SumUsageRequest, call: Call) -> pb.SumUsageResponse:
        async with self._report(request.filter, call) as query:
            by = read_groupings(request.group_by)
            sums, token = await self._usage.sum_records(query, by, request.page_size, request.page_token)
        return pb.SumUsageResponse(sums=sums, next_page_token=token)

    @asynccontextmanager
    async def _report(self, usage_filter: pb.UsageFilter, call: Call) -> AsyncIterator[UsageQuery]:
        """Waits for the turn of a report of usage. Yields the query of the caller's records."""
        principal = await self._access.identify(call)
        query = read_filter(usage_filter, principal.account, principal.live)
        async with before_deadline(call):
            await self._reports.acquire(principal.account)
            try:
                yield query
            finally:
                self._reports.release(principal.account)


class AccountOperator:
    """The operator's requests about accounts; a part of `pomelo.service.Operator`.

    `account_changed` is called with the name of an account whose plan changed, or that was disabled or
    enabled, so that caches forget it. `now` returns Unix time.
    """

    def __init__(
        self,
        store: Store,
        plans: Mapping[str, Plan],
        account_changed: Callable[[str], None],
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._plans = plans
        self._account_changed = account_changed
        self._now = now

    async def create_account(self, request: admin_pb.CreateAccountRequest) -> admin_pb.CreateAccountResponse:
        account_id, plan, live_micros = request.id, request.plan or NEW_ACCOUNTS, request.live_micros
        if not account_id:
            raise missing("id")
        if not _ID.fullmatch(account_id):
            raise invalid("id", _IDS)
        self._check_plan(plan)
        check_amount("live_micros", live_micros, minimum=0)
        now = self._now()
        act = new_act("create_account", account_id, now, new=plan)
        added = await self._store.add_account(account_id, plan, now, act)
        if not added and not await self._is_incomplete(account_id, plan, live_micros):
            raise invalid("id", f"new. The account {account_id!r} exists already")
        # Ids from callers have no colon, and those of accounts are unique, so these grant ids are free.
        # The test credits come last: without them the account is incomplete.
        for live, micros in ((True, live_micros), (False, TEST_CREDITS)):
            if micros:
                grant_id = f"{MODE_NAMES[live]}:{account_id}"
                await self._give(grant_id, Wallet(account_id, live), micros, "to begin with")
        return admin_pb.CreateAccountResponse(account=await self._account(account_id))

    async def _is_incomplete(self, account_id: str, plan: str, live_micros: int) -> bool:
        """Whether the same creation of an account was interrupted before it had all its credits."""
        record = await self._found(account_id)
        live, test = [await self._store.list_grants(Wallet(account_id, live)) for live in (True, False)]
        return record.plan == plan and not test and all(one.amount == live_micros for one in live)

    async def list_accounts(self, request: admin_pb.ListAccountsRequest) -> admin_pb.ListAccountsResponse:
        size = pages.page_size(request.page_size)
        (after,) = pages.read_token(request.page_token, "accounts", str) or ("",)
        found = [
            self._detail(record, record.live, record.test)
            for record in await self._store.list_accounts(limit=size + 1, after=after)
        ]
        page, token = pages.first_page(found, size, "accounts", lambda last: (found[last].id,))
        return admin_pb.ListAccountsResponse(accounts=page, next_page_token=token)

    async def get_account(self, request: admin_pb.GetAccountRequest) -> admin_pb.GetAccountResponse:
        return admin_pb.GetAccountResponse(account=await self._account(request.id, "id"))

    async def grant_credits(self, request: admin_pb.GrantCreditsRequest) -> admin_pb.GrantCreditsResponse:
        wallet = Wallet(request.account_id, is_live(request.mode, default=True))
        amount = request.amount_micros
        await self._found(wallet.account)
        check_amount("amount_micros", amount, minimum=1)
        _check_id(request.grant_id, "grant_id")
        await self._check_change(wallet, "amount_micros", amount, request.note)
        await self._give(request.grant_id or new_id("grant_"), wallet, amount, request.note)
        return admin_pb.GrantCreditsResponse(account=await self._account(wallet.account))

    async def adjust_credits(self, request: admin_pb.AdjustCreditsRequest) -> admin_pb.AdjustCreditsResponse:
        wallet = Wallet(request.account_id, is_live(request.mode, default=True))
        amount = request.amount_micros
        await self._found(wallet.account)
        if not amount:
            raise missing("amount_micros")
        check_amount("amount_micros", amount, minimum=-MAX_MICROS)
        if not request.note.strip():
            raise missing("note")
        _check_id(request.adjustment_id, "adjustment_id")
        await self._check_change(wallet, "amount_micros", amount, request.note)
        try:
            await self._give(
                request.adjustment_id or new_id("adjustment_"),
                wallet,
                amount,
                request.note,
                action="adjust_credits",
                field="adjustment_id",
            )
        except OverdrawnError as error:
            most = max(0, (await self._store.balance(wallet)).available)
            left = format_credits(most)
            expected = f"{-most:,} microcredits or more: at most {left} credits can be taken back"
            if not most:
                expected = "above 0: the account has no credits that can be taken back"
            raise invalid("amount_micros", expected, minimum=-most) from error
        return admin_pb.AdjustCreditsResponse(account=await self._account(wallet.account))

    async def set_credit_limit(
        self, request: admin_pb.SetCreditLimitRequest
    ) -> admin_pb.SetCreditLimitResponse:
        wallet = Wallet(request.account_id, is_live(request.mode, default=True))
        field, credit_limit = "credit_limit_micros", request.credit_limit_micros
        await self._found(wallet.account)
        check_amount(field, credit_limit, minimum=0)
        old = (await self._store.balance(wallet)).credit_limit
        await self._check_change(wallet, field, credit_limit - old)
        act = new_act(
            "set_credit_limit", wallet.account, self._now(), live=wallet.live, new=str(credit_limit)
        )
        try:
            await self._store.set_credit_limit(wallet, credit_limit, act)
        except OverdrawnError as error:
            balance = await self._store.balance(wallet)
            least = max(0, balance.credit_limit - balance.available)
            used = format_credits(least)
            expected = f"{least:,} microcredits or more: the account has used {used} credits of its limit. "
            expected += "Grant credits first"
            raise invalid(field, expected, minimum=least) from error
        return admin_pb.SetCreditLimitResponse(account=await self._account(wallet.account))

    async def disable_account(
        self, request: admin_pb.DisableAccountRequest
    ) -> admin_pb.DisableAccountResponse:
        return admin_pb.DisableAccountResponse(account=await self._set_enabled(request.account_id, False))

    async def enable_account(self, request: admin_pb.EnableAccountRequest) -> admin_pb.EnableAccountResponse:
        return admin_pb.EnableAccountResponse(account=await self._set_enabled(request.account_id, True))

    async def _set_enabled(self, account_id: str, enabled: bool) -> admin_pb.Account:
        await self._found(account_id)
        now = self._now()
        states = ("disabled", "enabled") if enabled else ("enabled", "disabled")
        action = "enable_account" if enabled else "disable_account"
        act = new_act(action, account_id, now, old=states[0], new=states[1])
        await self._store.set_disabled(account_id, None if enabled else now, act)
        self._account_changed(account_id)
        return await self._account(account_id)

    async def set_account_plan(
        self, request: admin_pb.SetAccountPlanRequest
    ) -> admin_pb.SetAccountPlanResponse:
        account_id, plan = request.account_id, request.plan
        await self._found(account_id)
        if not plan:
            raise missing("plan")
        self._check_plan(plan)
        act = new_act("set_plan", account_id, self._now(), new=plan)
        await self._store.set_plan(account_id, plan, act)
        self._account_changed(account_id)
        return admin_pb.SetAccountPlanResponse(account=await self._account(account_id))

    async def _account(self, account_id: str, field: str = "account_id") -> admin_pb.Account:
        record = await self._found(account_id, field)
        live, test = [await self._store.balance(Wallet(account_id, live)) for live in (True, False)]
        return self._detail(record, live, test)

    async def _found(self, account_id: str, field: str = "account_id") -> AccountRecord:
        """The account with that id. It stays: accounts are never deleted."""
        if not account_id:
            raise missing(field)
        record = await self._store.get_account(account_id)
        if record is None:
            raise unknown_account(account_id, field)
        return record

    async def _check_change(self, wallet: Wallet, field: str, amount: int, note: str = "") -> None:
        """Checks that a change keeps the credits of a wallet exact, and its note.

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        if len(note) > MAX_NOTE:
            raise invalid("note", f"up to {MAX_NOTE} characters", maximum=MAX_NOTE)
        balance = await self._store.balance(wallet)
        if amount > 0 and balance.granted + balance.credit_limit + amount > MAX_TOTAL_CREDITS * MICROS:
            raise invalid(field, f"such that no more than {MAX_TOTAL_CREDITS:,} credits are given in all")

    async def _give(
        self,
        grant_id: str,
        wallet: Wallet,
        amount: int,
        note: str,
        *,
        action: str = "grant_credits",
        field: str = "grant_id",
    ) -> None:
        now = self._now()
        act = new_act(action, wallet.account, now, live=wallet.live, note=note)
        await self._store.grant(Grant(grant_id, wallet, amount, now, note), act)
        # A used id gives nothing, which is right only if the same was given. An adjustment always has a note.
        given = await self._store.get_grant(wallet, grant_id)
        if given is None or (given.amount, given.note) != (amount, note):
            raise invalid(field, "one that was not used for another grant or adjustment")

    def _check_plan(self, plan: str) -> None:
        if plan not in self._plans:
            raise invalid("plan", f"one of {', '.join(sorted(self._plans))}")

    def _detail(self, record: AccountRecord, live: Balance, test: Balance) -> admin_pb.Account:
        plan = self._plans.get(record.plan)
        return admin_pb.Account(
            id=record.name,
            plan=record.plan,
            limits=_limits(plan) if plan is not None else None,
            live=_balance(live),
            test=_balance(test),
            create_time=times.to_timestamp(record.created),
            disable_time=None if record.disabled is None else times.to_timestamp(record.disabled),
        )


def _check_id(given: str, field: str) -> None:
    if given and not _ID.fullmatch(given):
        raise invalid(field, _IDS)


def unknown_account(account_id: str, field: str = "account_id") -> PomeloError:
    """The error of an account that does not exist; `field` is the field with its id."""
    shown = account_id[:100]
    message = f"There is no account {shown!r}. See: pomelo accounts list"
    return PomeloError("not_found", message, field=field, values={"account": shown})


def _limits(plan: Plan) -> pb.PlanLimits:
    return pb.PlanLimits(
        requests_per_minute=plan.requests,
        concurrent_requests=plan.concurrent,
        tokens_per_minute=plan.tokens,
        models=None if plan.models is None else pb.ModelSet(models=sorted(plan.models)),
    )


def _balance(balance: Balance) -> pb.Balance:
    return pb.Balance(
        granted_micros=balance.granted,
        spent_micros=balance.spent,
        held_micros=balance.held,
        available_micros=balance.available,
        credit_limit_micros=balance.credit_limit,
    )
