"""The statements of the operator's log."""

from __future__ import annotations

import sqlite3
from dataclasses import astuple, replace
from typing import Any

from pomelo.stores.acts import Act

_COLUMNS = "act_id, at, action, account, key_id, live, old, new, note"


def add_act(
    connection: sqlite3.Connection, act: Act | None, *, old: str | None = None, new: str | None = None
) -> None:
    """Writes an act, if there is one, in the transaction of its change. `old` and `new` replace its own."""
    if act is None:
        return
    act = replace(act, old=act.old if old is None else old, new=act.new if new is None else new)
    connection.execute(f"INSERT INTO acts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(act))  # noqa: S608


def list_acts(
    connection: sqlite3.Connection,
    account: str | None = None,
    *,
    since: float | None = None,
    limit: int,
    after: tuple[float, str] | None = None,
) -> list[Act]:
    conditions, values = ["1"], list[Any]()
    if account is not None:
        conditions.append("account = ?")
        values.append(account)
    if since is not None:
        conditions.append("at >= ?")
        values.append(since)
    if after is not None:
        conditions.append("(at, act_id) < (?, ?)")
        values.extend(after)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM acts WHERE {' AND '.join(conditions)}"  # noqa: S608
        " ORDER BY at DESC, act_id DESC LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [
        Act(act_id, at, action, owner, key_id, None if live is None else bool(live), *rest)
        for act_id, at, action, owner, key_id, live, *rest in rows
    ]
