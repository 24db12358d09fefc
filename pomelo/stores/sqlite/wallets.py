"""The decisions of the ledger role, on wallets in memory: what a task may reserve, costs and releases.

No method waits, or reads the file. A task's end is decided by `charge` and `recount`, written by the journal,
and takes effect by `release` once it is committed: until then its credits stay held. `undo` takes the
decision back if it could not be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic_core import to_json

from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    Count,
    Counter,
    IdempotencyKey,
    LimitStatus,
    Refused,
    ReserveRequest,
)
from pomelo.stores.usage import UsageRecord

_UNUSED: list[Any] = [0, None, None]
"""The count, and the start and end of the window, of a counter that is not in use."""


class LoadedBudget:
    """What the tasks of a period cost: `spent` is committed, `held` is what running tasks reserve."""

    __slots__ = ("held", "name", "spent", "start")

    def __init__(self, name: str, start: float) -> None:
        self.name, self.start = name, start
        self.spent = self.held = 0


class Reservation:
    """The reservation of a running task. `record` is its draft or what was last noted.

    `ending`: its end is decided, but not yet committed. `stored`: its end must be written even without a
    charge, because the file may have something of it. `unsure`: writing an end of it has failed. `ended`: it
    was released.
    """

    __slots__ = (
        "_changes", "_extra", "amount", "budget", "counted", "ended", "ending", "key", "record", "stored",
        "task_id", "unsure", "wallet",
    )  # fmt: skip

    def __init__(self, wallet: LoadedWallet, record: UsageRecord, amount: int) -> None:
        self.wallet = wallet
        self.task_id = record.task_id
        self.record = record
        self.amount = amount
        self.counted: list[tuple[str, int, list[Any]]] = []
        """The names of its counters, what it added to them, and their counts."""
        self.budget: LoadedBudget | None = None
        """What it counts in; its part of `held` is `amount`."""
        self.key: IdempotencyKey | None = None
        self.ended = self.ending = self.stored = self.unsure = False
        self._extra = 0
        self._changes: list[tuple[list[Any], int]] = []

    def charge(self, record: UsageRecord) -> UsageRecord:
        """The record with what the reservation and the available credits cover of its cost. A cost above the
        reservation is held too."""
        wallet = self.wallet
        if record.cost > self.amount:
            self._extra = min(record.cost - self.amount, wallet.available)
            self._add(self._extra)
            if record.cost > self.amount:
                return replace(record, cost=self.amount, uncollected=record.cost - self.amount)
        return record

    def recount(self, amounts: Mapping[str, int] | None, now: float) -> None:
        """Counts `amounts`, by counter, in place of what was reserved in windows that are still open; None:
        nothing in all of them."""
        wallet = self.wallet
        if now >= wallet.closes:
            wallet.close_windows(now)
        for name, reserved, count in self.counted:
            amount = 0 if amounts is None else amounts.get(name, reserved)
            if count[1] is not None and amount != reserved and wallet.counts.get(name) is count:
                count[0] += amount - reserved
                self._changes.append((count, amount - reserved))

    def undo(self) -> None:
        """Takes back `charge` and `recount`: the end could not be written."""
        self._add(-self._extra)
        for count, change in self._changes:
            count[0] -= change
        self._extra, self._changes = 0, []

    def _add(self, amount: int) -> None:
        self.amount += amount
        self.wallet.held += amount
        if self.budget is not None:
            self.budget.held += amount

    def release(self, now: float) -> None:
        """Ends the reservation: gives back what only running tasks take."""
        wallet = self.wallet
        if now >= wallet.closes:
            wallet.close_windows(now)
        self.ended = True
        wallet.held -= self.amount
        wallet.running -= 1
        if self.budget is not None:
            self.budget.held -= self.amount
        counts = wallet.counts
        for name, amount, count in self.counted:
            if count[1] is None and counts.get(name) is count:
                count[0] -= amount
                if not count[0]:
                    del counts[name]
        if self.key is not None:
            del wallet.keys[self.key.key]


class WalletRow(NamedTuple):
    """A wallet in the file. `known`: there is such an account; `stored`: the wallet has a row."""

    known: bool
    stored: bool
    granted: int = 0
    spent: int = 0
    counts: dict[str, list[Any]] = {}  # noqa: RUF012
    credit_limit: int = 0
    budgets: Sequence[tuple[str, float, int]] = ()


class LoadedWallet:
    """A wallet: the microcredits granted to it and spent, as committed, and what its running tasks take.

    `counts` have for each counter with a count or an open window: the count, and the start and end of the
    window, or None without one. `keys` are the Idempotency-Keys of running tasks. `ending` tasks have an
    end that is not yet committed. `granted` includes the `credit_limit`, and no more what is being taken
    back: `withdrawing`, while the operator is `changing` the credits. `budgets` are by name.
    """

    __slots__ = (
        "_counted", "account", "budgets", "changing", "closes", "counts", "credit_limit", "deciding",
        "ending", "granted", "held", "keys", "known", "live", "loaded", "running", "spent", "stored",
        "waiting", "withdrawing",
    )  # fmt: skip

    def __init__(self, account: str, live: bool) -> None:
        self.account, self.live = account, live
        self.granted = self.spent = self.held = self.running = self.ending = 0
        self.credit_limit = self.withdrawing = 0
        self.changing = False
        self.budgets: dict[str, LoadedBudget] = {}
        self.counts: dict[str, list[Any]] = {}
        self.closes = math.inf
        """When the first window ends."""
        self.keys: dict[str, Reservation] = {}
        self.loaded = self._counted = False
        """Whether the amounts, and whether the counts, were read from the file."""
        self.known = self.stored = False
        """Whether the file has the account, and whether it has a row of the wallet."""
        self.waiting = 0
        """Operations that wait for the amounts."""
        self.deciding = 0
        """Reserves and changes of the credits that wait for the file, and decide then."""

    def load(self, row: WalletRow, now: float) -> None:
        """Receives the row of the file. Counts are only read once: those in memory are newer."""
        self.known, self.stored, self.spent = row.known, row.stored, row.spent
        self.granted, self.credit_limit = row.granted - self.withdrawing, row.credit_limit
        for name, start, charged in row.budgets:
            budget = self.find_budget(name, start)
            if budget.start == start:
                budget.spent = charged
                self.budgets[name] = budget
        if not self._counted:
            # Versions before 7 also wrote what running tasks count.
            self.counts = {name: count for name, count in row.counts.items() if count[1] is not None}
            self.close_windows(now)
        # Last: a row that can't be read is not loaded.
        self.loaded = self._counted = True

    @property
    def in_use(self) -> bool:
        """Whether a task or an operation refers to it, which must not get a second one from the file."""
        return bool(self.running or self.waiting or self.deciding)

    @property
    def available(self) -> int:
        return self.granted - self.spent - self.held

    def find_budget(self, name: str, start: float) -> LoadedBudget:
        """The budget of that name in the period that began at `start`, or in a later one. A new one is in
        `budgets` once it is used."""
        budget = self.budgets.get(name)
        return LoadedBudget(name, start) if budget is None or budget.start < start else budget

    def limit_status(self, counters: Sequence[Counter], now: float) -> LimitStatus:
        counts = {}
        for counter in counters:
            used, start, end = self.counts.get(counter.name, _UNUSED)
            if end is None:
                counts[counter.name] = Count(used)
            elif start <= now < end:
                counts[counter.name] = Count(used, end - now)
            else:
                counts[counter.name] = Count()
        return LimitStatus(self.granted - self.spent - self.held, counts)

    def reserve(self, request: ReserveRequest, now: float) -> Reservation | Refused:
        """Reserves all that a task needs, or nothing."""
        if now >= self.closes:
            self.close_windows(now)
        counts, counters = self.counts, request.counters
        for name, amount, limit, _ in counters:
            if limit is not None and amount and counts.get(name, _UNUSED)[0] + amount > limit:
                return Refused(self.limit_status(counters, now), "limit_exceeded", name)
        available = self.granted - self.spent - self.held
        if available < request.minimum:
            return Refused(self.limit_status(counters, now), "insufficient_credits")
        budget = None
        if (limited := request.budget) is not None:
            budget = self.find_budget(limited.name, limited.start)
            available = min(available, limited.limit - budget.spent - budget.held)
            if available < request.minimum:
                return Refused(self.limit_status(counters, now), "insufficient_credits", limited.name)
        reserved = min(request.maximum, available)
        if request.sufficient:
            share = available // self._shares(request)
            reserved = min(reserved, max(share, request.sufficient, request.minimum))
        reservation = Reservation(self, request.draft, reserved)
        for name, amount, _, window in counters:
            count = counts.get(name)
            if count is None:
                count = counts[name] = [0, None, None] if window is None else [0, now, now + window]
                if window is not None and now + window < self.closes:
                    self.closes = now + window
            count[0] += amount
            reservation.counted.append((name, amount, count))
        self.held += reserved
        self.running += 1
        if budget is not None:
            budget.held += reserved
            reservation.budget = self.budgets[budget.name] = budget
        if request.idempotency_key is not None:
            reservation.key = request.idempotency_key
            self.keys[request.idempotency_key.key] = reservation
        return reservation

    def _shares(self, request: ReserveRequest) -> int:
        """The number of tasks that the available credits are for."""
        for counter in request.counters:
            if counter.name == request.shares and counter.limit is not None:
                used: int = self.counts.get(counter.name, _UNUSED)[0]
                return max(1, counter.limit - used)
        return DEFAULT_SHARES

    def close_windows(self, now: float) -> None:
        """Forgets the windows that have ended."""
        # A window that starts in the future is not open: the clock may have been set back since.
        self.counts = {
            name: count
            for name, count in self.counts.items()
            if count[1] is None or count[1] <= now < count[2]
        }
        self.closes = min((end for _, _, end in self.counts.values() if end is not None), default=math.inf)

    def encode_windows(self) -> str:
        """The counts that outlive this process, as JSON."""
        return to_json({name: count for name, count in self.counts.items() if count[1] is not None}).decode()
