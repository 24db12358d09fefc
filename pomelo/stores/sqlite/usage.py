"""The statements about usage records, for the connection that only reads."""

import sqlite3
import struct
from typing import Any

from pomelo.stores.ledger import GROUPS, UsageQuery, UsageRecord, UsageTotal, Wallet
from pomelo.stores.sqlite import records

_EXPRESSIONS = {"model": "model", "key": "key_id", "day": "date(at, 'unixepoch')", "account": "account"}
assert tuple(_EXPRESSIONS) == GROUPS

PLACE = struct.Struct(">dq")
"""Where a page ended: the time and the row of its last record."""


def list_usage(
    connection: sqlite3.Connection, query: UsageQuery, limit: int, after: str
) -> tuple[list[UsageRecord], str]:
    """See UsageStore."""
    conditions, values = where(query)
    if after:
        conditions.append("(at, rowid) < (?, ?)")
        values.extend(read_place(after))
    # One more than asked for tells whether that is the end.
    rows = connection.execute(
        f"SELECT rowid, {records.COLUMNS} FROM usage WHERE {' AND '.join(conditions)}"  # noqa: S608
        " ORDER BY at DESC, rowid DESC LIMIT ?",
        (*values, limit + 1),
    ).fetchall()
    found = [records.from_row(row[1:]) for row in rows[:limit]]
    if len(rows) <= limit or not found:
        return found, ""
    return found, PLACE.pack(found[-1].at, rows[limit - 1][0]).hex()


def read_place(after: str) -> tuple[float, int]:
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


def sum_usage(connection: sqlite3.Connection, query: UsageQuery, by: str) -> list[UsageTotal]:
    """See UsageStore."""
    conditions, values = where(query)
    rows = connection.execute(
        f"SELECT {_EXPRESSIONS[by]} AS part, count(*), sum(input_tokens), sum(output_tokens),"  # noqa: S608
        " sum(characters), sum(images), sum(audio_ms), sum(output_bytes), sum(cost), sum(uncollected)"
        f" FROM usage WHERE {' AND '.join(conditions)} GROUP BY part ORDER BY part",
        values,
    )
    return [UsageTotal(*row) for row in rows]


def held(connection: sqlite3.Connection) -> list[UsageRecord]:
    """See UsageStore."""
    return [records.read(text) for (text,) in connection.execute("SELECT record FROM holds ORDER BY task_id")]


def holding(connection: sqlite3.Connection, wallet: Wallet) -> tuple[int, int]:
    """See UsageStore."""
    kept, tasks = connection.execute(
        "SELECT coalesce((SELECT held FROM wallets WHERE account = ?1 AND live = ?2), 0),"
        " coalesce((SELECT sum(amount) FROM holds WHERE account = ?1 AND live = ?2), 0)",
        (wallet.account, wallet.live),
    ).fetchone()
    return kept, tasks


def wallets(connection: sqlite3.Connection) -> list[Wallet]:
    """See UsageStore."""
    rows = connection.execute("SELECT account, live FROM wallets ORDER BY account, live")
    return [Wallet(account, bool(live)) for account, live in rows]


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
