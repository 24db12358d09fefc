"""The probes that a circuit breaker lets through while it is open."""

from __future__ import annotations

import pytest

from pomelo.engine.circuit_breaker import (
    MINIMUM_CALLS,
    PROBE_TIMEOUT,
    PROBE_WAIT,
    PROBE_WAIT_MAX,
    State,
)
from tests.unit.engine.traffic import DOWN, Traffic, open_route


def test_the_only_account_of_a_vendor_that_is_down_is_blocked_and_probes() -> None:
    traffic = Traffic(healthy=lambda account: False)
    traffic.run(60, {"only": 100})
    assert traffic.passed["only"] <= MINIMUM_CALLS + 5 + 60 / PROBE_WAIT_MAX
    assert traffic.now - traffic.last_call <= PROBE_WAIT_MAX
    traffic.healthy = lambda account: True
    traffic.run(PROBE_WAIT_MAX + 0.1, {"only": 100})
    assert traffic.account_state("only") is State.CLOSED


def test_accounts_that_were_served_before_are_admitted_with_the_first_probe_and_others_are_not() -> None:
    traffic = Traffic()
    traffic.call("served")
    traffic.now += 120
    traffic.call("good")
    traffic.healthy = lambda account: False
    for account in ("served", "never served"):
        for _ in range(MINIMUM_CALLS):
            traffic.call(account)
        assert traffic.account_state(account) is State.OPEN
    assert traffic.state() is State.CLOSED, "two of three accounts are not enough"
    for account in ("third", "fourth"):
        traffic.call(account)
        traffic.call(account)
    assert traffic.state() is State.OPEN
    traffic.now += PROBE_WAIT_MAX
    traffic.healthy = lambda account: account == "prober"
    assert traffic.call("prober")
    assert traffic.account_state("served") is State.CLOSED
    assert traffic.account_state("never served") is State.OPEN

    # It was admitted once without a probe; not served since, it needs its own probe next time.
    for account in ("served", "third", "fourth", "fifth"):
        for _ in range(MINIMUM_CALLS):
            traffic.call(account)
    assert traffic.account_state("served") is State.OPEN
    assert traffic.state() is State.OPEN
    traffic.now += PROBE_WAIT_MAX
    assert traffic.call("prober")
    assert traffic.account_state("served") is State.OPEN


def test_a_probe_that_succeeds_resets_the_wait_of_its_account() -> None:
    traffic = Traffic(healthy=lambda account: False)
    traffic.run(30, {"only": 100.0})
    assert traffic.breaker.retry_after("only", traffic.last_call) == PROBE_WAIT_MAX
    assert traffic.account_state("only") is State.OPEN
    traffic.healthy = lambda account: True
    traffic.run(PROBE_WAIT_MAX + 0.1, {"only": 100.0})
    traffic.now += 120
    traffic.healthy = lambda account: False
    for _ in range(MINIMUM_CALLS):
        traffic.call("only")
    assert traffic.breaker.retry_after("only", traffic.now) == PROBE_WAIT
    assert not traffic.call("only")


def test_failures_before_a_probe_that_succeeded_no_longer_count() -> None:
    traffic = Traffic(healthy=lambda account: False)
    for _ in range(MINIMUM_CALLS):
        traffic.call("only")
    traffic.now += PROBE_WAIT
    traffic.healthy = lambda account: True
    assert traffic.call("only")
    traffic.healthy = lambda account: False
    for _ in range(MINIMUM_CALLS - 2):
        traffic.call("only")
        assert traffic.account_state("only") is State.CLOSED
    traffic.call("only")
    assert traffic.account_state("only") is State.OPEN


def test_an_account_whose_probe_succeeded_can_probe_the_next_time_the_route_opens() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT
    traffic.healthy = lambda account: account == "c"
    assert traffic.call("c")
    for account in ("a", "b", "d", "e"):
        traffic.call(account)
        traffic.call(account)
    assert traffic.state() is State.OPEN
    assert traffic.breaker.retry_after("c", traffic.now) == PROBE_WAIT


def test_an_open_route_admits_one_probe_at_a_time() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    first = traffic.breaker.acquire("c", traffic.now)
    assert first is not None
    assert traffic.state() is State.HALF_OPEN
    assert traffic.breaker.acquire("d", traffic.now) is None
    assert traffic.breaker.retry_after("d", traffic.now) == PROBE_TIMEOUT
    traffic.breaker.succeeded(first, traffic.now)
    assert traffic.state() is State.CLOSED
    assert traffic.breaker.acquire("d", traffic.now) is not None


def test_a_failed_probe_reopens_the_route() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    assert not traffic.call("c")
    assert traffic.passed["c"] == 1
    assert traffic.state() is State.OPEN
    assert traffic.breaker.acquire("d", traffic.now) is None
    assert 0 < traffic.breaker.retry_after("d", traffic.now) <= PROBE_WAIT_MAX


def test_a_probe_whose_caller_disconnects_allows_a_probe_of_another_account() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    probe = traffic.breaker.acquire("c", traffic.now)
    assert probe is not None
    traffic.breaker.release(probe, traffic.now)
    assert traffic.state() is State.OPEN
    assert traffic.breaker.acquire("c", traffic.now) is None, (
        "a caller that disconnects waits for its next probe"
    )
    assert traffic.breaker.acquire("d", traffic.now) is not None


def test_a_caller_that_aborts_every_probe_does_not_probe_forever() -> None:
    traffic = open_route("a", "b")
    probes = 0
    for _ in range(6000):
        attempt = traffic.breaker.acquire("a", traffic.now)
        if attempt is not None:
            probes += 1
            traffic.breaker.release(attempt, traffic.now)
        traffic.now += 0.01
    assert 60 / PROBE_WAIT_MAX - 1 <= probes <= 60 / PROBE_WAIT_MAX + 5


@pytest.mark.parametrize("accounts", [("a",), ("a", "b")], ids=["the account's circuit", "the route's"])
def test_a_probe_that_never_ends_does_not_block_others_forever(accounts: tuple[str, ...]) -> None:
    traffic = Traffic(healthy=lambda account: False)
    traffic.run(3, dict.fromkeys(accounts, 20.0))
    traffic.now += PROBE_WAIT_MAX
    hanging = traffic.breaker.acquire("a", traffic.now)
    assert hanging is not None
    traffic.healthy = lambda account: True
    traffic.reset_counts()
    began = traffic.now
    while not traffic.passed:
        traffic.run(0.01, dict.fromkeys(accounts, 100.0))
    assert PROBE_TIMEOUT <= traffic.last_call - began <= 15
    traffic.run(PROBE_WAIT_MAX, dict.fromkeys(accounts, 100.0))
    assert traffic.state() is State.CLOSED
    assert traffic.account_state("a") is State.CLOSED
    traffic.breaker.failed(hanging, traffic.now, DOWN)
    traffic.breaker.release(hanging, traffic.now)
    traffic.reset_counts()
    traffic.run(1, dict.fromkeys(accounts, 20.0))
    assert not traffic.refused, "an expired probe has no effect"


def test_after_a_probe_hangs_another_account_probes_next() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    assert traffic.breaker.acquire("hanging", traffic.now) is not None
    traffic.now += PROBE_TIMEOUT
    assert traffic.breaker.acquire("hanging", traffic.now) is None
    assert traffic.breaker.acquire("other", traffic.now) is not None


def test_a_hanging_probe_that_succeeds_late_closes_the_route() -> None:
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    late = traffic.breaker.acquire("a", traffic.now)
    assert late is not None
    traffic.now += PROBE_TIMEOUT + PROBE_WAIT_MAX
    assert traffic.breaker.acquire("b", traffic.now) is not None
    traffic.breaker.succeeded(late, traffic.now)
    assert traffic.state() is State.CLOSED
