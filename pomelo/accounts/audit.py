"""The audit: recomputes every balance and bill from grants, usage records and reservations.

It can run while tasks run: it reads a wallet's balance before and after the usage records, and their sum must
lie between the two. It reads in pages, and keeps eight bytes of each record and some hundred of each wallet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from operator import attrgetter

from pomelo.accounts.budget_audit import LONGEST_TASK, find_differences
from pomelo.call import MODE_NAMES
from pomelo.catalog.pricing import Prices, Usage, cost, decode_prices
from pomelo.gen.admin.v1.admin_service_pb2 import AuditLedgerResponse
from pomelo.stores.accounts import AccountStore, Balance, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import LedgerStore, OpenReservation
from pomelo.stores.usage import UsageQuery, UsageRecord, UsageStore, WalletState

OVERDUE = LONGEST_TASK
"""Seconds after which no process can still run a task: its deadline has passed, reconciliation has
ended what was left of it, and the lease of its process has expired if that process died."""

MAX_FINDINGS = 1_000
"""Findings that are listed; the differences of all others are only summed."""

_PAGE_SIZE = 500
_BUCKETS = 256
_counts = attrgetter(*Usage.__slots__)


@dataclass(slots=True)
class _Findings:
    max_findings: int
    response: AuditLedgerResponse = field(default_factory=AuditLedgerResponse)

    def add(self, check: str, subject: str, difference: int, detail: str) -> None:
        """Adds a finding; `difference` is the stored value minus the recomputed one, in microcredits."""
        self.response.difference_micros += abs(difference)
        if len(self.response.findings) < self.max_findings:
            self.response.findings.add(
                check=check, subject=subject, difference_micros=difference, detail=detail
            )

    def sort(self, start: int) -> None:
        """Sorts the findings from index `start` on by subject: stores list wallets in any order."""
        ordered = sorted(list(self.response.findings)[start:], key=lambda finding: finding.subject)
        del self.response.findings[start:]
        self.response.findings.extend(ordered)


async def audit(
    store: Store,
    *,
    page_size: int = _PAGE_SIZE,
    max_findings: int = MAX_FINDINGS,
    runs: Callable[[str], bool] | None = None,
    now: Callable[[], float] | None = None,
) -> AuditLedgerResponse:
    """Audits the whole store. Reads `page_size` records at a time, and lists at most `max_findings` findings.

    `runs` returns whether this process still runs a task that it admitted; `now` returns Unix time, to find
    overdue reservations and to check budgets. Without them, these checks are skipped.

    Raises:
        PomeloError: store_unavailable.
    """
    findings = _Findings(max_findings)
    damaged = await _check_files(findings, store)
    try:
        await _recompute(findings, store, page_size, runs, now)
    except Exception:
        # Damage may be the cause of the error, and may be detected only after a record was read.
        if not damaged and not await _check_files(findings, store):
            raise
    return findings.response


async def _check_files(findings: _Findings, store: UsageStore) -> bool:
    damage = await store.damage()
    for subject, detail in damage:
        findings.add("database", subject, 0, detail)
    return bool(damage)


async def _recompute(
    findings: _Findings,
    store: Store,
    page_size: int,
    runs: Callable[[str], bool] | None,
    now: Callable[[], float] | None,
) -> None:
    """Checks every record, reservation and wallet.

    Raises:
        PomeloError: store_unavailable.
    """
    # The keys are strings: hundreds of thousands of dataclasses would slow down the garbage collector.
    before = {
        _name(state.wallet): state.balance.spent async for page in store.wallet_states() for state in page
    }
    spent: dict[str, int] = {}
    prices: dict[str, Prices] = {}
    task_ids = _TaskIds()
    async for record in _records(store, page_size):
        name = _name(record.wallet)
        spent[name] = spent.get(name, 0) + record.cost
        task_ids.add(record.task_id)
        findings.response.records += 1
        findings.response.cost_micros += record.cost
        findings.response.uncollected_micros += record.uncollected
        _check_bill(findings, record, prices)
    # Read after the records: a task that had a record by then has no reservation any more.
    reserved = await store.drafts()
    findings.response.reservations = len(reserved)
    await _check_tasks(findings, store, page_size, task_ids, reserved)
    await _check_reservations(findings, store, runs, now)
    await _check_wallets(findings, store, before, spent)
    if now is not None:
        await _check_budgets(findings, store, now())


async def _records(store: UsageStore, page_size: int) -> AsyncIterator[UsageRecord]:
    """All records, newest first."""
    after = ""
    while True:
        records, after = await store.list_usage(UsageQuery(), limit=page_size, after=after)
        for record in records:
            yield record
        if not after:
            return


# --- records


def _check_bill(findings: _Findings, record: UsageRecord, cache: dict[str, Prices]) -> None:
    """Checks that a task's cost follows from its counts and prices. `cache` has the prices decoded so far."""
    counts = _counts(record)
    billed = record.cost + record.uncollected
    if record.cost < 0 or record.uncollected < 0 or min(counts) < 0:
        findings.add("bill", record.task_id, 0, "Its record has a negative count or amount")
        return
    try:
        prices = cache.get(record.prices)
        if prices is None:
            prices = cache[record.prices] = decode_prices(record.prices)
        due = cost(Usage(*counts), prices)
    except (KeyError, ValueError):
        findings.add("bill", record.task_id, 0, "The prices in its record can't be read")
        return
    if billed != due:
        detail = f"{billed} microcredits are billed, but its usage costs {due}"
        findings.add("bill", record.task_id, billed - due, detail)


class _TaskIds:
    """Task ids as digests of eight bytes: enough to find the ids that may occur twice."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(_BUCKETS)]

    def add(self, task_id: str) -> None:
        digest = _digest(task_id)
        self._buckets[digest % _BUCKETS].append(digest)

    def duplicates(self, others: set[int]) -> set[int]:
        """Digests that were added twice, and those that were added and are in `others`."""
        found: set[int] = set()
        for bucket in self._buckets:
            last = None
            for digest in sorted(bucket):
                if digest == last or digest in others:
                    found.add(digest)
                last = digest
        return found


def _digest(task_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(task_id.encode(), digest_size=8).digest(), "big")


async def _check_tasks(
    findings: _Findings, store: UsageStore, page_size: int, task_ids: _TaskIds, reserved: list[UsageRecord]
) -> None:
    """Checks that each task has one record or one reservation, and never both."""
    reserved_ids = {record.task_id for record in reserved}
    suspects = task_ids.duplicates({_digest(task_id) for task_id in reserved_ids})
    if not suspects:
        return
    counts: dict[str, int] = {}
    async for record in _records(store, page_size):
        if _digest(record.task_id) in suspects:
            counts[record.task_id] = counts.get(record.task_id, 0) + 1
    for task_id, count in sorted(counts.items()):
        if count > 1:
            findings.add("task", task_id, 0, f"It has {count} records")
        if task_id in reserved_ids:
            findings.add("task", task_id, 0, "It has a record and a reservation")


async def _check_reservations(
    findings: _Findings,
    store: LedgerStore,
    runs: Callable[[str], bool] | None,
    now: Callable[[], float] | None,
) -> None:
    """Checks that every reservation belongs to a task that a process runs."""

    def problem(reservation: OpenReservation) -> str:
        """Why no process can be running the task; empty if one may be running it."""
        if runs is not None and reservation.own and not runs(reservation.record.task_id):
            return "no process runs it"
        age = 0.0 if now is None else now() - reservation.record.at
        return f"it was not updated for more than {OVERDUE:g} s" if age > OVERDUE else ""

    suspects = {one.record.task_id for one in await store.reservations() if problem(one)}
    if not suspects:
        return
    # Read again: a task that ended during the first read has no reservation now.
    for reservation in await store.reservations():
        task_id, amount = reservation.record.task_id, reservation.amount
        if task_id in suspects and (reason := problem(reservation)):
            detail = f"It reserves {amount} microcredits of {_name(reservation.record.wallet)}, but {reason}"
            findings.add("running", task_id, amount, detail)


# --- wallets


async def _check_wallets(
    findings: _Findings, store: Store, before: dict[str, int], spent: dict[str, int]
) -> None:
    """Checks every wallet. `before` is what the balances said was spent before the records were read, `spent`
    what the records add up to, both by the wallets' names."""
    start = len(findings.response.findings)
    checked: set[str] = set()
    async for page in store.wallet_states():
        for state in page:
            name = _name(state.wallet)
            if name not in checked:
                checked.add(name)
                await _check_wallet(findings, store, state, before.get(name, 0), spent.get(name, 0))
    for name in spent.keys() - checked:  # wallets that no longer exist
        checked.add(name)
        wallet = _wallet(name)
        granted = sum(grant.amount for grant in await store.list_grants(wallet))
        state = WalletState(wallet, Balance(), granted, 0)
        await _check_wallet(findings, store, state, before.get(name, 0), spent[name])
    findings.response.wallets = len(checked)
    await _check_accounts(findings, store, checked)
    findings.sort(start)


async def _check_wallet(
    findings: _Findings, store: Store, state: WalletState, before: int, spent: int
) -> None:
    """Checks a wallet's balance against its grants, records and tasks. `before` is the balance's spent amount
    before the records were read, `spent` the sum of the records."""
    name, balance = _name(state.wallet), state.balance
    if difference := balance.granted - state.grants_sum:
        detail = f"{balance.granted} microcredits are granted, but its grants add up to {state.grants_sum}"
        findings.add("granted", name, difference, detail)
    lowest = min(balance.credit_limit, balance.spent, balance.held, balance.available)
    if lowest < 0:
        detail = (
            f"{balance.granted} microcredits are granted, the credit limit is {balance.credit_limit}; "
            f"{balance.spent} are spent, {balance.held} reserved and {balance.available} available"
        )
        findings.add("balance", name, lowest, detail)
    if difference := balance.held - state.reservations_sum:
        detail = f"{balance.held} microcredits are reserved, but its tasks reserve {state.reservations_sum}"
        findings.add("held", name, difference, detail)
    await _check_spent(findings, store, state, before, spent)


async def _check_spent(
    findings: _Findings, store: Store, state: WalletState, earlier: int, spent: int
) -> None:
    wallet, later = state.wallet, state.balance.spent
    if earlier != later:  # tasks ended in the meantime: sum this wallet's records alone, between two balances
        earlier = later
        sums = await store.sum_usage(UsageQuery(account=wallet.account, live=wallet.live), ())
        spent = sum(total.cost for total in sums)
        later = (await store.balance(wallet)).spent
    if difference := _outside(spent, earlier, later):
        detail = f"{spent + difference} microcredits are spent, but its records add up to {spent}"
        findings.add("spent", _name(wallet), difference, detail)


async def _check_accounts(findings: _Findings, store: AccountStore, wallets: set[str]) -> None:
    """Checks that every wallet belongs to an account. Removes those that do from `wallets`."""
    after = ""
    while page := await store.list_accounts(after=after):
        after = page[-1].name
        for account in page:
            wallets -= {_name(Wallet(account.name, live)) for live in (False, True)}
    for name in sorted(wallets):
        findings.add("account", name, 0, "Its account does not exist")


async def _check_budgets(findings: _Findings, store: Store, now: float) -> None:
    """Checks what is used of each budget against the records of its keys."""
    async for found in find_differences(store, now):
        subject, used = f"{_name(found.wallet)} key {found.origin}", found.used
        detail = f"{used} microcredits are used of its budget, but its records add up to {found.recorded}"
        findings.add("budget", subject, used - found.recorded, detail)


def _outside(recomputed: int, earlier: int, later: int) -> int:
    """The stored value minus the recomputed one, if the stored value grew from `earlier` to `later` while the
    records were read; 0 for a recomputed value between the two."""
    if recomputed < earlier:
        return earlier - recomputed
    return min(later - recomputed, 0)


def _name(wallet: Wallet) -> str:
    return f"{wallet.account}/{MODE_NAMES[wallet.live]}"


def _wallet(name: str) -> Wallet:
    """The inverse of `_name`."""
    account, _, mode = name.rpartition("/")
    return Wallet(account, mode == "live")
