"""Finds what an operator should know: low balances, budgets that are reached, vendors that are blocked.

Running tasks only mark their accounts and keys; what these have left is read from the store every few
seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from pomelo.accounts import budgets
from pomelo.alerts.alert import Alert, alert_id
from pomelo.alerts.webhooks import open_webhooks
from pomelo.call import Principal
from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import in_background, periodically
from pomelo.stores.accounts import PAGE, AccountStore, Balance, Grant, Wallet
from pomelo.stores.acts import ActStore
from pomelo.stores.ledger import LedgerStore
from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import Observer, TaskReport

MAX_MARKED = 10_000
"""Accounts, keys and records that are looked at in one search; more are left out until their next task."""

_DAY = 86_400.0
_BALANCE_MEMORY, _CIRCUIT_MEMORY = 30 * _DAY, 300.0
"""Seconds for which it is noted what was reported. A circuit's state is forgotten soon: its process may have
died without closing it."""

_LAST_SEARCH = 2.0
"""Seconds for the search when the process ends."""

log = logging.getLogger("pomelo.alerts")


class WatchedStore(AccountStore, ActStore, LedgerStore, Protocol):
    """The parts of a store that are searched."""


@asynccontextmanager
async def open_watch(
    urls: Sequence[str], keys: Sequence[bytes], interval: float, store: WatchedStore, **options: Any
) -> AsyncIterator[Watch]:
    """Searches every `interval` seconds within the context and once on leaving, and delivers what is found to
    `urls`, signed with `keys`. `options` are those of `Watch`."""
    async with open_webhooks(urls, keys) as webhooks:
        watch = Watch(store, webhooks.send, **options)
        searches = periodically(
            watch.search, interval, "What is to be reported could not be searched for", UnexpectedErrors(log)
        )
        try:
            async with in_background(searches):
                yield watch
        finally:
            with suppress(PomeloError, TimeoutError):
                async with asyncio.timeout(_LAST_SEARCH):
                    await watch.search()


class Watch(Observer):
    """An `Observer` that reports live mode to `send`: each event once.

    `low_share` is the share of its credits below which a balance is low. `blocked_routes` returns the
    routes that no account can call, as provider and its model. `note_state` is that of
    `pomelo.stores.fleet.Fleet`, None if no other process serves the store. `now` is Unix time.
    """

    def __init__(
        self,
        store: WatchedStore,
        send: Callable[[Alert], None],
        *,
        low_share: float,
        blocked_routes: Callable[[], set[tuple[str, ...]]],
        note_state: Callable[[str, str, float], Awaitable[bool]] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._send = send
        self._low_share = low_share
        self._blocked_routes = blocked_routes
        self._note_state = note_state or _Notes().note_state
        self._now = now
        self._accounts: set[str] = set()
        self._keys: dict[str, tuple[Principal, bool]] = {}
        """Keys with a budget, by id, and whether a task was refused."""
        self._uncollected: list[UsageRecord] = []
        self._blocked: set[tuple[str, ...]] = set()
        self._top_ups: dict[str, tuple[int, str, int]] = {}
        """By account what was granted in total, and the id and amount of the last grant that is no
        correction."""
        self._unsure: dict[str, str] = {}
        """By subject the state that the store may have noted without an answer: it was not reported."""

    # --- what running tasks report

    def task_ended(self, report: TaskReport) -> None:
        principal = report.call.principal
        if principal is not None and principal.budget is not None and principal.live:
            self._mark_key(principal, report.code == "insufficient_credits")

    def _mark_key(self, principal: Principal, refused: bool) -> None:
        if len(self._keys) < MAX_MARKED:
            known = self._keys.get(principal.key_id)
            self._keys[principal.key_id] = principal, refused or (known is not None and known[1])

    def charged(self, record: UsageRecord) -> None:
        if record.live and len(self._accounts) < MAX_MARKED:
            self._accounts.add(record.account)
            if record.uncollected and len(self._uncollected) < MAX_MARKED:
                self._uncollected.append(record)

    # --- the search

    async def search(self) -> None:
        """Reports all that has happened since the last search.

        Raises:
            PomeloError: store_unavailable. The next search tries again.
        """
        for record in self._uncollected:
            self._report_uncollected(record)
        self._uncollected.clear()
        await self._check_circuits()
        accounts, self._accounts = self._accounts, set()
        keys, self._keys = self._keys, {}
        try:
            for account in accounts:
                await self._check_balance(account)
            for principal, refused in keys.values():
                await self._check_budget(principal, refused)
        except BaseException:
            self._accounts |= accounts
            newer, self._keys = self._keys, keys
            for principal, refused in newer.values():
                self._mark_key(principal, refused)
            raise

    def _report_uncollected(self, record: UsageRecord) -> None:
        data = {
            "account": record.account,
            "mode": "live",
            "task_id": record.task_id,
            "request_id": record.request_id,
            "provider": record.provider,
            "uncollected_micros": record.uncollected,
        }
        self._report("credits.uncollected", record.task_id, data)

    async def _check_circuits(self) -> None:
        found, known = self._blocked_routes(), self._blocked
        for event, routes in (("provider.open", found - known), ("provider.closed", known - found)):
            for route in sorted(routes):
                provider, model = route
                if await self._is_new(f"circuit {provider} {model}", event, _CIRCUIT_MEMORY):
                    data = {"provider": provider, "provider_model": model}
                    self._report(event, f"{route} {self._now()}", data)
                self._blocked ^= {route}

    async def _check_balance(self, account: str) -> None:
        balance = await self._store.balance(Wallet(account, live=True))
        grant_id, granted = await self._last_top_up(account, balance)
        threshold = round(self._low_share * (granted + balance.credit_limit))
        if balance.available + balance.held >= threshold:
            return
        state = f"{grant_id} {balance.credit_limit}"
        if await self._is_new(f"balance {account}", state, _BALANCE_MEMORY):
            data = {
                "account": account,
                "mode": "live",
                "available_micros": balance.available,
                "held_micros": balance.held,
                "threshold_micros": threshold,
            }
            self._report("balance.low", f"{account} {state}", data)

    async def _last_top_up(self, account: str, balance: Balance) -> tuple[str, int]:
        """The id and the amount of an account's last grant."""
        known = self._top_ups.pop(account, None)
        if known is None or known[0] != balance.granted:
            last = await self._last_grant(Wallet(account, live=True))
            known = balance.granted, *(("", 0) if last is None else (last.grant_id, last.amount))
        self._top_ups[account] = known
        if len(self._top_ups) > MAX_MARKED:
            del self._top_ups[next(iter(self._top_ups))]
        return known[1:]

    async def _last_grant(self, wallet: Wallet) -> Grant | None:
        """The last entry that gave credits and is not a correction."""
        for grant in reversed(await self._store.list_grants(wallet)):
            if grant.amount > 0 and not await self._is_correction(grant):
                return grant
        return None

    async def _is_correction(self, grant: Grant) -> bool:
        """Whether the operator's log has an entry as a correction: it was written in the same step."""
        account, after = grant.wallet.account, None
        while True:
            page = await self._store.list_acts(account, since=grant.at, limit=PAGE, after=after)
            if any(
                act.action == "adjust_credits"
                and (act.at, act.live) == (grant.at, grant.wallet.live)
                and int(act.new) - int(act.old) == grant.amount
                for act in page
            ):
                return True
            if len(page) < PAGE:
                return False
            after = page[-1].at, page[-1].act_id

    async def _check_budget(self, principal: Principal, refused: bool) -> None:
        assert principal.budget is not None
        wallet, budget = Wallet(principal.account, live=True), principal.budget
        current = budgets.current(budget, self._now())
        ((used, _),) = await self._store.budget_use(wallet, [current])
        left = budget.limit - used
        # A refusal is the balance's if that has less left.
        if left > 0 and not (refused and left < (await self._store.balance(wallet)).available):
            return
        # A rotated key and its successor share the name of the budget, but may have different amounts.
        subject, period = f"{principal.account} {budget.name}", f"{current.start:.0f}"
        if await self._is_new(f"budget {subject} {budget.limit}", period, _BALANCE_MEMORY):
            data = {
                "account": principal.account,
                "mode": "live",
                "key_id": principal.key_id,
                "budget_micros": budget.limit,
                "period": budget.period,
                "used_micros": used,
            }
            self._report("budget.reached", f"{subject} {period} {budget.limit}", data)

    async def _is_new(self, subject: str, state: str, seconds: float) -> bool:
        """Notes the state of a subject; whether it is to be reported."""
        unsure = self._unsure.pop(subject, None)
        try:
            changed = await self._note_state(subject, state, seconds)
        except BaseException:  # also if it is cancelled: the state may be noted
            self._unsure[subject] = state
            raise
        return changed or unsure == state

    def _report(self, event: str, occasion: str, data: Mapping[str, Any]) -> None:
        log.warning("%s: an alert is sent", event, extra={"fields": data, "unlimited": True})
        self._send(Alert(alert_id(event, occasion), event, self._now(), data))


class _Notes:
    """What this process has reported, if it serves alone."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    async def note_state(self, subject: str, state: str, seconds: float) -> bool:
        """As `pomelo.stores.fleet.Fleet.note_state`, but forgets only the oldest of many."""
        if self._states.pop(subject, "") == state:
            self._states[subject] = state
            return False
        self._states[subject] = state
        if len(self._states) > MAX_MARKED:
            del self._states[next(iter(self._states))]
        return True
