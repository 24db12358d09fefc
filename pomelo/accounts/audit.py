"""The audit: every balance and bill recomputed from grants, records and holds, and what does not add up.

The operator's service runs it, also while tasks run: a wallet is looked at before and after its records are
read, and what they say must lie between the two. It reads through the roles of the store alone, in pages,
and keeps eight bytes of each record and some hundred of each wallet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from pomelo.call import DEFAULT_TIMEOUT
from pomelo.catalog.pricing import Prices, Usage, cost, decode_prices
from pomelo.gen.v1.admin_service_pb2 import AuditResponse
from pomelo.stores.accounts import AccountStore, Balance, Wallet
from pomelo.stores.ledger import LedgerStore, OpenReservation
from pomelo.stores.usage import UsageQuery, UsageRecord, UsageStore, WalletState

OVERDUE = DEFAULT_TIMEOUT + 60.0
"""Seconds after which no process can still run a task: its deadline has passed, reconciliation has
ended what was left of it, and the lease of its process has expired if that process died."""

MOST_FINDINGS = 1_000
"""Findings that are told one by one; beyond, only their differences are summed."""

_PAGE = 500
_BUCKETS = 256
_counts = attrgetter(*Usage.__slots__)


class AuditedStore(AccountStore, LedgerStore, UsageStore, Protocol):
    """The roles that are looked at."""


@dataclass(slots=True)
class _Findings:
    """What was found so far, as it is told."""

    most: int
    told: AuditResponse = field(default_factory=AuditResponse)

    def add(self, check: str, subject: str, difference: int, detail: str) -> None:
        """`difference` is what is kept minus what was recomputed."""
        self.told.difference_micros += abs(difference)
        if len(self.told.findings) < self.most:
            self.told.findings.add(check=check, subject=subject, difference_micros=difference, detail=detail)

    def sort(self, start: int) -> None:
        """Puts the findings from `start` on in the order of their subjects, which no store promises."""
        ordered = sorted(list(self.told.findings)[start:], key=lambda one: one.subject)
        del self.told.findings[start:]
        self.told.findings.extend(ordered)


async def audit(
    store: AuditedStore,
    *,
    page: int = _PAGE,
    most: int = MOST_FINDINGS,
    runs: Callable[[str], bool] | None = None,
    now: Callable[[], float] | None = None,
) -> AuditResponse:
    """Looks at everything; `page` records are read at a time, and at most `most` findings are
    returned.

    Reservations are checked as far as it is known which process runs their tasks: `runs` says
    whether this process still runs a task that it admitted; `now` is Unix time, from which the
    others' ages are computed.

    Raises:
        PomeloError: store_unavailable.
    """
    found = _Findings(most)
    damaged = await _check_files(found, store)
    try:
        await _recompute(found, store, page, runs, now)
    except Exception:
        # Damage may have ended the audit, and the check may find it only once a record was read.
        if not damaged and not await _check_files(found, store):
            raise
    return found.told


async def _check_files(found: _Findings, store: UsageStore) -> bool:
    damage = await store.damage()
    for subject, detail in damage:
        found.add("database", subject, 0, detail)
    return bool(damage)


async def _recompute(
    found: _Findings,
    store: AuditedStore,
    page: int,
    runs: Callable[[str], bool] | None,
    now: Callable[[], float] | None,
) -> None:
    """Checks every record, hold and wallet.

    Raises:
        PomeloError: store_unavailable.
    """
    # By names of wallets: hundreds of thousands of records as keys would keep the garbage collector busy.
    before = {
        _name(state.wallet): state.balance.spent async for states in store.wallet_states() for state in states
    }
    spent: dict[str, int] = {}
    prices: dict[str, Prices] = {}
    seen = _Seen()
    async for record in _records(store, page):
        name = _name(record.wallet)
        spent[name] = spent.get(name, 0) + record.cost
        seen.add(record.task_id)
        found.told.records += 1
        found.told.cost_micros += record.cost
        found.told.uncollected_micros += record.uncollected
        _check_bill(found, record, prices)
    # Later than the records: a task that has one by then holds nothing any more.
    holds = await store.drafts()
    found.told.holds = len(holds)
    await _check_tasks(found, store, page, seen, holds)
    await _check_running(found, store, runs, now)
    start = len(found.told.findings)
    looked: set[str] = set()
    async for states in store.wallet_states():
        for state in states:
            name = _name(state.wallet)
            if name not in looked:
                looked.add(name)
                await _check_wallet(found, store, state, before.get(name, 0), spent.get(name, 0))
    for name in spent.keys() - looked:  # wallets that no longer exist
        looked.add(name)
        wallet = _wallet(name)
        given = sum(grant.amount for grant in await store.list_grants(wallet))
        state = WalletState(wallet, Balance(), given, 0)
        await _check_wallet(found, store, state, before.get(name, 0), spent[name])
    found.told.wallets = len(looked)
    await _check_accounts(found, store, looked)
    found.sort(start)


async def _records(store: UsageStore, page: int) -> AsyncIterator[UsageRecord]:
    """All records, newest first."""
    after = ""
    while True:
        records, after = await store.list_usage(UsageQuery(), limit=page, after=after)
        for record in records:
            yield record
        if not after:
            return


# --- records


def _check_bill(found: _Findings, record: UsageRecord, known: dict[str, Prices]) -> None:
    """What a task cost is what its counts and its prices say. `known` are prices that were read before."""
    counts = _counts(record)
    kept = record.cost + record.uncollected
    if record.cost < 0 or record.uncollected < 0 or min(counts) < 0:
        found.add("bill", record.task_id, 0, "A count or an amount of its record is below 0")
        return
    try:
        prices = known.get(record.prices)
        if prices is None:
            prices = known[record.prices] = decode_prices(record.prices)
        due = cost(Usage(*counts), prices)
    except (KeyError, ValueError):
        found.add("bill", record.task_id, 0, "The prices in its record can't be read")
        return
    if kept != due:
        found.add("bill", record.task_id, kept - due, f"It is billed {kept} microcredits, and used {due}")


class _Seen:
    """The ids of tasks, eight bytes of each: enough to tell which may have been there before."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(_BUCKETS)]

    def add(self, task_id: str) -> None:
        digest = _digest(task_id)
        self._buckets[digest % _BUCKETS].append(digest)

    def suspects(self, more: set[int]) -> set[int]:
        """Digests that were added twice, and those of `more` that were added."""
        return set(self._suspects(more))

    def _suspects(self, more: set[int]) -> Iterator[int]:
        for bucket in self._buckets:
            last = None
            for digest in sorted(bucket):
                if digest == last or digest in more:
                    yield digest
                last = digest


def _digest(task_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(task_id.encode(), digest_size=8).digest(), "big")


async def _check_tasks(
    found: _Findings, store: UsageStore, page: int, seen: _Seen, holds: list[UsageRecord]
) -> None:
    """A task has one record, or one hold, and never both."""
    held = {hold.task_id for hold in holds}
    suspects = seen.suspects({_digest(task_id) for task_id in held})
    if not suspects:
        return
    times: dict[str, int] = {}
    async for record in _records(store, page):
        if _digest(record.task_id) in suspects:
            times[record.task_id] = times.get(record.task_id, 0) + 1
    for task_id, count in sorted(times.items()):
        if count > 1:
            found.add("task", task_id, 0, f"It has {count} records")
        if task_id in held:
            found.add("task", task_id, 0, "It has a record, and still holds something")


async def _check_running(
    found: _Findings,
    store: LedgerStore,
    runs: Callable[[str], bool] | None,
    now: Callable[[], float] | None,
) -> None:
    """Checks that every reservation belongs to a task that a process runs."""

    def why(one: OpenReservation) -> str:
        """Why no process can be running the task; empty if one may be."""
        if runs is not None and one.own and not runs(one.record.task_id):
            return "no process runs it"
        age = 0.0 if now is None else now() - one.record.at
        return f"nothing was heard of it for more than {OVERDUE:g} s" if age > OVERDUE else ""

    suspects = {one.record.task_id for one in await store.reservations() if why(one)}
    if not suspects:
        return
    # Read again: a task that ended during the first read has no reservation now.
    for one in await store.reservations():
        task_id = one.record.task_id
        if task_id in suspects and (reason := why(one)):
            detail = f"{one.amount} microcredits of {_name(one.record.wallet)} are held by it, and {reason}"
            found.add("running", task_id, one.amount, detail)


# --- wallets


async def _check_wallet(
    found: _Findings,
    store: AuditedStore,
    state: WalletState,
    before: int,
    spent: int,
) -> None:
    """Checks a wallet's balance against its grants, records and tasks. `before` is what it had
    spent before the records were read, `spent` the sum of the records."""
    wallet, balance = state.wallet, state.balance
    if balance.granted != state.grants_sum:
        found.add(
            "granted",
            _name(wallet),
            balance.granted - state.grants_sum,
            f"{balance.granted} microcredits are granted, and its grants say {state.grants_sum}",
        )
    least = min(balance.granted, balance.spent, balance.held, balance.available)
    if least < 0:
        found.add(
            "balance",
            _name(wallet),
            least,
            f"Of {balance.granted} microcredits {balance.spent} are spent and {balance.held} held, "
            f"so {balance.available} are left",
        )
    if balance.held != state.reservations_sum:
        found.add(
            "held",
            _name(wallet),
            balance.held - state.reservations_sum,
            f"{balance.held} microcredits are held, and its tasks hold {state.reservations_sum}",
        )
    await _check_spent(found, store, state, before, spent)


async def _check_spent(
    found: _Findings, store: AuditedStore, state: WalletState, earlier: int, spent: int
) -> None:
    wallet, later = state.wallet, state.balance.spent
    if earlier != later:  # tasks ended meanwhile: the whole wallet is summed at one moment
        earlier = later
        sums = await store.sum_usage(UsageQuery(account=wallet.account, live=wallet.live), "account")
        spent = sum(total.cost for total in sums)
        later = (await store.balance(wallet)).spent
    difference = _outside(spent, earlier, later)
    if difference:
        found.add(
            "spent",
            _name(wallet),
            difference,
            f"{spent + difference} microcredits are spent, and its records say {spent}",
        )


async def _check_accounts(found: _Findings, store: AccountStore, wallets: set[str]) -> None:
    """Checks that every wallet belongs to an account. Removes those that do from `wallets`."""
    after = ""
    while page := await store.list_accounts(after=after):
        after = page[-1].name
        for account in page:
            wallets -= {_name(Wallet(account.name, live)) for live in (False, True)}
    for name in sorted(wallets):
        found.add("account", name, 0, "It is a side of an account that there is not")


def _outside(recomputed: int, least: int, most: int) -> int:
    """What is kept minus what was recomputed, when what is kept grew from `least` to `most` meanwhile."""
    if recomputed < least:
        return least - recomputed
    return min(most - recomputed, 0)


def _name(wallet: Wallet) -> str:
    return f"{wallet.account}/{'live' if wallet.live else 'test'}"


def _wallet(name: str) -> Wallet:
    """The wallet that `_name` named."""
    account, _, mode = name.rpartition("/")
    return Wallet(account, mode == "live")
