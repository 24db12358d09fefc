"""The encodings of usage records that all stores share: a row, JSON, and the position of a page."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any

from pydantic_core import from_json, to_json

from pomelo.stores.usage import Dimension, UsageRecord, UsageTotal

_NAMES = tuple(field.name for field in fields(UsageRecord))
_BOOLEANS = tuple(field.name for field in fields(UsageRecord) if field.type == "bool")
_POSITION = struct.Struct(">dq")
_WITHOUT_CODE = {"code"}

COLUMNS = ", ".join(f'"{name}"' for name in _NAMES)
"""The columns of a usage table, in the order of `values` and `from_row`. Quoted: `user` is a word of SQL."""

PLACEHOLDERS = ", ".join("?" * len(_NAMES))
"""A question mark for each of COLUMNS."""

SUMMED = tuple(field.name for field in fields(UsageTotal))[2:]
"""The columns that a UsageTotal sums up, in its order."""

DIMENSIONS: dict[Dimension, str] = {
    "model": "model",
    "key": "key_id",
    "account": "account",
    "user": '"user"',
    "task_type": "task_type",
    "provider": "provider",
    "mode": "CASE WHEN live THEN 'live' ELSE 'test' END",
    "protocol": "wire",
    "code": "code",
}
"""SQL expressions of the dimensions. Each database has its own of a day."""

OUTCOMES = {
    False: "(code = '' OR cost > 0 OR uncollected > 0)",
    True: "code <> ''",
}
"""SQL conditions of the records that a query selects with `failed` and without it."""

values = attrgetter(*_NAMES)
"""The values of a record, in the order of COLUMNS."""


def from_row(row: Iterable[Any]) -> UsageRecord:
    """Builds a record from a row of COLUMNS."""
    record = dict(zip(_NAMES, row, strict=True))
    for name in _BOOLEANS:
        record[name] = bool(record[name])
    return UsageRecord(**record)


def encode_record(record: UsageRecord) -> bytes:
    """The record as JSON, without a `code` that is empty: the version before can't read one."""
    return to_json(record) if record.code else to_json(record, exclude=_WITHOUT_CODE)


def decode_record(text: bytes) -> UsageRecord:
    """Reverses `encode_record`. A column that is newer than the text has its default."""
    return UsageRecord(**from_json(text))


def encode_position(at: float, row: int) -> str:
    """The end of a page of records as text: the time and row number of its last record."""
    return _POSITION.pack(at, row).hex()


def decode_position(text: str) -> tuple[float, int]:
    """Reverses `encode_position`.

    Raises:
        ValueError: the text is not a position.
    """
    try:
        packed = bytes.fromhex(text)
        at, row = _POSITION.unpack(packed)
    except (ValueError, struct.error):
        packed, at, row = b"", math.nan, 0
    if math.isnan(at) or packed.hex() != text:
        raise ValueError("after must be a value that an earlier page returned")
    return at, row
