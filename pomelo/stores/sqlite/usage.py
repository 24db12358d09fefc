"""The statements about usage records, for the connection that only reads.

A report may look at every record, and must not be one long read: during a read, a write-ahead log
can't be emptied, and a file without one can't be written. So reports read in steps. Records are
never changed or deleted, so those that exist at the first step are of one moment, however many
steps follow.
"""

from __future__ import annotations

import math
import sqlite3
import struct
from heapq import nlargest, nsmallest
from operator import itemgetter
from typing import Any

from pomelo.stores import records
from pomelo.stores.ledger import (
    GROUPS,
    PAGE,
    Balance,
    UsageQuery,
    UsageRecord,
    UsageTotal,
    Wallet,
    WalletState,
)

STEP = 20_000
"""Records that one step looks at: about 20 ms."""

_EXPRESSIONS = {"model": "model", "key": "key_id", "day": "date(at, 'unixepoch')", "account": "account"}
assert tuple(_EXPRESSIONS) == GROUPS

_SUMS = (
    "count(*), sum(input_tokens), sum(output_tokens), sum(characters), sum(images), sum(audio_ms),"
    " sum(output_bytes), sum(cost), sum(uncollected), sum(cached_input_tokens), sum(cache_write_input_tokens)"
)

PLACE = struct.Struct(">dq")
"""Where a page ended: the time and the row of its last record."""

_Place = tuple[float, int]


class UsagePage:
    """Reads a page of records, newest first. See UsageStore.list_usage."""

    def __init__(self, query: UsageQuery, limit: int, after: str) -> None:
        """Raises:
        ValueError: `after` is invalid.
        """
        self._limit = limit
        start = (math.inf if query.until is None else query.until, -1)
        if after:
            start = min(start, read_place(after))
        self._walks = [_Walk(query, side, start, newest_first=True) for side in _sides(query)]
        self._found: list[list[tuple[_Place, UsageRecord]]] = [[] for _ in self._walks]

    def step(self, connection: sqlite3.Connection) -> tuple[list[UsageRecord], str] | None:
        """Reads the next step. None: there is more to read."""
        left = [each for each in zip(self._walks, self._found, strict=True) if self._is_left(*each)]
        if left:
            walk, found = left[0]
            where, values = walk.advance(connection)
            rows = connection.execute(
                f"SELECT rowid, {records.COLUMNS} FROM usage WHERE {where}"  # noqa: S608
                " ORDER BY at DESC, rowid DESC LIMIT ?",
                (*values, self._limit + 1 - len(found)),
            ).fetchall()
            for rowid, *row in rows:
                record = records.from_row(row)
                found.append(((record.at, rowid), record))
            if len(left) > 1 or self._is_left(walk, found):
                return None
        return self._page()

    def _is_left(self, walk: _Walk, found: list[tuple[_Place, UsageRecord]]) -> bool:
        # One record more than asked for shows whether the page is the last.
        return len(found) <= self._limit and not walk.ended

    def _page(self) -> tuple[list[UsageRecord], str]:
        all_found = [each for found in self._found for each in found]
        page = nlargest(self._limit + 1, all_found, key=itemgetter(0))
        following = ""
        if len(page) > self._limit > 0:
            following = PLACE.pack(*page[self._limit - 1][0]).hex()
        return [record for _, record in page[: self._limit]], following


class UsageSum:
    """Sums records. See UsageStore.sum_usage."""

    def __init__(self, query: UsageQuery, by: str, limit: int | None = None, after: str = "") -> None:
        if by not in GROUPS:
            raise ValueError(f"by must be one of {', '.join(GROUPS)}")
        self._expression = _EXPRESSIONS[by]
        self._limit = limit
        self._after = after
        self._last_row: int | None = None
        self._walks = [
            _Walk(query, side, (-math.inf if query.since is None else query.since, -1), newest_first=False)
            for side in _sides(query)
        ]
        self._totals: dict[str, list[int]] = {}
        self._bound: str | None = None
        """The last name that can be on the page, once known. Groups with later names are
        skipped."""

    def step(self, connection: sqlite3.Connection) -> list[UsageTotal] | None:
        """Reads the next step. None: there is more to read."""
        if self._last_row is None:
            row = connection.execute("SELECT coalesce(max(rowid), 0) FROM usage").fetchone()
            self._last_row = int(row[0])
        left = [walk for walk in self._walks if not walk.ended]
        if left:
            self._add(connection, left[0])
            if len(left) > 1 or not left[0].ended:
                return None
        return [UsageTotal(name, *counts) for name, counts in sorted(self._totals.items())][: self._limit]

    def _add(self, connection: sqlite3.Connection, walk: _Walk) -> None:
        where, values = walk.advance(connection)
        rows = connection.execute(
            f"SELECT {self._expression} AS part, {_SUMS} FROM usage"  # noqa: S608
            f" WHERE {where} AND rowid <= ? AND {self._expression} > ? GROUP BY part",
            (*values, self._last_row, self._after),
        ).fetchall()
        totals = self._totals
        for name, *counts in rows:
            if self._bound is not None and name > self._bound:
                continue
            known = totals.get(name)
            totals[name] = counts if known is None else [a + b for a, b in zip(known, counts, strict=True)]
        if self._limit is not None and len(totals) > 2 * self._limit + PAGE:
            names = nsmallest(self._limit, totals)
            self._bound = names[-1] if names else ""
            self._totals = {name: totals[name] for name in names}


def _sides(query: UsageQuery) -> list[bool | None]:
    """The modes to read separately: an index has an account's records of each mode in order of
    time. Without an account, all records are read together."""
    if query.account is None:
        return [None]
    return [False, True] if query.live is None else [query.live]


class _Walk:
    """Goes through records of one mode, or all, in the order of (at, rowid), STEP at a time."""

    def __init__(self, query: UsageQuery, side: bool | None, start: _Place, *, newest_first: bool) -> None:
        self.ended = False
        self._start = start
        self._newest_first = newest_first
        self._limit = query.since if newest_first else query.until
        filters: dict[str, Any] = {"model = ?": query.model, "key_id = ?": query.key_id}
        if query.account is None:
            self._scope: list[str] = ["1"]
            self._scope_values: list[Any] = []
            filters["live = ?"] = query.live
        else:
            self._scope, self._scope_values = ["account = ?", "live = ?"], [query.account, side]
        self._filters = {condition: value for condition, value in filters.items() if value is not None}

    def advance(self, connection: sqlite3.Connection) -> tuple[str, list[Any]]:
        """The conditions that select the next STEP records, and their values."""
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
            (*values, *limits, STEP - 1),
        ).fetchone()
        if end is None:
            self.ended = True
        else:
            self._start = end
            limit, limits = [f"(at, rowid) {'>=' if self._newest_first else '<='} (?, ?)"], [*end]
        return (
            " AND ".join([*conditions, *limit, *self._filters]),
            [*values, *limits, *self._filters.values()],
        )


def read_place(after: str) -> _Place:
    """The place that PLACE wrote.

    Raises:
        ValueError: it wrote none such.
    """
    try:
        packed = bytes.fromhex(after)
        if packed.hex() != after:
            raise ValueError(after)
        at, row = PLACE.unpack(packed)
    except (ValueError, struct.error) as error:
        raise ValueError("after is none that was given") from error
    if at != at:
        raise ValueError("after is none that was given")
    return at, row


def held(connection: sqlite3.Connection) -> list[UsageRecord]:
    """See UsageStore."""
    rows = connection.execute("SELECT record FROM holds ORDER BY task_id").fetchall()
    return [records.decode_record(text) for (text,) in rows]


def holding(connection: sqlite3.Connection, wallet: Wallet) -> tuple[int, int]:
    """See UsageStore."""
    kept, tasks = connection.execute(
        "SELECT coalesce((SELECT held FROM wallets WHERE account = ?1 AND live = ?2), 0),"
        " coalesce((SELECT sum(amount) FROM holds WHERE account = ?1 AND live = ?2), 0)",
        (wallet.account, wallet.live),
    ).fetchone()
    return kept, tasks


_STATES = """
    SELECT w.account, w.live, w.granted, w.spent, w.held,
        (SELECT coalesce(sum(amount), 0) FROM grants AS g WHERE g.account = w.account AND g.live = w.live),
        coalesce(h.amount, 0)
    FROM wallets AS w
    LEFT JOIN (SELECT account, live, sum(amount) AS amount FROM holds GROUP BY account, live) AS h
        ON h.account = w.account AND h.live = w.live
    WHERE (w.account, w.live) > (?, ?) ORDER BY w.account, w.live LIMIT ?
"""


def wallet_states(connection: sqlite3.Connection, after: Wallet | None, limit: int) -> list[WalletState]:
    """The states of at most `limit` wallets, by account and mode, beginning after `after`."""
    place = ("", -1) if after is None else (after.account, after.live)
    rows = connection.execute(_STATES, (*place, limit)).fetchall()
    return [
        WalletState(Wallet(account, bool(live)), Balance(granted, spent, held), given, holding)
        for account, live, granted, spent, held, given, holding in rows
    ]


def where(query: UsageQuery) -> tuple[list[str], list[Any]]:
    """The conditions of a query, and the values of their question marks."""
    given = {
        "account = ?": query.account,
        "live = ?": query.live,
        "model = ?": query.model,
        "key_id = ?": query.key_id,
        "at >= ?": query.since,
        "at < ?": query.until,
    }
    asked = {condition: value for condition, value in given.items() if value is not None}
    return ["1", *asked], list(asked.values())
