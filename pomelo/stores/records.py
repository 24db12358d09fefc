"""Usage records as rows of the table `usage`, and as the JSON that a running task's hold keeps."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any

from pydantic_core import from_json, to_json

from pomelo.stores.ledger import UsageRecord

_NAMES = tuple(field.name for field in fields(UsageRecord))
values = attrgetter(*_NAMES)
"""The values of a record, in the order of COLUMNS."""

COLUMNS = ", ".join(_NAMES)
"""Those that `from_row` takes, in its order."""

_INSERT = f"INSERT INTO usage ({COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608
_SELECT = f"SELECT {COLUMNS} FROM usage WHERE task_id = ?"  # noqa: S608


def insert_record(connection: sqlite3.Connection, record: UsageRecord) -> None:
    """Keeps a task's record; there is none yet."""
    connection.execute(_INSERT, values(record))


def insert_record_once(connection: sqlite3.Connection, record: UsageRecord) -> None:
    """Keeps a task's record, if there is none yet."""
    connection.execute(f"{_INSERT} ON CONFLICT (task_id) DO NOTHING", values(record))


def find_record(connection: sqlite3.Connection, task_id: str) -> UsageRecord | None:
    """A task's record."""
    row = connection.execute(_SELECT, (task_id,)).fetchone()
    return None if row is None else from_row(row)


def from_row(row: Iterable[Any]) -> UsageRecord:
    """The record of a row of COLUMNS."""
    values = dict(zip(_NAMES, row, strict=True))
    values["live"] = bool(values["live"])
    values["complete"] = bool(values["complete"])
    return UsageRecord(**values)


def encode_record(record: UsageRecord) -> bytes:
    """A running task's record, for its hold."""
    return to_json(record)


def decode_record(text: bytes) -> UsageRecord:
    """The record that `written` wrote."""
    return UsageRecord(**from_json(text))
