"""The usage role of a store: what each task used and cost, page by page or summed up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, get_args

from pydantic_core import from_json, to_json

from pomelo.stores.accounts import Balance, Wallet
from pomelo.values import value_type

RECOVERED = "recovered"
"""The source of a record that the store wrote for a task whose process had died."""

CANCELLED = "cancelled"
"""The code of a task that its caller left, or that was cancelled when its server stopped."""

Dimension = Literal[
    "model", "key", "day", "account", "user", "task_type", "provider", "mode", "protocol", "code",
]  # fmt: skip
"""A property of records that sums can be grouped by. A day is written 2026-11-24, in UTC; a mode is "live" or
"test"; a key is its id; a protocol is the record's `wire`."""

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

MAX_GROUPINGS = 4
"""The largest number of groupings of one sum."""

T = TypeVar("T")


def _added(version: int, default: T) -> T:
    """A field whose column was added by that version of the usage table; older records have the default."""
    return field(default=default, metadata={"version": version})


@value_type(frozen=True, slots=True)
class UsageRecord:
    """What one task used and cost. A task that failed before its provider was asked leaves no record.

    The fields are the columns of every usage table, and the members of its JSON form. Counts that don't
    apply are 0. The cached and cache-written tokens are part of `input_tokens`, and the tokens written
    for an hour are part of the cache-written ones. The reasoning tokens are part of `output_tokens`.
    `provider_micros` are the microdollars that the provider reported as the task's cost, if the task was
    billed by them. `cost` is what was charged, `uncollected` the rest of the price if reservation and
    balance did not cover it. `prices` are encoded by `pomelo.catalog.pricing`; applied to the counts they
    give cost + uncollected. `source` says who counted: "provider", "estimated" (by Pomelo) or
    "recovered". `complete` is False if the answer was cut off or the caller left. `at` is the Unix time
    of the settlement. `user` is the caller's own user, without NUL, or empty. `metadata` are the caller's
    own pairs, encoded by `encode_metadata`. `code` says why the task failed: the code of its error, or
    CANCELLED; empty if it did not fail, or its process died. A task that failed costs nothing, or what it
    had delivered by then.
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
    cached_input_tokens: int = _added(2, 0)
    cache_write_input_tokens: int = _added(2, 0)
    cache_write_1h_input_tokens: int = _added(2, 0)
    output_tokens: int = 0
    reasoning_tokens: int = _added(3, 0)
    characters: int = 0
    images: int = 0
    pixels: int = 0
    audio_ms: int = 0
    provider_micros: int = _added(2, 0)
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
    user: str = _added(3, "")
    metadata: str = _added(3, "")
    code: str = _added(4, "")

    @property
    def wallet(self) -> Wallet:
        """The wallet that pays."""
        return Wallet(self.account, self.live)


def encode_metadata(pairs: Mapping[str, str]) -> str:
    """Pairs of strings as the `metadata` of a record: a JSON object in order of its keys, or empty without
    pairs. Equal pairs give equal text.

    Raises:
        ValueError: a key or value has a NUL, which Postgres can't store, or half of a surrogate pair.
    """
    if not pairs:
        return ""
    if any("\0" in text for pair in pairs.items() for text in pair):
        raise ValueError("metadata can't have a NUL")
    return to_json(dict(sorted(pairs.items()))).decode()


def decode_metadata(text: str) -> dict[str, str]:
    """Reverses `encode_metadata`."""
    pairs: dict[str, str] = from_json(text) if text else {}
    return pairs


@dataclass(frozen=True, slots=True)
class MetadataKey:
    """Groups records by their values of this key of their metadata; those without the key by "".

    Raises:
        ValueError: no metadata can have the key: it has a NUL, or half of a surrogate pair.
    """

    name: str

    def __post_init__(self) -> None:
        encode_metadata({self.name: ""})


Grouping = Dimension | MetadataKey
"""What sums are grouped by."""


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Selects the records that match every field that is not None: since <= at < until. `failed` selects
    tasks with a code; without it, those that were billed: all but those that failed and cost nothing."""

    account: str | None = None
    live: bool | None = None
    model: str | None = None
    key_id: str | None = None
    since: float | None = None
    until: float | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sums of the records that are equal in every grouping. `groups` are the values of the groupings,
    in the same order.

    All fields after `tasks` are summed columns.
    """

    groups: tuple[str, ...]
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
    cache_write_1h_input_tokens: int = 0
    reasoning_tokens: int = 0


def check_sum(by: Sequence[Grouping], after: tuple[str, ...] | None) -> None:
    """Checks the arguments of `UsageStore.sum_usage`.

    Raises:
        ValueError: as `sum_usage` does.
    """
    for grouping in by:
        if not isinstance(grouping, MetadataKey) and grouping not in DIMENSIONS:
            raise ValueError(f"by must be of {', '.join(DIMENSIONS)} and metadata keys")
    if len(by) > MAX_GROUPINGS:
        raise ValueError(f"by must be at most {MAX_GROUPINGS} groupings")
    if after is not None and len(after) != len(by):
        raise ValueError("after must be the groups of a total of an earlier page")


@dataclass(frozen=True, slots=True)
class WalletState:
    """A wallet's stored balance and the sums of its grants and of its open reservations, all read at the same
    moment. In a consistent store, grants_sum == balance.granted and reservations_sum == balance.held."""

    wallet: Wallet
    balance: Balance
    grants_sum: int
    reservations_sum: int


class UsageReports(Protocol):
    """Reports of usage records. Every method raises PomeloError store_unavailable if the records can't be
    reached."""

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
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        """Sums by up to MAX_GROUPINGS groupings, in order of the groups: up to `limit` (None: all), starting
        after the groups `after` (None: with the first). Without groupings, one sum of all records, if there
        are any. All sums are of the same moment.

        Raises:
            ValueError: `by` has an unknown or too many groupings, or `after` has another number of them.
        """
        ...

    async def damage(self) -> list[tuple[str, str]]:
        """Checks the files that hold the records completely, which may take long. Returns pairs of a file
        name and a finding; the first finding says what to do. Empty: no damage, or no files."""
        ...


class UsageStore(UsageReports, Protocol):
    """Reads usage records and the state of wallets. Every method raises PomeloError store_unavailable if the
    store can't be reached. A record can be read as soon as its settlement was awaited."""

    async def drafts(self) -> list[UsageRecord]:
        """The records so far of all running tasks, in order of task id; `cost` is the last noted cost."""
        ...

    def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """Yields the states of all wallets that ever had a grant or a reservation, in pages and in any order.
        A wallet may be yielded twice; one that is created meanwhile may be missing."""
        ...
