"""The ledger role of a store: reservations, limits, settlements and stored answers.

A task *reserves* before its provider is called: one request of this minute, one concurrent task, tokens of
this minute, and its maximum cost in credits; all of them or nothing. It ends once. To *settle* it charges the
actual cost, releases the rest and writes the usage record in one step. To *void* it releases everything. If
its process dies, the store *recovers* it: it charges the cost that was last *noted*.

The engine decides what a task costs and which limits apply; a store only counts. Amounts are microcredits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.usage import UsageRecord

WINDOW = 60.0
"""Length of a rate limit window in seconds. A window starts with the first request in it."""

REPLAY_SECONDS = 24 * 3600.0
"""How long an answer is stored for its Idempotency-Key."""

DEFAULT_SHARES = 20
"""The number of tasks that share a wallet if its plan has no concurrency limit."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """An Idempotency-Key of a wallet, and the digest of the request that it was sent with."""

    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """What a task needs. `draft` is its record so far, with a cost of 0.

    The task reserves `maximum` microcredits, or all that is available if that is at least `minimum`. If
    `sufficient` is set, it leaves credits to other tasks: it reserves its share (the available credits
    divided by the number of tasks that may still start), but at least `sufficient` if that much is available.
    A limit of None does not apply. `tokens` count against `tokens_limit` of the draft's model in its wallet.
    """

    draft: UsageRecord
    minimum: int
    maximum: int
    requests_limit: int | None = None
    concurrency_limit: int | None = None
    tokens: int = 0
    tokens_limit: int | None = None
    idempotency_key: IdempotencyKey | None = None
    sufficient: int = 0


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """A wallet's use of its limits at one moment: the credits that can be reserved, the requests and tokens
    counted in the open windows, the seconds until each window ends (0: no window is open), running tasks."""

    available: int
    requests: int = 0
    requests_reset: float = 0.0
    concurrency: int = 0
    tokens: int = 0
    tokens_reset: float = 0.0


@dataclass(frozen=True, slots=True)
class Reserved:
    """The task may run. `amount` microcredits are reserved, between the request's `minimum` and `maximum`."""

    limit_status: LimitStatus
    amount: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was reserved. `code` is the first of these that applies: idempotency_mismatch,
    idempotency_conflict, rate_limit_exceeded, concurrency_limit_exceeded, token_limit_exceeded,
    insufficient_credits."""

    limit_status: LimitStatus
    code: str


@dataclass(frozen=True, slots=True)
class ReplayedAnswer:
    """The same request was answered within REPLAY_SECONDS; nothing was reserved. `answer` is the one that its
    settlement stored."""

    limit_status: LimitStatus
    record: UsageRecord
    answer: bytes


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of a task. `record.cost` is its price, `record.uncollected` is 0. `tokens` replace the reserved
    ones in their window if it is still open. `answer` is stored under the Idempotency-Key; None frees the
    key."""

    record: UsageRecord
    tokens: int = 0
    answer: bytes | None = None


@dataclass(frozen=True, slots=True)
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
    """The reservation of a task that has not ended: `amount` microcredits and one concurrent task. `record`
    is its record so far: `cost` is the last noted cost, `at` the time of the reservation or of the last note.
    `own`: this process made it."""

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
        """Releases a task's reservation without a charge. `refund` also returns the request and tokens that
        it counted in the open windows. Without a reservation, does nothing."""
        ...

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """Notes the usage and cost of running tasks so far. Returns the ids of tasks without a
        reservation."""
        ...

    async def limit_status(self, wallet: Wallet, model: str = "") -> LimitStatus:
        """A wallet's current use of its limits; the tokens are those of `model`."""
        ...

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """All open reservations, in order of task id. `own`: only those that this process made, without
        those that the store itself is about to end."""
        ...

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """Ends a task that this process reserved but does not run, as if the process had died: charges the
        last noted cost, if any, and releases the reservation. Without a reservation, does nothing."""
        ...
