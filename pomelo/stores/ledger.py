"""The ledger's role of a store: balances, what running tasks hold, limits, usage records, answers to repeat.

Everything belongs to a wallet: an account's live or test side. Money is whole microcredits. A task *takes*
once, before its provider is called: a request of this minute, a slot, tokens of this minute, and a hold of
its worst case; all of them or none. It ends once: it *settles*, which charges it, frees the rest and keeps
its record in one step, or it is *voided*. The tasks of a process that died are charged by the store itself
what was last *noted* of them.

What a task costs and which limits there are is for `pomelo.admission` to say; a store only keeps count.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pomelo.errors import PomeloError

WINDOW = 60.0
"""Seconds of a window; it begins with the first request in it."""

PAGE = 1_000
"""The default number of entries in one page of a list."""

REPLAY_SECONDS = 24 * 3600.0
"""How long an answer is kept for its Idempotency-Key."""


DEFAULT_SHARES = 20
"""Among how many tasks a wallet is shared whose plan does not limit concurrent ones."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """One side of an account."""

    account: str
    live: bool


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What one task used and cost. A task that failed before anything was delivered leaves none.

    Counts are 0 where they don't apply. Those of the cache are parts of `input_tokens`, the one of an hour is
    part of what was written. `provider_micros` are the microdollars that the provider reported as the task's
    cost, where it was billed by that. `cost` is what was charged; `uncollected` what it should have been
    beyond that, 0 unless a vendor used more than the task could hold. `prices` are those that it was counted
    by, as `pomelo.catalog.pricing` writes them: with the counts they give cost + uncollected. `source` says
    who
    counted: "provider", "estimated" (by us), or "recovered" (last noted before the process died). `complete`
    is False for an answer that was cut or left. `at` is Unix seconds, when it was settled.
    """

    task_id: str
    request_id: str
    account: str
    live: bool
    key_id: str
    wire: str
    model: str
    task_type: str
    provider: str = ""
    provider_model: str = ""
    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    cache_write_1h_input_tokens: int = 0
    output_tokens: int = 0
    characters: int = 0
    images: int = 0
    pixels: int = 0
    audio_ms: int = 0
    provider_micros: int = 0
    processing_ms: int = 0
    first_byte_ms: int = 0
    output_bytes: int = 0
    cost: int = 0
    uncollected: int = 0
    prices: str = ""
    price_version: str = ""
    source: str = "provider"
    complete: bool = True
    at: float = 0.0

    @property
    def wallet(self) -> Wallet:
        """Who pays."""
        return Wallet(self.account, self.live)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """An Idempotency-Key of a wallet, and the digest of the request that it came with."""

    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """What a task asks for. `draft` is its record so far, of cost 0.

    It holds `most` microcredits, or all that is available if that is at least `least`. With `enough` it
    leaves something to other tasks: it holds its share, which is what is available divided by the free slots
    (by SHARES where slots are not limited), but no less than `enough` if that is available. A limit that is
    None does not apply. `tokens` count against `tokens_limit`, of `draft.model` in this wallet.
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
    """A wallet's limits and money at a moment: what is used of a window, and the seconds until it ends (0:
    none is open); slots that are taken; microcredits that can be held."""

    available: int
    requests: int = 0
    requests_reset: float = 0.0
    concurrency: int = 0
    tokens: int = 0
    tokens_reset: float = 0.0


@dataclass(frozen=True, slots=True)
class Reserved:
    """The task may run. `held` is between the take's `least` and `most`."""

    limit_status: LimitStatus
    held: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was taken. `code` is that of the error table: idempotency_mismatch, idempotency_conflict,
    rate_limit_exceeded, concurrency_limit_exceeded, token_limit_exceeded or insufficient_credits; where
    several apply, the first of these."""

    limit_status: LimitStatus
    code: str


@dataclass(frozen=True, slots=True)
class ReplayedAnswer:
    """The request was answered before, within REPLAY_SECONDS; nothing was taken. `answer` is what its
    settlement kept."""

    limit_status: LimitStatus
    record: UsageRecord
    answer: bytes


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a task ended. `record.cost` is what it should cost; `record.uncollected` is 0. `tokens` replace
    those of its take in the window, if that is still open. `answer` is kept for its Idempotency-Key; with
    None the key is free again."""

    record: UsageRecord
    tokens: int = 0
    answer: bytes | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The record as it was kept: of a cost above the hold, the excess came out of what was available, and is
    `uncollected` where that was not enough."""

    limit_status: LimitStatus
    record: UsageRecord


class LostReservationError(Exception):
    """The task's hold is gone: this process was taken for dead, and the task was charged what it had noted.
    It may deliver nothing more."""


class UnknownOutcomeError(PomeloError):
    """store_unavailable, where the operation may have been done or may still be done later. Only a
    further call shows the outcome: void the task after a take, repeat a settlement."""


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """What a task that has not ended holds: `amount` microcredits and one slot. `record` is its
    record so far: its cost is the last noted cost, its `at` the time of the take or of the last
    note. `own`: this process took it."""

    record: UsageRecord
    amount: int
    own: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits given to a wallet; `amount` is above 0. The id makes it happen once."""

    grant_id: str
    wallet: Wallet
    amount: int
    at: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Balance:
    """A wallet's microcredits: granted = spent + held + available, none of them below 0."""

    granted: int = 0
    spent: int = 0
    held: int = 0

    @property
    def available(self) -> int:
        """What can be held."""
        return self.granted - self.spent - self.held


class LedgerStore(Protocol):
    """Keeps count. Every method raises PomeloError store_unavailable if the store can't be reached
    or fails in any other way; it is UnknownOutcomeError if the operation may have been done.

    `take`, `settle` and `void` begin at once, and are done even when nobody awaits what they return or its
    awaiter is cancelled: a caller who leaves must not stop them. Each may be repeated after an unknown
    outcome; it then changes nothing and gives what the first one gave.
    """

    def reserve(self, take: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        """Takes all that a task needs, or nothing."""
        ...

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        """Charges a task, keeps its record and frees what it held, in one step.

        Raises:
            LostHoldError: the store charged it already.
        """
        ...

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """Frees all that a task took, and its Idempotency-Key; it costs nothing. With `refund` its request
        and tokens of this minute are given back, too: it was refused. Without a hold nothing happens."""
        ...

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """Notes what running tasks have used and cost so far; gives the ids of those whose hold is gone."""
        ...

    async def limit_status(self, wallet: Wallet, model: str = "") -> LimitStatus:
        """A wallet's limits and money now; its tokens of `model`."""
        ...

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """What tasks hold, in order of task id. With `own`: only tasks that this process took,
        without those that the store itself is about to end."""
        ...

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """Ends a task that this process took but does not run, as if the process had died. The task
        is charged the last noted cost, or nothing, and its hold is released. Without a hold, does
        nothing."""
        ...


class AccountStore(Protocol):
    """Keeps accounts and grants. Every method raises PomeloError store_unavailable as above."""

    async def add_account(self, name: str, plan: str, at: float) -> bool:
        """Makes an account; False: there is one of that name."""
        ...

    async def get_account(self, name: str) -> AccountRecord | None:
        """The account of that name."""
        ...

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        """At most `limit` accounts, in order of name, beginning after the name `after`."""
        ...

    async def set_plan(self, name: str, plan: str) -> bool:
        """Puts an account on a plan; False: there is no such account."""
        ...

    async def grant(self, grant: Grant) -> Balance:
        """Gives credits, once for each grant_id; the balance after it.

        Raises:
            UnknownAccountError: there is no such account.
        """
        ...

    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        """The grant with that id to that wallet, or None."""
        ...

    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        """A wallet's grants, oldest first."""
        ...

    async def balance(self, wallet: Wallet) -> Balance:
        """A wallet's money; that of an unknown account is 0."""
        ...


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """An account. `created` is Unix seconds."""

    name: str
    plan: str
    created: float


@dataclass(frozen=True, slots=True)
class AccountSummary(AccountRecord):
    """An account with its balances in live and test mode."""

    live: Balance = Balance()
    test: Balance = Balance()


@dataclass(frozen=True, slots=True)
class WalletState:
    """A wallet's stored balance and the sums that it must equal, read at one moment. `given` is the
    sum of its grants, `holding` the sum of what its tasks hold. In a consistent store,
    given == balance.granted and holding == balance.held."""

    wallet: Wallet
    balance: Balance
    given: int
    holding: int


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which records: those that fit all that is given. `since` counts, `until` does not."""

    account: str | None = None
    live: bool | None = None
    model: str | None = None
    key_id: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sums of a group's records. `group` is the model, key id, account, or day (2026-11-24, in UTC)."""

    group: str
    tasks: int
    input_tokens: int
    output_tokens: int
    characters: int
    images: int
    audio_ms: int
    output_bytes: int
    cost: int
    uncollected: int
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0


GROUPS = ("model", "key", "day", "account")


class UsageStore(Protocol):
    """Reads usage records. Every method raises PomeloError store_unavailable as above. A record can be read
    as soon as its settlement was awaited."""

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        """At most `limit` records, newest first, and what to give as `after` for the next ones (empty: these
        were the last). Records that come meanwhile shift nothing.

        Raises:
            ValueError: `after` is none that was given.
        """
        ...

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """The sums by one of GROUPS, in order of name: at most `limit` (None: all), beginning after
        the name `after`. All sums are of the same moment."""
        ...

    async def held(self) -> list[UsageRecord]:
        """The records so far of all tasks that hold something; `cost` is what was last noted."""
        ...

    async def holding(self, wallet: Wallet) -> tuple[int, int]:
        """Microcredits: what the wallet's balance says is held, and the sum of what its tasks hold, both of
        one moment. A store that is well says the same twice."""
        ...

    async def wallets(self) -> list[Wallet]:
        """Every wallet that ever had a grant or a hold."""
        ...

    async def damage(self) -> list[tuple[str, str]]:
        """Checks all of the files that the store keeps records in, which may take long. Returns
        pairs of a file's name and a finding; the first says what to do. Empty: no damage, or no
        files."""
        ...

    def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """Yields the states of all wallets that ever had a grant or a hold, in pages and in any
        order. A wallet may come twice; one that is created meanwhile may be missing."""
        ...
