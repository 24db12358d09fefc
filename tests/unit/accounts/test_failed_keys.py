"""Failed keys by address: their limit, its window, and bounded memory."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.failed_keys import LIMIT, MAX_ADDRESSES, WINDOW, FailedKeys
from pomelo.network.origin import network
from tests.unit.clock import Clock


def test_twenty_failures_a_minute_are_within_the_limit(clock: Clock) -> None:
    failed = FailedKeys(monotonic=clock)
    for minute in range(3):
        clock.now = 1_000.0 + minute * WINDOW
        assert [failed.count("192.0.2.1", "bad") for _ in range(LIMIT)] == [None] * LIMIT == [None] * 20
        assert failed.count("192.0.2.1", "bad") == 60
        clock.now += 20.5
        assert failed.count("192.0.2.1", None) == 40
        clock.now += 39.4
        assert failed.count("192.0.2.1", "bad") == 1


def test_failures_above_the_limit_do_not_make_the_wait_longer(clock: Clock) -> None:
    failed = FailedKeys(monotonic=clock)
    for second in range(60):
        clock.now = 1_000.0 + second
        failed.count("192.0.2.1", "bad")
    clock.now = 1_060.0
    assert failed.count("192.0.2.1", "bad") is None


def test_addresses_are_counted_separately() -> None:
    failed = FailedKeys(limit=1)
    assert failed.count("192.0.2.1", "bad") is None
    assert failed.count("192.0.2.1", "bad")
    assert failed.count("192.0.2.2", "bad") is None


def test_the_hosts_of_an_ipv6_network_count_as_one() -> None:
    failed = FailedKeys(limit=1)
    assert failed.count("2001:db8:0:1::1", "bad") is None
    assert failed.count("2001:db8:0:1:ffff:ffff:ffff:ffff", "bad")
    assert failed.count("2001:0db8:0000:0001:0000:0000:0000:0002", "bad")
    assert failed.count("2001:db8:0:2::1", "bad") is None


@pytest.mark.parametrize(
    ("first", "second"),
    [("::ffff:192.0.2.1", "192.0.2.1"), ("fe80::1%eth0", "fe80::2%eth1"), ("::ffff:c000:201", "192.0.2.1")],
)
def test_two_spellings_of_an_address_count_as_one(first: str, second: str) -> None:
    assert network(first) == network(second)
    assert network(first) != network("192.0.2.9")


def test_a_unix_socket_has_no_limit() -> None:
    failed = FailedKeys(limit=0)
    assert failed.count("", "bad") is None
    assert not failed._failures
    assert not failed.is_repeated("", "bad")


def test_only_the_last_failed_key_of_an_address_above_its_limit_is_repeated_within_the_window(
    clock: Clock,
) -> None:
    failed = FailedKeys(limit=2, monotonic=clock)
    failed.count("192.0.2.1", "bad")
    assert not failed.is_repeated("192.0.2.1", "bad")
    failed.count("192.0.2.1", "bad")
    assert failed.is_repeated("192.0.2.1", "bad")
    assert not failed.is_repeated("192.0.2.1", "another")
    assert not failed.is_repeated("192.0.2.2", "bad")
    failed.count("192.0.2.1", None)  # a call without a key
    assert not failed.is_repeated("192.0.2.1", "")
    assert not failed.is_repeated("192.0.2.1", "bad")
    failed.count("192.0.2.1", "bad")
    clock.now += WINDOW
    assert not failed.is_repeated("192.0.2.1", "bad")


def test_memory_and_time_are_bounded_for_any_number_of_addresses() -> None:
    failed = FailedKeys()
    began = time.process_time()
    for number in range(3 * MAX_ADDRESSES):
        failed.count(f"2001:db8:{number >> 8:x}:{number & 255:x}::1", "bad" * 100)
    assert len(failed._failures) == MAX_ADDRESSES
    assert time.process_time() - began < 5


def test_an_address_that_keeps_failing_is_not_replaced_by_new_ones() -> None:
    failed = FailedKeys(limit=1, max_addresses=2)
    failed.count("192.0.2.1", "bad")
    for number in range(10):
        failed.count(f"198.51.100.{number}", "bad")
        assert failed.count("192.0.2.1", "bad")


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_address_and_any_key_is_accepted(address: str, key: str) -> None:
    failed = FailedKeys(limit=0)
    assert (failed.count(address, key) is None) == (address == "")
    assert failed.is_repeated(address, key) == (address != "")
