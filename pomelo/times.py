"""Converts times between Unix seconds (as stored) and google.protobuf.Timestamp (as sent)."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime

from google.protobuf.timestamp_pb2 import Timestamp

MIN_SECONDS, MAX_SECONDS = -62_135_596_800, 253_402_300_799
"""Unix seconds of the years 1 to 9999, the range of a Timestamp."""


def today_utc() -> date:
    """Returns the current date in UTC."""
    return datetime.now(UTC).date()


def to_timestamp(at: float) -> Timestamp:
    """Returns the Timestamp of Unix seconds, in whole milliseconds: a double is not reliably more precise."""
    fraction, whole = math.modf(at)
    return Timestamp(seconds=int(whole), nanos=int(fraction * 1000) * 1_000_000)


def from_timestamp(at: Timestamp) -> float:
    """Returns the Unix seconds of a Timestamp.

    Raises:
        ValueError: it is out of range.
    """
    if not MIN_SECONDS <= at.seconds <= MAX_SECONDS or not 0 <= at.nanos < 1_000_000_000:
        raise ValueError("a time of the years 1 to 9999")
    return at.seconds + at.nanos / 1e9
