"""The statements of the usage role.

A report may read every record, and must not be one long read: during a read, a write-ahead log can't be
emptied, and a file without one can't be written. So reports read in steps. Records are never changed or
deleted, so the records that exist at the first step stay the same, however many steps follow.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from heapq import nlargest, nsmallest
from operator import itemgetter
from typing import Any, TypeVar

from pomelo.stores import records
from pomelo.stores.accounts import PAGE, Balance, Wallet
from pomelo.stores.usage import (
    Grouping,
    MetadataKey,
    UsageQuery,
    UsageRecord,
    UsageTotal,
    WalletState,
    check_sum,
)

STEP = 20_000
"""Records that one step reads: about 20 ms."""

METADATA_STEP = 2_000
"""Records that one step reads with their metadata, divided by the number of keys that are looked up: 2 ms, or
35 ms if each has 8 kB of it."""

# SQLite would round the last half millisecond of a day into the next one.
_DIMENSIONS = {**records.DIMENSIONS, "day": "date(CAST(at AS INTEGER), 'unixepoch')"}
_METADATA = "coalesce((SELECT value FROM json_each(nullif(metadata, '')) WHERE key = ?), '')"
_SUMS = ", ".join(["count(*)", *(f"sum({column})" for column in records.SUMMED)])
_INSERT = f"INSERT INTO usage ({records.COLUMNS}) VALUES ({records.PLACEHOLDERS})"  # noqa: S608
_SELECT = f"SELECT {records.COLUMNS} FROM usage WHERE task_id = ?"  # noqa: S608

T = TypeVar("T")

_Position = tuple[float, int]
"""The time and rowid of a record: the order of all reports."""


def insert_records(connection: sqlite3.Connection, ended: Iterable[UsageRecord]) -> None:
    connection.executemany(_INSERT, map(records.values, ended))


def insert_new_records(connection: sqlite3.Connection, ended: Iterable[UsageRecord]) -> None:
    """As `insert_records`, without the records of tasks that have one."""
    connection.executemany(f"{_INSERT} ON CONFLICT (task_id) DO NOTHING", map(records.values, ended))


def find_record(connection: sqlite3.Connection, task_id: str) -> UsageRecord | None:
    row = connection.execute(_SELECT, (task_id,)).fetchone()
    return None if row is None else records.from_row(row)


class Reports:
    """Lists and sums the records of a file. `read` calls a function with the file's connection; others may
    read between two steps of a report."""

    def __init__(self, read: Callable[[Callable[[sqlite3.Connection], Any]], Awaitable[Any]]) -> None:
        self._read = read

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        return await self._steps(UsagePage(query, limit, after).step)

    async def sum_usage(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        return await self._steps(UsageSum(query, by, limit, after).step)

    async def _steps(self, step: Callable[[sqlite3.Connection], T | None]) -> T:
        result: T | None = None
        while result is None:
            result = await self._read(step)
        return result


class UsagePage:
    """Reads a page of records, newest first, step by step."""

    def __init__(self, query: UsageQuery, limit: int, after: str) -> None:
        """`after` is the position where the last page ended, or empty.

        Raises:
            ValueError: `after` is not a position.
        """
        self._limit = limit
        start = (math.inf if query.until is None else query.until, -1)
        if after:
            start = min(start, records.decode_position(after))
        self._walks = [_Walk(query, live, start, STEP, newest_first=True) for live in _modes(query)]
        self._found: list[list[tuple[_Position, UsageRecord]]] = [[] for _ in self._walks]

    def step(self, connection: sqlite3.Connection) -> tuple[list[UsageRecord], str] | None:
        unfinished = [
            each for each in zip(self._walks, self._found, strict=True) if self._is_unfinished(*each)
        ]
        if unfinished:
            walk, found = unfinished[0]
            where, values = walk.advance(connection)
            rows = connection.execute(
                f"SELECT rowid, {records.COLUMNS} FROM usage WHERE {where}"  # noqa: S608
                " ORDER BY at DESC, rowid DESC LIMIT ?",
                (*values, self._limit + 1 - len(found)),
            ).fetchall()
            for rowid, *row in rows:
                record = records.from_row(row)
                found.append(((record.at, rowid), record))
            if len(unfinished) > 1 or self._is_unfinished(walk, found):
                return None
        return self._page()

    def _is_unfinished(self, walk: _Walk, found: list[tuple[_Position, UsageRecord]]) -> bool:
        # One record more than the limit shows whether the page is the last.
        return len(found) <= self._limit and not walk.ended

    def _page(self) -> tuple[list[UsageRecord], str]:
        all_found = [each for found in self._found for each in found]
        page = nlargest(self._limit + 1, all_found, key=itemgetter(0))
        following = ""
        if len(page) > self._limit > 0:
            following = records.encode_position(*page[self._limit - 1][0])
        return [record for _, record in page[: self._limit]], following


class UsageSum:
    """Sums records by their groups, step by step."""

    def __init__(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> None:
        """Raises ValueError as `UsageStore.sum_usage` does."""
        check_sum(by, after)
        self._groups = [_METADATA if isinstance(each, MetadataKey) else _DIMENSIONS[each] for each in by]
        # Columns of the result by their numbers. A constant makes one group, if there are records.
        self._group_by = ", ".join(str(n + 1) for n in range(len(by))) or "NULL"
        self._keys = [each.name for each in by if isinstance(each, MetadataKey)]
        self._limit = limit
        self._after = after
        self._last_row: int | None = None
        start = (-math.inf if query.since is None else query.since, -1)
        step = -(-METADATA_STEP // len(self._keys)) if self._keys else STEP
        self._walks = [_Walk(query, live, start, step, newest_first=False) for live in _modes(query)]
        self._totals: dict[tuple[str, ...], list[int]] = {}
        self._last: tuple[str, ...] | None = None
        """The last groups that can be on the page, once known. Later ones are skipped."""

    def step(self, connection: sqlite3.Connection) -> list[UsageTotal] | None:
        if self._last_row is None:
            row = connection.execute("SELECT coalesce(max(rowid), 0) FROM usage").fetchone()
            self._last_row = int(row[0])
        unfinished = [walk for walk in self._walks if not walk.ended]
        if unfinished:
            self._add(connection, unfinished[0])
            if len(unfinished) > 1 or not unfinished[0].ended:
                return None
        return [UsageTotal(groups, *counts) for groups, counts in sorted(self._totals.items())][: self._limit]

    def _add(self, connection: sqlite3.Connection, walk: _Walk) -> None:
        where, values = walk.advance(connection)
        rows = connection.execute(
            f"SELECT {', '.join([*self._groups, _SUMS])} FROM usage"  # noqa: S608
            f" WHERE {where} AND rowid <= ? GROUP BY {self._group_by}",
            (*self._keys, *values, self._last_row),
        ).fetchall()
        totals, size = self._totals, len(self._groups)
        for row in rows:
            groups, counts = row[:size], list(row[size:])
            if self._after is not None and groups <= self._after:
                continue
            if self._last is not None and groups > self._last:
                continue
            known = totals.get(groups)
            totals[groups] = counts if known is None else [a + b for a, b in zip(known, counts, strict=True)]
        if self._limit is not None and len(totals) > 2 * self._limit + PAGE:
            first = nsmallest(self._limit, totals)
            self._last = first[-1] if first else ()
            self._totals = {groups: totals[groups] for groups in first}


def _modes(query: UsageQuery) -> list[bool | None]:
    """The modes (live or not) to read one after another: the index has an account's records of each mode in
    order of time. [None]: all records are read together."""
    if query.account is None:
        return [None]
    return [False, True] if query.live is None else [query.live]


class _Walk:
    """Iterates over the records of one mode, or of all, in order of (at, rowid), `step` at a time."""

    def __init__(
        self, query: UsageQuery, live: bool | None, start: _Position, step: int, *, newest_first: bool
    ) -> None:
        self.ended = False
        self._start = start
        self._step = step
        self._newest_first = newest_first
        self._limit = query.since if newest_first else query.until
        self._outcome = records.OUTCOMES[query.failed]
        filters: dict[str, Any] = {"model = ?": query.model, "key_id = ?": query.key_id}
        if query.account is None:
            self._scope: list[str] = ["1"]
            self._scope_values: list[Any] = []
            filters["live = ?"] = query.live
        else:
            self._scope, self._scope_values = ["account = ?", "live = ?"], [query.account, live]
        self._filters = {condition: value for condition, value in filters.items() if value is not None}

    def advance(self, connection: sqlite3.Connection) -> tuple[str, list[Any]]:
        """Moves to the next records. Returns the conditions that select them, and their values."""
        direction = "DESC" if self._newest_first else "ASC"
        conditions = [*self._scope, f"(at, rowid) {'<' if self._newest_first else '>'} (?, ?)"]
        values = [*self._scope_values, *self._start]
        limit: list[str] = []
        limits: list[Any] = []
        if self._limit is not None:
            limit, limits = [f"at {'>=' if self._newest_first else '<'} ?"], [self._limit]
        # The index alone answers this, whatever the other filters are.
        end = connection.execute(
            f"SELECT at, rowid FROM usage WHERE {' AND '.join([*conditions, *limit])}"  # noqa: S608
            f" ORDER BY at {direction}, rowid {direction} LIMIT 1 OFFSET ?",
            (*values, *limits, self._step - 1),
        ).fetchone()
        if end is None:
            self.ended = True
        else:
            self._start = end
            limit, limits = [f"(at, rowid) {'>=' if self._newest_first else '<='} (?, ?)"], [*end]
        return (
            " AND ".join([*conditions, *limit, self._outcome, *self._filters]),
            [*values, *limits, *self._filters.values()],
        )


_STATES = """
    SELECT account, live, granted - credit_limit, spent, held, credit_limit,
        (SELECT coalesce(sum(amount), 0) FROM grants AS g WHERE g.account = w.account AND g.live = w.live)
    FROM wallets AS w WHERE (account, live) > (?, ?) ORDER BY account, live LIMIT ?
"""


def wallet_states(connection: sqlite3.Connection, after: Wallet | None, limit: int) -> list[WalletState]:
    """The states of up to `limit` wallets without their running tasks, in order of account and mode, starting
    after `after`."""
    start = ("", -1) if after is None else (after.account, after.live)
    rows = connection.execute(_STATES, (*start, limit)).fetchall()
    return [
        WalletState(Wallet(account, bool(live)), Balance(*amounts), grants, 0)
        for account, live, *amounts, grants in rows
    ]
