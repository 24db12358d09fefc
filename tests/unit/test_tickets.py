"""Tickets of calls in flight: the bytes of several reservations, and the default limits."""

from __future__ import annotations

import pytest

from pomelo.errors import PomeloError
from pomelo.in_flight import MIB, InFlight, InFlightLimits


def test_a_closed_ticket_releases_all_its_reservations() -> None:
    in_flight = InFlight()
    other = in_flight.enter("one")
    other.reserve(1)
    ticket = in_flight.enter("one")
    ticket.reserve(10)
    ticket.reserve(20)
    assert (ticket.size, in_flight.bytes) == (30, 31)
    ticket.close()
    assert (in_flight.calls, in_flight.bytes) == (1, 1)
    other.close()
    assert (in_flight.calls, in_flight.bytes) == (0, 0)


def test_exactly_the_limits_of_bytes_are_reserved() -> None:
    in_flight = InFlight(InFlightLimits(bytes=100, account_bytes=60))
    one, two = in_flight.enter("one"), in_flight.enter("two")
    one.reserve(60)
    two.reserve(40)
    for ticket in (one, two):
        with pytest.raises(PomeloError) as refused:
            ticket.reserve(1)
        assert refused.value.code == "overloaded"
    assert in_flight.bytes == 100


def test_by_default_an_account_has_a_quarter_of_the_bytes_and_half_of_the_calls() -> None:
    limits = InFlight().limits
    assert (limits.bytes, limits.account_bytes) == (512 * MIB, 128 * MIB)
    assert (limits.calls, limits.account_calls) == (2_000, 1_000)
