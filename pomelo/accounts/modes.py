"""The modes of keys, balances and records in messages."""

from __future__ import annotations

from typing import TypeVar

from pomelo.errors import invalid
from pomelo.gen.v1.usage_pb2 import Mode

T = TypeVar("T")


def to_mode(live: bool) -> Mode.ValueType:
    return Mode.MODE_LIVE if live else Mode.MODE_TEST


def is_live(mode: Mode.ValueType, default: T) -> bool | T:
    """Whether the `mode` of a request is live; `default` if it has none.

    Raises:
        PomeloError: invalid_parameter.
    """
    if mode not in Mode.values():
        raise invalid("mode", "MODE_TEST or MODE_LIVE")
    return default if mode == Mode.MODE_UNSPECIFIED else mode == Mode.MODE_LIVE
