"""Ids that sort by time and can't be guessed."""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_SHIFTS = range(120, -1, -10)


def new_id(prefix: str) -> str:
    """Returns a new id: `prefix` and 26 characters, which encode 48 bits of Unix milliseconds and 80 random
    bits.

    Later ids sort after earlier ones, except within a millisecond. Thread-safe.
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    pairs = _PAIRS
    return prefix + "".join([pairs[value >> shift & 1023] for shift in _SHIFTS])
