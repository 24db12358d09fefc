"""The ledger role of a store: reservations, limits, settlements and stored answers.

A task *reserves* before its provider is called: its part of every limit, as counters, and its maximum cost in
credits; all of them or nothing. It ends once. To *settle* it charges the
actual cost, releases the rest and writes the usage record in one step. To *void* it releases everything. If
its process dies, the store *recovers* it: it charges the cost that was last *noted*.

The engine decides what a task costs and which limits apply; a store only counts. Amounts are microcredits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.usage import UsageRecord
from pomelo.values import value_type

REPLAY_SECONDS = 24 * 3600.0
"""How long an answer is stored for its Idempotency-Key."""

DEFAULT_SHARES = 20
"""The number of tasks that share a wallet if no limit says how many may run."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """An Idempotency-Key of a wallet, and the digest of the request that it was sent with."""

    key: str
    fingerprint: bytes


class Counter(NamedTuple):
    """A count of a wallet, and what one task adds to it.

    `name` identifies it within the wallet: a lower-case word, which is not granted, spent or held, and after
    it optionally a colon and a scope, as in "requests" or "tokens:gpt-4". The task takes `amount`, at least
    0; it is refused if the count would exceed `limit`. A limit of None, or an amount of 0, refuses nothing.

    With a `window`, in seconds, the count starts at 0 with the first task after the last window has ended.
    Without one, it is what running tasks have taken: the amount is returned when the task ends.
    """

    name: str
    amount: int = 1
    limit: int | None = None
    window: float | None = None


class Budget(NamedTuple):
    """How much the tasks of a key may cost in a period that began at `start`, in Unix seconds.

    `name` identifies it within the wallet: "budget:" and a scope. A task counts what it reserves, and from
    its end on what it is charged; it belongs to the period in which it was reserved. A later `start` begins
    to count from 0; with an earlier one, the task counts in the period that is stored.
    """

    name: str
    limit: int
    start: float


class BudgetUse(NamedTuple):
    """What is `used` of a budget in the period that began at `start`, in Unix seconds."""

    used: int
    start: float


@value_type(frozen=True, slots=True)
class ReserveRequest:
    """What a task needs. `draft` is its record so far, with a cost of 0. Each of its `counters` has another
    name; the first one whose limit would be exceeded refuses the task.

    The task reserves `maximum` microcredits, or all that is available if that is at least `minimum`; with a
    `budget`, no more is available than what is left of it. If
    `sufficient` is set, it leaves credits to other tasks: it reserves its share (the available credits
    divided by the number of tasks that may still start), but at least `sufficient` if that much is available.
    That number is what is left of the limit of the counter named `shares`; without a limit, DEFAULT_SHARES.
    """

    draft: UsageRecord
    minimum: int
    maximum: int
    counters: tuple[Counter, ...] = ()
    idempotency_key: IdempotencyKey | None = None
    sufficient: int = 0
    shares: str = ""
    budget: Budget | None = None


class Count(NamedTuple):
    """How much of a counter is used, and the seconds until its window ends (0: no window is open)."""

    used: int = 0
    reset: float = 0.0


@value_type(frozen=True, slots=True)
class LimitStatus:
    """A wallet at one moment: the credits that can be reserved, and the counts of the counters that the call
    named, by name."""

    available: int
    counts: Mapping[str, Count] = field(default_factory=dict)


@value_type(frozen=True, slots=True)
class Reserved:
    """The task may run. `amount` microcredits are reserved, between the request's `minimum` and `maximum`."""

    limit_status: LimitStatus
    amount: int


@value_type(frozen=True, slots=True)
class Refused:
    """Nothing was reserved. `code` is the first of these that applies: idempotency_mismatch,
    idempotency_conflict, limit_exceeded, insufficient_credits. `counter` is the name of the counter whose
    limit would be exceeded, or of the budget that is not sufficient."""

    limit_status: LimitStatus
    code: str
    counter: str = ""


@value_type(frozen=True, slots=True)
class ReplayedAnswer:
    """The same request was answered within REPLAY_SECONDS; nothing was reserved. `answer` is the one that its
    settlement stored."""

    limit_status: LimitStatus
    record: UsageRecord
    answer: bytes


@value_type(frozen=True, slots=True)
class Settlement:
    """The end of a task. `record.cost` is its price, `record.uncollected` is 0. The amounts of `counters`
    replace the reserved ones in their windows, if these are still open; counters that are not named keep
    theirs. `answer` is stored under the Idempotency-Key; None frees the key."""

    record: UsageRecord
    counters: tuple[Counter, ...] = ()
    answer: bytes | None = None


@value_type(frozen=True, slots=True)
class Settled:
    """The record as stored. A cost above the reservation is charged to the available credits; the part that
    they did not cover is `uncollected`."""

    limit_status: LimitStatus
    record: UsageRecord


class LostReservationError(Exception):
    """The task's reservation is gone: its process was considered dead, and the task was charged its last
    noted cost. It must not deliver any more output."""


class UnknownOutcomeError(PomeloError):
    """store_unavailable, but the operation may have been done or may still be done later. Only another call
    shows the outcome: void the task after a reserve, repeat a settle."""


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """The reservation of a task that has not ended, of `amount` microcredits. `record` is its record so far:
    `cost` is the last noted cost, `at` the time of the reservation or of the last note. `own`: this process
    made it."""

    record: UsageRecord
    amount: int
    own: bool


class LedgerStore(Protocol):
    """Counts credits and limits. Every method raises PomeloError store_unavailable if the store can't be
    reached or fails in any other way; it is an UnknownOutcomeError if the operation may have been done.

    `reserve`, `settle` and `void` start immediately and finish even if nobody awaits the result or the
    awaiter is cancelled: a caller who leaves must not stop them. Each can be repeated after an unknown
    outcome; it then changes nothing and returns what the first call returned.
    """

    def reserve(self, request: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        """Reserves all that a task needs, or nothing.

        Raises:
            LostReservationError: the task has already ended.
        """
        ...

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        """Charges a task, writes its usage record and releases its reservation, in one step.

        Raises:
            LostReservationError: the task has no reservation, or the store has recovered it.
        """
        ...

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """Releases a task's reservation without a charge. `refund` also returns what it counted in windows
        that are still open. Without a reservation, does nothing."""
        ...

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """Notes the usage and cost of running tasks so far. Returns the ids of tasks without a reservation.
        If there are any, others may not have been noted, and must be given again."""
        ...

    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter] = ()) -> LimitStatus:
        """A wallet's available credits, and its counts of these counters, whose amounts and limits don't
        matter."""
        ...

    async def budget_use(self, wallet: Wallet, budgets: Sequence[Budget]) -> list[BudgetUse]:
        """How much of each budget is used in its period, or in a later one that is stored: what ended tasks
        were charged, and what running tasks reserve. The limits don't matter."""
        ...

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """All open reservations, in order of task id. `own`: only those that this process made, without
        those that the store itself is about to end."""
        ...

    def recover(self, wallet: Wallet, task_id: str) -> Awaitable[None]:
        """Ends a task that this process reserved but does not run, as if the process had died: charges the
        last noted cost, if any, and releases the reservation. Without a reservation, does nothing."""
        ...
