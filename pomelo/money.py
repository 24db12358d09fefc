"""Credits as people read and write them: decimal text, exact to a microcredit.

Money is whole microcredits everywhere in the house; the doors and the command line turn it into text here.
"""

from __future__ import annotations

import re

MICROS = 1_000_000
"""Microcredits in a credit."""

MAX_CREDITS = 1_000_000_000
"""The most credits that can be written or given at once."""

MAX_TOTAL_CREDITS = 9 * MAX_CREDITS
"""The most credits that one side of an account is ever given: sums stay exact in any store, doubles too."""

_TEXT = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,6}))?")


def format_credits(micros: int) -> str:
    """Credits as the shortest decimal text, such as 12.5; also a number of JSON."""
    whole, part = divmod(abs(micros), MICROS)
    text = f"{whole}.{part:06}".rstrip("0").rstrip(".")
    return f"-{text}" if micros < 0 else text


def parse_credits(text: str) -> int:
    """The microcredits of decimal text from 0 to MOST, with at most 6 places.

    Raises:
        ValueError: it is none.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no number of credits, such as 10 or 2.5, with at most 6 places")
    micros = int(found[1]) * MICROS + int((found[2] or "").ljust(6, "0"))
    if micros > MAX_CREDITS * MICROS:
        raise ValueError(f"{text} is more than {MAX_CREDITS:,} credits")
    return micros
