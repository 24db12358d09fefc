"""The statements of the keys role."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pomelo.stores.accounts import PAGE, UnknownAccountError
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord
from pomelo.stores.sqlite.acts import add_act

_NAMES = [field.name for field in fields(KeyRecord)]
_COLUMNS = ", ".join(_NAMES)
_PLACEHOLDERS = ", ".join("?" * len(_NAMES))


def get_key(connection: sqlite3.Connection, key_id: str) -> KeyRecord | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE key_id = ?", (key_id,)).fetchone()  # noqa: S608
    return None if row is None else _key(row)


def add_key(connection: sqlite3.Connection, record: KeyRecord, act: Act | None = None) -> None:
    values = {name: getattr(record, name) for name in _NAMES} | {"models": json.dumps(record.models)}
    try:
        connection.execute(
            f"INSERT INTO keys ({_COLUMNS}) VALUES ({_PLACEHOLDERS})",  # noqa: S608
            list(values.values()),
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            raise UnknownAccountError(record.account) from error
        raise
    add_act(connection, act)


def list_keys(
    connection: sqlite3.Connection,
    account: str | None = None,
    *,
    limit: int = PAGE,
    after: tuple[float, str] | None = None,
) -> list[KeyRecord]:
    conditions, values = ["1"], list[Any]()
    if account is not None:
        conditions.append("account = ?")
        values.append(account)
    if after is not None:
        conditions.append("(created, key_id) > (?, ?)")
        values.extend(after)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM keys WHERE {' AND '.join(conditions)}"  # noqa: S608
        " ORDER BY created, key_id LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [_key(row) for row in rows]


def revoke_key(
    connection: sqlite3.Connection, key_id: str, at: float, act: Act | None = None
) -> KeyRecord | None:
    revoked = connection.execute(
        "UPDATE keys SET revoked = ? WHERE key_id = ? AND revoked IS NULL", (at, key_id)
    )
    if revoked.rowcount == 1:
        add_act(connection, act)
    return get_key(connection, key_id)


def replace_key(
    connection: sqlite3.Connection,
    key_id: str,
    successor: KeyRecord,
    at: float,
    act: Act | None = None,
    *,
    expires: float | None = None,
) -> bool:
    if expires is None:
        replaced = connection.execute(
            "UPDATE keys SET revoked = ? WHERE key_id = ? AND revoked IS NULL AND successor = ''",
            (at, key_id),
        )
    else:
        replaced = connection.execute(
            "UPDATE keys SET expires = ?, successor = ?"
            " WHERE key_id = ? AND revoked IS NULL AND successor = ''",
            (expires, successor.key_id, key_id),
        )
    if replaced.rowcount == 0:
        return False
    add_key(connection, successor, act)
    return True


def rehash_key(connection: sqlite3.Connection, key_id: str, old: bytes, new: bytes, secret_id: str) -> None:
    connection.execute(
        "UPDATE keys SET digest = ?, secret_id = ? WHERE key_id = ? AND digest = ?",
        (new, secret_id, key_id, old),
    )


def keys_of_secret(connection: sqlite3.Connection, secret_id: str, key_ids: Sequence[str]) -> set[str]:
    rows = connection.execute(
        "SELECT key_id FROM keys WHERE secret_id = ? AND key_id IN (SELECT value FROM json_each(?))",
        (secret_id, json.dumps(key_ids)),
    )
    return {key_id for (key_id,) in rows}


def set_budget(connection: sqlite3.Connection, key_id: str, budget: str, act: Act | None = None) -> bool:
    key = get_key(connection, key_id)
    if key is None:
        return False
    if key.budget != budget:
        connection.execute("UPDATE keys SET budget = ? WHERE key_id = ?", (budget, key_id))
        add_act(connection, act, old=key.budget)
    return True


def record_key_use(connection: sqlite3.Connection, used: Mapping[str, float]) -> None:
    rows = [(at, key_id) for key_id, at in used.items()]
    connection.executemany("UPDATE keys SET used = max(coalesce(used, 0), ?) WHERE key_id = ?", rows)


def _key(row: tuple[Any, ...]) -> KeyRecord:
    values = dict(zip(_NAMES, row, strict=True))
    values["live"] = bool(values["live"])
    values["models"] = tuple(json.loads(values["models"]))
    return KeyRecord(**values)
