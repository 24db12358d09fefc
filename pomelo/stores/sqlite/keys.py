"""The statements of the keys role."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from pomelo.stores.accounts import UnknownAccountError
from pomelo.stores.keys import KeyRecord

_COLUMNS = "key_id, account, live, digest, models, created, expires, revoked"


def get_key(connection: sqlite3.Connection, key_id: str) -> KeyRecord | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE key_id = ?", (key_id,)).fetchone()  # noqa: S608
    return None if row is None else _key(row)


def add_key(connection: sqlite3.Connection, record: KeyRecord) -> None:
    try:
        connection.execute(
            f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                record.key_id,
                record.account,
                record.live,
                record.digest,
                json.dumps(record.models),
                record.created,
                record.expires,
                record.revoked,
            ),
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            raise UnknownAccountError(record.account) from error
        raise


def list_keys(
    connection: sqlite3.Connection, account: str | None, limit: int, after: tuple[float, str] | None
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


def revoke_key(connection: sqlite3.Connection, key_id: str, at: float) -> KeyRecord | None:
    _revoke(connection, key_id, at)
    return get_key(connection, key_id)


def replace_key(connection: sqlite3.Connection, key_id: str, successor: KeyRecord, at: float) -> bool:
    if not _revoke(connection, key_id, at):
        return False
    add_key(connection, successor)
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


def _revoke(connection: sqlite3.Connection, key_id: str, at: float) -> bool:
    changed = connection.execute(
        "UPDATE keys SET revoked = ? WHERE key_id = ? AND revoked IS NULL", (at, key_id)
    )
    return changed.rowcount == 1


def _key(row: tuple[Any, ...]) -> KeyRecord:
    key_id, account, live, digest, models, created, expires, revoked = row
    return KeyRecord(
        key_id, account, bool(live), digest, tuple(json.loads(models)), created, expires, revoked
    )
