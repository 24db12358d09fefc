"""Converts credits between microcredits (integers, used everywhere inside Pomelo) and decimal text."""

from __future__ import annotations

import re

MICROS = 1_000_000
"""Microcredits in a credit."""

MAX_CREDITS = 1_000_000_000
"""Maximum number of credits in a text or in one grant."""

MAX_TOTAL_CREDITS = 9 * MAX_CREDITS
"""Maximum total of grants to an account in one mode: sums stay exact in every store, also as doubles."""

_TEXT = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,6}))?")


def format_credits(micros: int) -> str:
    """Returns credits as the shortest decimal text, such as 12.5; it is also a valid JSON number."""
    whole, fraction = divmod(abs(micros), MICROS)
    text = f"{whole}.{fraction:06}".rstrip("0").rstrip(".")
    return f"-{text}" if micros < 0 else text


def parse_credits(text: str) -> int:
    """Returns the microcredits of decimal text from 0 to MAX_CREDITS, with at most 6 decimal places.

    Raises:
        ValueError: the text is not such a number.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a number of credits such as 10 or 2.5, of at most 6 places")
    micros = int(match[1]) * MICROS + int((match[2] or "").ljust(6, "0"))
    if micros > MAX_CREDITS * MICROS:
        raise ValueError(f"{text} is more than {MAX_CREDITS:,} credits")
    return micros
