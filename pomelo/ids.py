"""Ids that sort by time and can't be guessed."""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]

_BASE_32 = str.maketrans(_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
"""Our digits -> those of `int`."""

_BATCH = 256
_random: list[int] = []
"""Random numbers of 80 bits for later ids: asking the system for each one takes longer than making an id."""

os.register_at_fork(after_in_child=_random.clear)  # else parent and child would make the same ids


def new_id(prefix: str) -> str:
    """Returns a new id: `prefix` and 26 characters, which encode 48 bits of Unix milliseconds and 80 random
    bits.

    Later ids sort after earlier ones, except within a millisecond. Thread-safe.
    """
    try:
        number = _random.pop()
    except IndexError:
        number = _random_bits()
    high = (time.time_ns() // 1_000_000) << 20 | number >> 60  # of 130 bits the higher 70
    low = number & (1 << 60) - 1
    pairs = _PAIRS
    return (
        f"{prefix}{pairs[high >> 60]}{pairs[high >> 50 & 1023]}{pairs[high >> 40 & 1023]}"
        f"{pairs[high >> 30 & 1023]}{pairs[high >> 20 & 1023]}{pairs[high >> 10 & 1023]}{pairs[high & 1023]}"
        f"{pairs[low >> 50]}{pairs[low >> 40 & 1023]}{pairs[low >> 30 & 1023]}{pairs[low >> 20 & 1023]}"
        f"{pairs[low >> 10 & 1023]}{pairs[low & 1023]}"
    )


def id_time(text: str) -> float:
    """Returns the Unix time in seconds in an id without its prefix, as `new_id` made it.

    Raises:
        ValueError: it is not an id.
    """
    return int(text[:10].translate(_BASE_32), 32) / 1000


def _random_bits() -> int:
    data = os.urandom(10 * _BATCH)
    first, *others = [int.from_bytes(data[at : at + 10], "big") for at in range(0, len(data), 10)]
    _random.extend(others)
    return first
