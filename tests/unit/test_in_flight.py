"""Calls and buffered bytes are limited per owner and in total."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.errors import PomeloError
from pomelo.in_flight import FairSemaphore, InFlight, InFlightLimits
from tests.unit.loop import iterations

SMALL = InFlightLimits(calls=5, account_calls=3, bytes=100, account_bytes=60)


def refused(work: object, *args: object) -> str:
    with pytest.raises(PomeloError) as caught:
        work(*args)  # type: ignore[operator]
    return caught.value.code


def test_an_owner_can_not_use_the_calls_of_others() -> None:
    flight = InFlight(SMALL)
    mine = [flight.enter("a") for _ in range(3)]
    assert refused(flight.enter, "a") == "overloaded"
    others = [flight.enter("b") for _ in range(2)]
    assert refused(flight.enter, "b") == "overloaded", "all five are taken"
    mine[0].close()
    mine[0].close()
    others[0].close()
    flight.enter("b").close()
    for ticket in (*mine, *others):
        ticket.close()


def test_no_state_is_kept_of_an_owner_without_calls() -> None:
    flight = InFlight(SMALL)
    for number in range(1000):
        ticket = flight.enter(f"owner {number}")
        ticket.reserve(50)
        ticket.close()
    assert (flight.calls, flight.bytes, flight._owners) == (0, 0, {})


def test_a_plan_s_concurrency_limit_bounds_its_calls_in_flight() -> None:
    flight = InFlight(InFlightLimits())
    tickets = [flight.enter("small", 2) for _ in range(64)]
    assert refused(flight.enter, "small", 2) == "concurrency_limit_exceeded"
    tickets += [flight.enter("large", 200) for _ in range(800)]
    assert refused(flight.enter, "large", 200) == "concurrency_limit_exceeded"
    tickets += [flight.enter("none") for _ in range(1000)]
    assert refused(flight.enter, "none") == "overloaded"


def test_one_plan_can_not_use_all_calls_of_a_small_server() -> None:
    flight = InFlight(SMALL)
    for _ in range(3):
        flight.enter("a", 2)
    assert refused(flight.enter, "a", 2) == "concurrency_limit_exceeded"


def test_a_call_that_is_closed_twice_counts_once() -> None:
    flight = InFlight(SMALL)
    first, second = flight.enter("a"), flight.enter("a")
    first.reserve(10)
    second.reserve(20)
    first.close()
    first.close()
    assert (flight.calls, flight.bytes) == (1, 20)
    second.reserve(40)
    assert refused(second.reserve, 1) == "overloaded"


def test_a_refused_reservation_counts_nothing() -> None:
    flight = InFlight(SMALL)
    ticket = flight.enter("a")
    assert refused(ticket.reserve, 61) == "overloaded"
    assert (ticket.size, flight.bytes) == (0, 0)
    ticket.reserve(60)


def test_buffered_bytes_are_limited_and_released() -> None:
    flight = InFlight(SMALL)
    first, second, other = flight.enter("a"), flight.enter("a"), flight.enter("b")
    first.reserve(60)
    assert refused(second.reserve, 1) == "overloaded"
    other.reserve(40)
    assert refused(other.reserve, 1) == "overloaded", "of all together"
    first.close()
    assert (flight.bytes, flight.calls) == (40, 2)
    second.reserve(60)
    assert flight.bytes == 100


async def test_slots_are_granted_in_order_and_separately_to_each_owner() -> None:
    semaphore = FairSemaphore(2)
    order: list[int] = []

    async def wait(number: int) -> None:
        await semaphore.acquire("a")
        order.append(number)

    waiting = [asyncio.ensure_future(wait(number)) for number in range(5)]
    await iterations()
    assert order == [0, 1]
    assert semaphore.full("a")
    assert not semaphore.full("b")
    await semaphore.acquire("b")
    semaphore.release("b")
    for number in range(2, 5):
        semaphore.release("a")
        await iterations()
        assert order[-1] == number
    await asyncio.gather(*waiting)
    semaphore.release("a")
    semaphore.release("a")
    assert semaphore._owners == {}


async def test_a_cancelled_waiter_blocks_no_other() -> None:
    semaphore = FairSemaphore(1)
    await semaphore.acquire("a")
    waiting = [asyncio.ensure_future(semaphore.acquire("a")) for _ in range(3)]
    await iterations()
    waiting[0].cancel()
    await iterations()
    semaphore.release("a")
    waiting[1].cancel()  # its slot was granted in this iteration
    await iterations()
    assert [future.cancelled() for future in waiting[:2]] == [True, True]
    await waiting[2]
    semaphore.release("a")
    assert semaphore._owners == {}
