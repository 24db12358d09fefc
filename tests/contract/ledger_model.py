"""A small model of a wallet, with which every store is compared, and the requests that are tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from pomelo.stores.accounts import Balance, Wallet
from pomelo.stores.ledger import DEFAULT_SHARES, Budget, Count, Counter, LimitStatus, ReserveRequest
from pomelo.stores.usage import UsageRecord

WALLETS = (Wallet("acme", True), Wallet("acme", False))
DAY = 86_400.0


def counter(
    name: str, amounts: st.SearchStrategy[int], limits: list[int | None], window: float | None
) -> st.SearchStrategy[Counter]:
    return st.builds(Counter, st.just(name), amounts, st.sampled_from(limits), st.just(window))


COUNTERS = {
    "requests": counter("requests", st.just(1), [None, None, None, 0, 1, 3, 5], 60.0),
    "concurrency": counter("concurrency", st.just(1), [None, None, None, 1, 2, 4], None),
    "tokens:gpt-4": counter("tokens:gpt-4", st.integers(0, 40), [None, None, 40, 100], 60.0),
    "tokens:claude": counter("tokens:claude", st.integers(0, 40), [None, None, 40, 100], 60.0),
    "images": counter("images", st.integers(0, 3), [None, None, 0, 4], DAY),
    "streams:ann": counter("streams:ann", st.integers(0, 2), [None, None, 1, 3], None),
}
"""What the tasks count: the limits that Pomelo has, and others."""

ALL_COUNTERS = tuple(
    Counter(name, window=window)
    for name, window in zip(COUNTERS, (60.0, None, 60.0, 60.0, DAY, None), strict=True)
)


@st.composite
def drawn_counters(draw: st.DrawFn) -> tuple[Counter, ...]:
    names = draw(st.lists(st.sampled_from(tuple(COUNTERS)), min_size=1, unique=True))
    return tuple(draw(COUNTERS[name]) for name in names)


REQUESTS: dict[str, Any] = {
    "wallet": st.sampled_from((*WALLETS, WALLETS[0])),
    "minimum": st.integers(0, 60),
    "more": st.integers(0, 100),
    "counters": drawn_counters(),
    "sufficient": st.sampled_from([0, 0, 1, 20, 70, 300]),
    "shares": st.sampled_from(["concurrency", "concurrency", "", "images"]),
    "budget": st.sampled_from([None, None, None, ("budget:a", 60), ("budget:a", 200), ("budget:b", 100)]),
    "key": st.sampled_from([None, None, None, ("k", b"1"), ("k", b"2"), ("l", b"1")]),
}


@dataclass
class Window:
    """A count between two times."""

    start: float
    end: float
    count: int = 0

    def is_open(self, now: float) -> bool:
        return self.start <= now < self.end


@dataclass
class Running:
    """A running task. `windows` are those that it counts in, by counter."""

    request: ReserveRequest
    amount: int
    windows: dict[str, Window]
    noted: UsageRecord


@dataclass
class StoredAnswer:
    """The answer under an Idempotency-Key."""

    fingerprint: bytes
    task_id: str
    answer: bytes
    until: float


@dataclass
class WalletModel:
    """A wallet: what it was granted, its counts, tasks, records and answers."""

    granted: int = 0
    credit_limit: int = 0
    windows: dict[str, Window] = field(default_factory=dict)
    future: list[tuple[str, Window]] = field(default_factory=list)
    """Windows, by counter, that began in the future when the store was opened, as the clock had been set back."""
    running: dict[str, Running] = field(default_factory=dict)
    records: dict[str, UsageRecord] = field(default_factory=dict)
    answers: dict[str, StoredAnswer] = field(default_factory=dict)
    expired: dict[str, float] = field(default_factory=dict)
    uncertain: set[str] = field(default_factory=set)
    touched: bool = False
    budgets: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The name and period of the budget that a task counts in, by task."""

    @property
    def balance(self) -> Balance:
        spent = sum(stored.cost for stored in self.records.values())
        held = sum(task.amount for task in self.running.values())
        return Balance(self.granted, spent, held, self.credit_limit)

    def expire_answers(self, now: float) -> None:
        for key in [key for key, stored in self.answers.items() if stored.until <= now]:
            self.expired[key] = self.answers.pop(key).until

    def count(self, counter: Counter, now: float) -> Count:
        if counter.window is None:
            taken = [each for task in self.running.values() for each in task.request.counters]
            return Count(sum(each.amount for each in taken if each.name == counter.name))
        window = self.windows.get(counter.name)
        return Count(window.count, window.end - now) if window and window.is_open(now) else Count()

    def limit_status(self, counters: Iterable[Counter], now: float) -> LimitStatus:
        counts = {counter.name: self.count(counter, now) for counter in counters}
        return LimitStatus(self.balance.available, counts)

    def answer_of(self, request: ReserveRequest) -> str:
        """The reply to a known Idempotency-Key that the contract requires; empty if the key is new."""
        if request.idempotency_key is None:
            return ""
        key = request.idempotency_key.key
        keys = [task.request.idempotency_key for task in self.running.values()]
        known = {each.key: each.fingerprint for each in keys if each is not None}
        known |= {each: stored.fingerprint for each, stored in self.answers.items()}
        if key not in known:
            return ""
        if known[key] != request.idempotency_key.fingerprint:
            return "idempotency_mismatch"
        return "replayed" if key in self.answers else "idempotency_conflict"

    def refusal(self, request: ReserveRequest, now: float) -> tuple[str, str]:
        """The code and counter of the refusal that the contract requires; empty: the task is reserved."""
        for counter in request.counters:
            used = self.count(counter, now).used
            if counter.limit is not None and counter.amount and used + counter.amount > counter.limit:
                return "limit_exceeded", counter.name
        if self.balance.available < request.minimum:
            return "insufficient_credits", ""
        if request.budget is not None and self.left(request.budget) < request.minimum:
            return "insufficient_credits", request.budget.name
        return "", ""

    def left(self, budget: Budget) -> int:
        """What is left of a budget."""
        counted = [task for task, of in self.budgets.items() if of == (budget.name, budget.start)]
        charged = sum(self.records[task].cost for task in counted if task in self.records)
        return (
            budget.limit
            - charged
            - sum(self.running[task].amount for task in counted if task in self.running)
        )

    def reservable(self, request: ReserveRequest, now: float) -> int:
        """The credits that a task reserves."""
        available = self.balance.available
        if request.budget is not None:
            available = min(available, self.left(request.budget))
        amount = min(request.maximum, available)
        if not request.sufficient:
            return amount
        shares = DEFAULT_SHARES
        for counter in request.counters:
            if counter.name == request.shares and counter.limit is not None:
                shares = max(1, counter.limit - self.count(counter, now).used)
        return min(amount, max(available // shares, request.sufficient, request.minimum))

    def reserve(self, request: ReserveRequest, amount: int, now: float) -> None:
        self.forget_closed(now)
        windows = {}
        for counter in request.counters:
            if counter.window is not None:
                window = self.windows.get(counter.name)
                if window is None or not window.is_open(now):
                    window = self.windows[counter.name] = Window(now, now + counter.window)
                window.count += counter.amount
                windows[counter.name] = window
        if request.budget is not None:
            self.budgets[request.draft.task_id] = (request.budget.name, request.budget.start)
        self.running[request.draft.task_id] = Running(request, amount, windows, request.draft)
        self.touched = True

    def end(self, task_id: str, now: float, amounts: Mapping[str, int]) -> None:
        """Ends a task. `amounts` replace what it counted in windows that are still open."""
        self.forget_closed(now)
        task = self.running.pop(task_id)
        for counter in task.request.counters:
            window = task.windows.get(counter.name)
            if window is not None and window.is_open(now) and counter.name in amounts:
                window.count += amounts[counter.name] - counter.amount

    def reopen(self, found: LimitStatus, now: float) -> None:
        """Takes back the windows of the future that a store opened later has `found`: it forgets them only in
        memory, so they are in its file until something else is written there."""
        for name, window in self.future:
            if window.is_open(now) and found.counts[name] == Count(window.count, window.end - now):
                self.windows[name] = window

    def forget_closed(self, now: float) -> None:
        """Forgets the windows that are not open."""
        self.windows = {name: window for name, window in self.windows.items() if window.is_open(now)}
