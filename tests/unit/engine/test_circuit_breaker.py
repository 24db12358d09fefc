"""The circuit breaker of a route, on a clock that the test sets."""

from __future__ import annotations

import logging

import pytest

from pomelo.engine.circuit_breaker import (
    MINIMUM_CALLS,
    PROBE_WAIT,
    PROBE_WAIT_MAX,
    CircuitBreaker,
    State,
)
from tests.unit.engine.traffic import DOWN, Traffic, open_route


@pytest.mark.parametrize("poison", [1.0, 20.0, 500.0])
@pytest.mark.parametrize("good", [0.5, 5.0, 50.0])
def test_the_failing_inputs_of_one_account_block_only_that_account(poison: float, good: float) -> None:
    traffic = Traffic(healthy=lambda account: account == "good")
    traffic.run(60, {"poison": poison, "good": good})
    assert traffic.share("good") == 1.0
    assert traffic.account_state("poison") is not State.CLOSED
    assert traffic.passed["poison"] <= MINIMUM_CALLS + 5 + 60 / PROBE_WAIT_MAX


def test_a_single_failure_beside_those_of_one_account_does_not_open_the_route() -> None:
    traffic = Traffic(healthy=lambda account: False)
    traffic.run(2, {"poison": 100})
    traffic.call("other")
    assert traffic.state() is State.CLOSED


@pytest.mark.parametrize(
    "rates",
    [{"a": 4.0, "b": 4.0}, {"a": 300.0, "b": 5.0}, {f"account {n}": 1.0 for n in range(50)}],
    ids=["two quiet accounts", "a busy one and a quiet one", "fifty"],
)
def test_a_vendor_that_goes_down_is_blocked_within_two_seconds_and_used_again_later(
    rates: dict[str, float],
) -> None:
    traffic = Traffic()
    traffic.run(30, rates)
    assert not traffic.refused
    traffic.healthy = lambda account: False
    traffic.run(2, rates)
    assert traffic.state() is not State.CLOSED
    traffic.reset_counts()
    traffic.run(60, rates)
    assert sum(traffic.passed.values()) <= 60 / PROBE_WAIT + 1
    traffic.healthy = lambda account: True
    traffic.run(PROBE_WAIT_MAX + 1, rates)
    assert traffic.state() is State.CLOSED
    traffic.reset_counts()
    traffic.run(5, rates)
    assert not traffic.refused, "the first success admits every account that was served before"


def test_one_failure_in_ten_calls_opens_no_circuit() -> None:
    traffic = Traffic()
    numbers = iter(range(10**6))
    traffic.healthy = lambda account: next(numbers) % 10 != 0
    traffic.run(30, {f"account {n}": 20.0 for n in range(5)})
    assert not traffic.refused


def test_one_failure_in_two_calls_opens_no_circuit() -> None:
    traffic = Traffic()
    numbers = {f"account {n}": iter(range(10**6)) for n in range(3)}
    traffic.healthy = lambda account: next(numbers[account]) % 2 == 0
    traffic.run(30, dict.fromkeys(numbers, 50.0))
    assert not traffic.refused


def test_several_failing_accounts_do_not_outvote_those_that_succeed() -> None:
    traffic = Traffic(healthy=lambda account: account.startswith("good"))
    good = {f"good {n}": 5.0 for n in range(2)}
    traffic.run(1, good)
    traffic.run(60, good | {f"poison {n}": 100.0 for n in range(6)})
    assert traffic.share("good 0") == traffic.share("good 1") == 1.0


def test_accounts_that_open_the_route_do_not_keep_it_open() -> None:
    traffic = Traffic(healthy=lambda account: account == "good")
    traffic.run(10, {"poison 1": 50.0, "poison 2": 50.0})
    assert traffic.state() is not State.CLOSED
    traffic.run(10, {"poison 1": 50.0, "poison 2": 50.0, "good": 2.0})
    traffic.reset_counts()
    traffic.run(60, {"poison 1": 50.0, "poison 2": 50.0, "good": 2.0})
    assert traffic.share("good") == 1.0


def vote(rate: float, gap: int) -> State:
    """Returns the state of a route after two accounts failed once each, and once more after `gap` buckets
    of successful calls."""
    traffic = Traffic(CircuitBreaker(failure_rate=rate), lambda account: account == "good")
    for _ in range(2):
        traffic.call("a")
        traffic.call("b")
        for _ in range(gap if traffic.passed.get("good", 0) == 0 else 0):
            for _ in range(3):
                traffic.call("good")
            traffic.now += 0.6
    return traffic.breaker.state


def test_a_vote_counts_failures_of_this_bucket_and_the_previous_one_and_no_older_ones() -> None:
    assert vote(0.6, gap=1) is State.OPEN
    assert vote(0.7, gap=1) is State.CLOSED
    assert vote(0.6, gap=3) is State.CLOSED


def test_an_account_that_was_dropped_does_not_vote_twice() -> None:
    traffic = Traffic(CircuitBreaker(max_accounts=1, failure_rate=0.5), lambda account: account == "good")
    for account in ("poison", "poison", "good") * 10:
        traffic.call(account)
    assert traffic.state() is State.CLOSED


def test_a_route_that_closes_starts_without_old_outcomes() -> None:
    traffic = Traffic(healthy=lambda account: account == "good")
    for account, calls in {"good": 1, "a": MINIMUM_CALLS - 1, "b": 2, "c": 2, "d": 2}.items():
        for _ in range(calls):
            traffic.call(account)
    assert traffic.state() is State.OPEN
    traffic.now += PROBE_WAIT
    assert traffic.call("good")
    for account in ("a", "b"):
        traffic.call(account)
        assert traffic.state() is State.CLOSED
        assert traffic.account_state(account) is State.CLOSED


def test_calls_that_were_running_when_an_accounts_circuit_opened_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    traffic = Traffic(healthy=lambda account: False)
    attempts = [traffic.breaker.acquire("a", traffic.now) for _ in range(100)]
    for attempt in attempts:
        assert attempt is not None
        traffic.breaker.failed(attempt, traffic.now, DOWN)
        traffic.breaker.release(attempt, traffic.now)
    assert len(caplog.records) == 1
    assert traffic.breaker.retry_after("a", traffic.now) == PROBE_WAIT


def test_failures_of_calls_that_started_earlier_do_not_change_an_open_route() -> None:
    traffic = Traffic()
    traffic.run(5, {"a": 20.0, "b": 20.0})
    before = [traffic.breaker.acquire(account, traffic.now) for account in ("a", "b") * 20]
    traffic.healthy = lambda account: False
    traffic.run(2, {"a": 20.0, "b": 20.0})
    assert traffic.state() is not State.CLOSED
    traffic.now += PROBE_WAIT_MAX
    traffic.healthy = lambda account: True
    probe = traffic.breaker.acquire("c", traffic.now)
    assert probe is not None
    for attempt in before:
        assert attempt is not None
        traffic.breaker.failed(attempt, traffic.now, DOWN)
    assert traffic.state() is State.HALF_OPEN
    traffic.breaker.succeeded(probe, traffic.now)
    assert traffic.state() is State.CLOSED
    assert traffic.call("a")
    assert traffic.call("b")


def test_old_failures_are_forgotten() -> None:
    traffic = Traffic(healthy=lambda account: False)
    for _ in range(MINIMUM_CALLS - 1):
        traffic.call("a")
    traffic.now += 120
    traffic.call("a")
    assert traffic.account_state("a") is State.CLOSED


def test_ten_failures_a_minute_open_the_circuit_and_one_a_minute_does_not() -> None:
    for gap, state in ((61.0, State.CLOSED), (6.0, State.OPEN)):
        traffic = Traffic(healthy=lambda account: False)
        for _ in range(MINIMUM_CALLS + 3):
            traffic.call("a")
            traffic.now += gap
            if traffic.account_state("a") is not State.CLOSED:
                break
        assert traffic.account_state("a") is state


def test_fewer_calls_than_the_minimum_open_no_circuit() -> None:
    traffic = Traffic(CircuitBreaker(minimum_calls=20), lambda account: False)
    for _ in range(9):
        traffic.call("a")
        traffic.call("b")
    assert not traffic.refused
    for _ in range(4):
        traffic.call("a")
        traffic.call("b")
    assert traffic.state() is State.OPEN


def test_a_circuit_opens_at_exactly_the_failure_rate() -> None:
    for failures, state in ((3, State.CLOSED), (4, State.OPEN)):
        traffic = Traffic(CircuitBreaker(failure_rate=0.8, minimum_calls=5))
        for number in range(5):
            traffic.healthy = lambda account, served=number < 5 - failures: served  # type: ignore[misc]
            traffic.call("a")
        assert traffic.account_state("a") is state


def test_a_route_opens_at_exactly_the_minimum_of_calls() -> None:
    traffic = Traffic(CircuitBreaker(minimum_calls=5), lambda account: False)
    for account in "abab":
        traffic.call(account)
        assert traffic.state() is State.CLOSED
    traffic.call("a")
    assert traffic.state() is State.OPEN


def test_recent_failures_count_however_old_the_first_call_of_their_bucket_is() -> None:
    traffic = Traffic(CircuitBreaker(minimum_calls=5, window=60), lambda account: False)
    for pause, calls in ((0, 1), (40, 2), (21, 2)):
        traffic.now += pause
        for _ in range(calls):
            assert traffic.account_state("a") is State.CLOSED
            traffic.call("a")
    traffic.call("a")
    assert traffic.account_state("a") is State.OPEN


def test_tracked_accounts_are_limited_and_open_circuits_are_not_dropped() -> None:
    traffic = Traffic(CircuitBreaker(max_accounts=100), lambda account: account != "poison")
    for number in range(5000):
        traffic.call(f"account {number}")
        if number % 10 == 0:
            traffic.call("poison")
        traffic.now += 0.01
    assert len(traffic.breaker.account_states) == 100
    assert traffic.passed["poison"] <= MINIMUM_CALLS + 5 + 50 / PROBE_WAIT_MAX
    assert traffic.state() is State.CLOSED
    traffic.healthy = lambda account: False
    traffic.run(2, {f"account {number}": 2.0 for number in range(200)})
    assert traffic.state() is not State.CLOSED, "dropped accounts have no vote"


def test_tracked_accounts_are_limited_even_if_all_their_circuits_are_open() -> None:
    traffic = Traffic(CircuitBreaker(max_accounts=20, minimum_accounts=10**6), lambda account: False)
    for number in range(100):
        for _ in range(MINIMUM_CALLS):
            traffic.call(f"account {number}")
    assert len(traffic.breaker.account_states) == 20


def test_each_change_of_state_is_one_line_that_names_provider_and_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pomelo.engine")
    traffic = open_route("a", "b")
    traffic.now += PROBE_WAIT_MAX
    traffic.call("c")
    traffic.now += PROBE_WAIT_MAX
    traffic.healthy = lambda account: True
    traffic.call("d")
    messages = [record.getMessage() for record in caplog.records if "for account" not in record.getMessage()]
    assert [line.partition(":")[0] for line in messages] == [
        "circuit open",
        "circuit half-open",
        "circuit open",
        "circuit half-open",
        "circuit closed",
    ]
    assert all("acme, model large" in line for line in messages)
    assert DOWN in messages[0]
    assert {record.name for record in caplog.records} == {"pomelo.engine"}


def test_a_circuit_of_an_account_is_logged_when_it_opens_and_when_it_closes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pomelo.engine")
    traffic = Traffic(healthy=lambda account: False)
    traffic.run(60, {"only": 50.0})
    traffic.healthy = lambda account: True
    traffic.run(PROBE_WAIT_MAX + 1, {"only": 50.0})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert [vars(record)["fields"] for record in caplog.records] == [
        {"circuit": state, "provider": "acme", "provider_model": "large", "account": "only"}
        for state in ("open", "closed")
    ]
    assert "open" in messages[0]
    assert "closed" in messages[1]
    assert all("account only" in line and "acme, model large" in line for line in messages)
