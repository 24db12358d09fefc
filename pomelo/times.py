"""Times as they are kept (Unix seconds, a double) and as they travel (google.protobuf.Timestamp)."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime

from google.protobuf.timestamp_pb2 import Timestamp

FIRST, LAST = -62_135_596_800, 253_402_300_799
"""Unix seconds of the years 1 to 9999, which a Timestamp can tell."""


def today_utc() -> date:
    """The date in UTC."""
    return datetime.now(UTC).date()


def to_timestamp(at: float) -> Timestamp:
    """A time as it travels, in whole milliseconds: a double has no more to tell."""
    part, whole = math.modf(at)
    return Timestamp(seconds=int(whole), nanos=int(part * 1000) * 1_000_000)


def from_timestamp(at: Timestamp) -> float:
    """A time as it is kept.

    Raises:
        ValueError: it is none.
    """
    if not FIRST <= at.seconds <= LAST or not 0 <= at.nanos < 1_000_000_000:
        raise ValueError("a time of the years 1 to 9999")
    return at.seconds + at.nanos / 1e9
