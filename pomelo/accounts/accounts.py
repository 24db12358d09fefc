"""Accounts: what a key's holder sees of its account, and how the operator manages all accounts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

from pomelo import times
from pomelo.accounts import pages
from pomelo.accounts.access import Access
from pomelo.accounts.plans import NEW_ACCOUNTS, TEST_CREDITS, Plan
from pomelo.accounts.usage import UsageReader
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.admin_service_pb2 import AccountDetail
from pomelo.ids import new_id
from pomelo.money import MAX_CREDITS, MAX_TOTAL_CREDITS, MICROS
from pomelo.stores.accounts import AccountRecord, AccountStore, Balance, Grant, UnknownAccountError, Wallet

MAX_NOTE = 200

_MAX_MICROS = MAX_CREDITS * MICROS

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAMES = "1 to 64 letters, digits, dots, dashes or underscores"


class LocalAccounts:
    """The account of a key, in the key's mode; implements `pomelo.service.AccountService` in this process."""

    def __init__(self, store: AccountStore, usage: UsageReader, access: Access) -> None:
        self._store = store
        self._usage = usage
        self._access = access

    async def get_account(self, call: Call) -> pb.Account:
        principal = await self._access.identify(call)
        plan = self._access.plan(principal)
        balance = await self._store.balance(Wallet(principal.account, principal.live))
        return pb.Account(
            name=principal.account,
            plan=plan.name,
            limits=_limits(plan),
            live=principal.live,
            balance=_balance(balance),
        )

    async def list_usage(self, request: pb.ListUsageRequest, call: Call) -> pb.ListUsageResponse:
        principal = await self._access.identify(call)
        if request.group_by == pb.USAGE_GROUP_ACCOUNT:
            raise invalid("group_by", "model, key or day")
        return await self._usage.list(request, principal.account, principal.live)


class AccountAdmin:
    """Manages accounts for the operator. `plan_changed` is called with the name of an account whose plan
    changed, so that caches forget the old one. `now` is Unix time."""

    def __init__(
        self,
        store: AccountStore,
        plans: Mapping[str, Plan],
        *,
        plan_changed: Callable[[str], None] = lambda account: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._plans = plans
        self._plan_changed = plan_changed
        self._now = now

    async def create(self, name: str, plan: str, live_micros: int) -> AccountDetail:
        """Creates an account with initial test credits; an empty `plan` is the default one.

        Raises:
            PomeloError: missing_parameter, invalid_parameter, store_unavailable.
        """
        if not name:
            raise missing("name")
        if not _NAME.fullmatch(name):
            raise invalid("name", _NAMES)
        plan = plan or NEW_ACCOUNTS
        self._check_plan(plan)
        if not 0 <= live_micros <= _MAX_MICROS:
            raise invalid("live_micros", f"0 to {_MAX_MICROS:,}", minimum=0, maximum=_MAX_MICROS)
        if not await self._store.add_account(name, plan, self._now()):
            raise invalid("name", f"new. The account {name!r} exists already")
        # Ids from callers have no colon, and names are unique, so these grant ids are free.
        await self._give(f"test:{name}", Wallet(name, live=False), TEST_CREDITS, "to begin with")
        if live_micros:
            await self._give(f"live:{name}", Wallet(name, live=True), live_micros, "to begin with")
        return await self.show(name)

    async def list(self, size: int, token: str) -> tuple[list[AccountDetail], str]:
        """A page of accounts, ordered by name, and the token of the next page (empty: this was the last).

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        size = pages.page_size(size)
        (after,) = pages.read_token(token, "accounts", str) if token else ("",)
        found = [
            self._detail(record, record.live, record.test)
            for record in await self._store.list_accounts(limit=size + 1, after=after)
        ]
        page = found[: min(size, pages.fitting(found))]
        more = len(page) < len(found)
        return page, pages.make_token("accounts", page[-1].name) if more else ""

    async def show(self, name: str) -> AccountDetail:
        """The account of that name.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        record = await self._found(name)
        live, test = [await self._store.balance(Wallet(name, live)) for live in (True, False)]
        return self._detail(record, live, test)

    async def grant(
        self, name: str, amount: int, *, live: bool, note: str = "", grant_id: str = ""
    ) -> AccountDetail:
        """Grants credits, once for each `grant_id` (empty: a new one); returns the account after the grant.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
        await self._found(name)
        if not 0 < amount <= _MAX_MICROS:
            raise invalid("amount_micros", f"1 to {_MAX_MICROS:,}", minimum=1, maximum=_MAX_MICROS)
        if len(note) > MAX_NOTE:
            raise invalid("note", f"up to {MAX_NOTE} characters", maximum=MAX_NOTE)
        if grant_id and not _NAME.fullmatch(grant_id):
            raise invalid("grant_id", _NAMES)
        wallet = Wallet(name, live)
        if (await self._store.balance(wallet)).granted + amount > MAX_TOTAL_CREDITS * MICROS:
            raise invalid(
                "amount_micros", f"such that no more than {MAX_TOTAL_CREDITS:,} credits are given in all"
            )
        await self._give(grant_id or new_id("grant_"), wallet, amount, note)
        return await self.show(name)

    async def set_plan(self, name: str, plan: str) -> AccountDetail:
        """Changes an account's plan; returns the account after the change.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
        await self._found(name)
        if not plan:
            raise missing("plan")
        self._check_plan(plan)
        if not await self._store.set_plan(name, plan):
            raise unknown_account(name)
        self._plan_changed(name)
        return await self.show(name)

    async def _found(self, name: str) -> AccountRecord:
        if not name:
            raise missing("name")
        record = await self._store.get_account(name)
        if record is None:
            raise unknown_account(name)
        return record

    async def _give(self, grant_id: str, wallet: Wallet, amount: int, note: str) -> None:
        try:
            await self._store.grant(Grant(grant_id, wallet, amount, self._now(), note))
        except UnknownAccountError as error:
            raise unknown_account(wallet.account) from error
        # A used id grants nothing, which is right only if it is the same grant.
        given = await self._store.get_grant(wallet, grant_id)
        if given is None or given.amount != amount:
            raise invalid("grant_id", "one that was not used for another grant")

    def _check_plan(self, plan: str) -> None:
        if plan not in self._plans:
            raise invalid("plan", f"one of {', '.join(sorted(self._plans))}")

    def _detail(self, record: AccountRecord, live: Balance, test: Balance) -> AccountDetail:
        plan = self._plans.get(record.plan)
        return AccountDetail(
            name=record.name,
            plan=record.plan,
            limits=_limits(plan) if plan is not None else None,
            live=_balance(live),
            test=_balance(test),
            create_time=times.to_timestamp(record.created),
        )


def unknown_account(name: str, field: str = "name") -> PomeloError:
    """The error of an account that does not exist; `field` is the field with its name."""
    shown = name[:100]
    message = f"There is no account {shown!r}. See: pomelo accounts list"
    return PomeloError("not_found", message, field=field, values={"account": shown})


def _limits(plan: Plan) -> pb.PlanLimits:
    return pb.PlanLimits(
        requests_per_minute=plan.requests or 0,
        concurrent_requests=plan.concurrent or 0,
        tokens_per_minute=plan.tokens or 0,
        models=sorted(plan.models or ()),
    )


def _balance(balance: Balance) -> pb.Balance:
    return pb.Balance(
        granted_micros=balance.granted,
        spent_micros=balance.spent,
        held_micros=balance.held,
        available_micros=balance.available,
    )
