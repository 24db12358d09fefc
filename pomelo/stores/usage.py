"""The usage role of a store: what each task used and cost, page by page or summed up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from pomelo.stores.accounts import Balance, Wallet

RECOVERED = "recovered"
"""The source of a record that the store wrote for a task whose process had died."""

GROUPS = ("model", "key", "day", "account")


def _added(version: int) -> int:
    """A count whose column was added by that version of the usage table; older records have 0."""
    return field(default=0, metadata={"version": version})


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What one task used and cost. A task that failed before it delivered anything leaves no record.

    The fields are the columns of every usage table, and the members of its JSON form. Counts that don't apply
    are 0. The cached and cache-written tokens are part of `input_tokens`, and the tokens written for an hour
    are part of the cache-written ones. `provider_micros` are the microdollars that the provider reported as
    the task's cost, if the task was billed by them. `cost` is what was charged, `uncollected` the rest of the
    price if reservation and balance did not cover it. `prices` are encoded by `pomelo.catalog.pricing`;
    applied to the counts they give cost + uncollected. `source` says who counted: "provider", "estimated" (by
    Pomelo) or "recovered". `complete` is False if the answer was cut off or the caller left. `at` is the Unix
    time of the settlement.
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
    cached_input_tokens: int = _added(2)
    cache_write_input_tokens: int = _added(2)
    cache_write_1h_input_tokens: int = _added(2)
    output_tokens: int = 0
    characters: int = 0
    images: int = 0
    pixels: int = 0
    audio_ms: int = 0
    provider_micros: int = _added(2)
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
        """The wallet that pays."""
        return Wallet(self.account, self.live)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Selects the records that match every field that is not None: since <= at < until."""

    account: str | None = None
    live: bool | None = None
    model: str | None = None
    key_id: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sums of a group's records. `group` is a model, a key id, an account or a day (2026-11-24, in UTC).

    All fields after `tasks` are summed columns.
    """

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


@dataclass(frozen=True, slots=True)
class WalletState:
    """A wallet's stored balance and the sums of its grants and of its open reservations, all read at the same
    moment. In a consistent store, grants_sum == balance.granted and reservations_sum == balance.held."""

    wallet: Wallet
    balance: Balance
    grants_sum: int
    reservations_sum: int


class UsageStore(Protocol):
    """Reads usage records and the state of wallets. Every method raises PomeloError store_unavailable if the
    store can't be reached. A record can be read as soon as its settlement was awaited."""

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        """Up to `limit` records, newest first, and the value of `after` for the next page (empty: this page
        was the last). Records added between two calls don't shift the pages.

        Raises:
            ValueError: `after` is not a value that an earlier call returned.
        """
        ...

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """Sums by one of GROUPS, in order of name: up to `limit` (None: all), starting after the name
        `after`. All sums are of the same moment.

        Raises:
            ValueError: `by` is not one of GROUPS.
        """
        ...

    async def drafts(self) -> list[UsageRecord]:
        """The records so far of all running tasks, in order of task id; `cost` is the last noted cost."""
        ...

    async def damage(self) -> list[tuple[str, str]]:
        """Checks the files that hold the records completely, which may take long. Returns pairs of a file
        name and a finding; the first finding says what to do. Empty: no damage, or no files."""
        ...

    def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """Yields the states of all wallets that ever had a grant or a reservation, in pages and in any order.
        A wallet may be yielded twice; one that is created meanwhile may be missing."""
        ...
