"""Times as Unix seconds and as Timestamps."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.times import from_timestamp, to_timestamp

FIRST, LAST = -62_135_596_800, 253_402_300_799
"""The years 1 to 9999."""


@pytest.mark.parametrize(
    ("at", "seconds", "nanos"),
    [(0.0, 0, 0), (1_234.5, 1_234, 500_000_000), (1_234.0019, 1_234, 1_000_000), (LAST, LAST, 0)],
)
def test_seconds_become_a_timestamp_of_whole_milliseconds(at: float, seconds: int, nanos: int) -> None:
    assert to_timestamp(at) == Timestamp(seconds=seconds, nanos=nanos)


@pytest.mark.parametrize(
    ("seconds", "nanos", "at"),
    [(1_234, 500_000_000, 1_234.5), (FIRST, 0, FIRST), (LAST, 0, LAST), (5, 999_999_999, 5.999999999)],
)
def test_a_timestamp_becomes_seconds(seconds: int, nanos: int, at: float) -> None:
    assert from_timestamp(Timestamp(seconds=seconds, nanos=nanos)) == at


@pytest.mark.parametrize(("seconds", "nanos"), [(FIRST - 1, 0), (LAST + 1, 0), (0, -1), (0, 10**9)])
def test_a_time_out_of_range_is_refused(seconds: int, nanos: int) -> None:
    with pytest.raises(ValueError, match="years 1 to 9999"):
        from_timestamp(Timestamp(seconds=seconds, nanos=nanos))
