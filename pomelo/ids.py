"""Ids that sort by time and can't be guessed."""

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """A new id: `prefix`, then 26 characters: 48 bits of Unix milliseconds, then 80 random bits.

    Later ids sort after earlier ones (within a millisecond in no order); no state, safe in threads.
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return prefix + "".join([_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5)])
