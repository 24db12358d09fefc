"""Checks that several kinds share: numbers in a range, lengths, enum values.

Each raises `PomeloError` (missing_parameter, invalid_parameter, context_length_exceeded) naming the field.
"""

from __future__ import annotations

from typing import Any

from pomelo.errors import PomeloError, invalid, missing

MAX_SEED = 2**53 - 1


def within(message: Any, field: str, least: float, most: float, name: str = "") -> None:
    """An optional number of `message` must be from `least` to `most`; absent is fine, NaN is not."""
    if message.HasField(field) and not least <= getattr(message, field) <= most:
        raise invalid(name or field, f"a number from {least:,} to {most:,}")


def known(message: Any, field: str, enum: Any) -> None:
    """An enum field must have a value of the contract (proto3 lets any number through)."""
    if getattr(message, field) not in enum.values():
        raise invalid(field, "one of the documented values")


def filled(message: Any, field: str, most: int) -> None:
    """A required text must be there and have at most `most` characters."""
    text = getattr(message, field)
    if not text:
        raise missing(field)
    if len(text) > most:
        raise PomeloError(
            "context_length_exceeded",
            f"{field} is longer than the {most:,} characters that the model takes. Shorten it",
            field=field,
        )
