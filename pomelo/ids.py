"""Ids that sort by time and can't be guessed."""

from __future__ import annotations

import os
import time
from functools import lru_cache

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]

_BASE_32 = str.maketrans(_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
"""Our digits -> those of `int`."""

_RANDOM_DIGITS = 16
"""Of each id: 80 bits."""

_BATCH = 256
_TO_DIGITS = bytes(ord(_ALPHABET[byte & 31]) for byte in range(256))
"""A random byte -> a random digit."""

_random: list[str] = []
"""Random digits of later ids: asking the system for those of each id takes longer than making an id."""

os.register_at_fork(after_in_child=_random.clear)  # else parent and child would make the same ids


def new_id(prefix: str) -> str:
    """Returns a new id: `prefix` and 26 characters, which encode 48 bits of Unix milliseconds and 80 random
    bits.

    Later ids sort after earlier ones, except within a millisecond. Thread-safe.
    """
    try:
        digits = _random.pop()
    except IndexError:
        digits = _random_digits()
    now = time.time_ns() // 1_000_000
    return f"{prefix}{_high_digits(now >> 20)}{_PAIRS[now >> 10 & 1023]}{_PAIRS[now & 1023]}{digits}"


@lru_cache(maxsize=2)
def _high_digits(high: int) -> str:
    """Returns the digits of the higher 30 of 50 bits; they change every 17 minutes."""
    return _PAIRS[high >> 20] + _PAIRS[high >> 10 & 1023] + _PAIRS[high & 1023]


def id_time(text: str) -> float:
    """Returns the Unix time in seconds in an id without its prefix, as `new_id` made it.

    Raises:
        ValueError: it is not an id.
    """
    return int(text[:10].translate(_BASE_32), 32) / 1000


def _random_digits() -> str:
    digits = os.urandom(_RANDOM_DIGITS * _BATCH).translate(_TO_DIGITS).decode()
    first, *others = [digits[at : at + _RANDOM_DIGITS] for at in range(0, len(digits), _RANDOM_DIGITS)]
    _random.extend(others)
    return first
