"""Converts times between seconds and google.protobuf.Timestamp and Duration."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

MIN_SECONDS, MAX_SECONDS = -62_135_596_800, 253_402_300_799
"""Unix seconds of the years 1 to 9999, the range of a Timestamp."""

MAX_DURATION = 315_576_000_000
"""Seconds of 10,000 years, the range of a Duration, which may be negative."""


def today_utc() -> date:
    """Returns the current date in UTC."""
    return datetime.now(UTC).date()


def to_timestamp(at: float) -> Timestamp:
    """Returns the Timestamp of Unix seconds, in whole milliseconds: a double is not reliably more precise."""
    seconds, millis = divmod(math.floor(at * 1000), 1000)
    return Timestamp(seconds=seconds, nanos=millis * 1_000_000)


def from_timestamp(at: Timestamp) -> float:
    """Returns the Unix seconds of a Timestamp.

    Raises:
        ValueError: it is out of range.
    """
    if not MIN_SECONDS <= at.seconds <= MAX_SECONDS or not 0 <= at.nanos < 1_000_000_000:
        raise ValueError("a time of the years 1 to 9999")
    return at.seconds + at.nanos / 1e9


def to_duration(seconds: float) -> Duration | None:
    """Returns the Duration of so many seconds, in whole nanoseconds; None if it is not finite, or out of
    range."""
    if not -MAX_DURATION <= seconds <= MAX_DURATION:  # true for NaN
        return None
    nanos = round(seconds * 1e9)
    sign = 1 if nanos >= 0 else -1
    whole, fraction = divmod(abs(nanos), 1_000_000_000)
    return Duration(seconds=sign * whole, nanos=sign * fraction)


def is_duration(length: Duration) -> bool:
    """Whether a Duration is valid: in range, and with both parts of one sign."""
    return (
        abs(length.seconds) <= MAX_DURATION
        and abs(length.nanos) < 1_000_000_000
        and length.seconds * length.nanos >= 0
    )


def from_duration(length: Duration) -> float:
    """Returns the seconds of a Duration: the nearest float, which prints as it was written."""
    return (length.seconds * 1_000_000_000 + length.nanos) / 1_000_000_000
