"""Times as Unix seconds and as Timestamps, and lengths as seconds and as Durations."""

from __future__ import annotations

from decimal import Decimal
from math import inf, nan, nextafter

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from pomelo.protobuf.times import from_duration, from_timestamp, is_duration, to_duration, to_timestamp

FIRST, LAST = -62_135_596_800, 253_402_300_799
"""The years 1 to 9999."""


@pytest.mark.parametrize(
    ("at", "seconds", "nanos"),
    [(0.0, 0, 0), (1_234.5, 1_234, 500_000_000), (1_234.0019, 1_234, 1_000_000), (LAST, LAST, 0)],
)
def test_seconds_become_a_timestamp_of_whole_milliseconds(at: float, seconds: int, nanos: int) -> None:
    assert to_timestamp(at) == Timestamp(seconds=seconds, nanos=nanos)


def test_every_millisecond_is_kept() -> None:
    for millis in range(1000):
        given = Timestamp(seconds=1_764_374_399, nanos=millis * 1_000_000)
        assert to_timestamp(from_timestamp(given)) == given


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


LONGEST = 315_576_000_000
"""Seconds of 10,000 years."""


@pytest.mark.parametrize(
    ("length", "seconds", "nanos"),
    [
        (0.0, 0, 0),
        (-0.0, 0, 0),
        (2, 2, 0),
        (1.5, 1, 500_000_000),
        (0.1, 0, 100_000_000),
        (0.1 + 0.2, 0, 300_000_000),
        (1e-9, 0, 1),
        (0.4e-9, 0, 0),
        (0.6e-9, 0, 1),
        (1.999_999_999_9, 2, 0),
        (-1.5, -1, -500_000_000),
        (-0.25, 0, -250_000_000),
        (-0.4e-9, 0, 0),
        (-1.999_999_999_9, -2, 0),
        (LONGEST, LONGEST, 0),
        (-LONGEST, -LONGEST, 0),
    ],
)
def test_seconds_become_a_duration_of_whole_nanoseconds(length: float, seconds: int, nanos: int) -> None:
    assert to_duration(length) == Duration(seconds=seconds, nanos=nanos)


@pytest.mark.parametrize(
    "length", [nan, inf, -inf, nextafter(LONGEST, inf), nextafter(-LONGEST, -inf), LONGEST + 1, 1e300]
)
def test_a_length_that_no_duration_can_have_becomes_none(length: float) -> None:
    assert to_duration(length) is None


@pytest.mark.parametrize(
    ("seconds", "nanos", "length"),
    [(0, 0, 0.0), (1, 500_000_000, 1.5), (-1, -500_000_000, -1.5), (0, 1, 1e-9), (LONGEST, 0, LONGEST)],
)
def test_a_duration_becomes_seconds(seconds: int, nanos: int, length: float) -> None:
    assert from_duration(Duration(seconds=seconds, nanos=nanos)) == length


@given(st.decimals(-1_000_000, 1_000_000, places=9))
def test_a_length_prints_as_it_was_written(written: Decimal) -> None:
    duration = to_duration(float(written))
    assert duration is not None
    assert repr(from_duration(duration)) == repr(float(written) + 0.0)


@pytest.mark.parametrize("written", ["0.1", "0.7", "1.1", "3.3", "119.1", "12345.678", "0.000001"])
def test_no_length_of_a_transcript_gets_more_digits(written: str) -> None:
    duration = to_duration(float(written))
    assert duration is not None
    assert from_duration(duration) == float(written)


@pytest.mark.parametrize(
    ("seconds", "nanos", "valid"),
    [
        *[
            (0, 0, True),
            (LONGEST, 0, True),
            (-LONGEST, 0, True),
            (LONGEST + 1, 0, False),
            (-LONGEST - 1, 0, False),
        ],
        *[(1, 999_999_999, True), (0, -999_999_999, True), (1, 10**9, False), (0, -(10**9), False)],
        *[(1, 1, True), (-1, -1, True), (1, -1, False), (-1, 1, False), (0, 1, True), (0, -1, True)],
    ],
)
def test_a_duration_is_in_range_and_has_one_sign(seconds: int, nanos: int, valid: bool) -> None:
    assert is_duration(Duration(seconds=seconds, nanos=nanos)) is valid
