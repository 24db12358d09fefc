"""Calls, buffered bytes and slots are limited per owner, and calls and bytes also in total."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.runtime.in_flight import MIB, FairSemaphore, InFlight, InFlightLimits
from tests.unit.loop import iterations
from tests.unit.refusals import refused
from tests.waiting import cancel

SMALL = InFlightLimits(calls=5, account_calls=3, bytes=100, account_bytes=60)


def test_an_owner_can_not_use_the_calls_of_others() -> None:
    flight = InFlight(SMALL)
    mine = [flight.enter("a") for _ in range(3)]
    with refused("overloaded"):
        flight.enter("a")
    others = [flight.enter("b") for _ in range(2)]
    with refused("overloaded"):  # all five are taken
        flight.enter("b")
    mine[0].close()
    mine[0].close()
    others[0].close()
    flight.enter("b").close()
    for ticket in (*mine, *others):
        ticket.close()


def test_an_owner_is_alone_while_only_its_own_calls_are_in_flight() -> None:
    flight = InFlight(SMALL)
    first, second = flight.enter("a"), flight.enter("a")
    assert first.is_alone()
    other = flight.enter("b")
    assert not any(ticket.is_alone() for ticket in (first, second, other))
    first.close()
    second.close()
    assert other.is_alone()


def test_the_log_names_the_limit_that_a_call_exceeds(caplog: pytest.LogCaptureFixture) -> None:
    flight = InFlight(InFlightLimits(calls=3, account_calls=2, bytes=100, account_bytes=60, account_unread=9))
    tickets = [flight.enter("a") for _ in range(2)]
    slow = flight.enter("b")
    release = slow.hold(10)
    for owner in "abc":
        with refused("overloaded"):
            flight.enter(owner)
    tickets[0].reserve(50)
    with refused("overloaded"):
        tickets[1].reserve(20)
    assert caplog.messages == [
        "A call was refused: one caller has 2 calls in flight",
        "A call was refused: its caller has 10 bytes of responses to read",
        "A call was refused: 3 calls are in flight",
        "A call was refused: bodies of 50 bytes are buffered, 50 of them of its caller",
    ]
    assert len({record.msg for record in caplog.records}) == 4  # one does not suppress the others
    release()


def test_no_state_is_kept_of_an_owner_without_calls() -> None:
    flight = InFlight(SMALL)
    for number in range(1000):
        ticket = flight.enter(f"owner {number}")
        ticket.reserve(50)
        ticket.close()
    assert (flight.calls, flight.bytes, flight._owners) == (0, 0, {})


def test_an_owner_with_too_many_unread_bytes_starts_no_call() -> None:
    flight = InFlight(InFlightLimits(account_unread=100))
    ticket = flight.enter("a")
    releases = [ticket.hold(size) for size in (50, 50)]
    flight.enter("a").close()
    ticket.close()
    releases.append(ticket.hold(1))  # a response that is sent after its call has ended
    with refused("overloaded"):
        flight.enter("a")
    flight.enter("b").close()
    for release in releases:
        release()
    assert not flight._owners
    flight.enter("a").close()


def test_the_calls_of_an_owner_with_too_many_unread_bytes_buffer_nothing_more() -> None:
    flight = InFlight(InFlightLimits(account_unread=100))
    first, second = flight.enter("a"), flight.enter("a")
    release = first.hold(101)
    with refused("overloaded"):
        second.reserve(1)
    flight.enter("b").reserve(1)
    release()
    second.reserve(1)
    assert (second.size, flight.bytes) == (1, 2)


def test_owners_with_more_than_their_share_of_unread_bytes_start_no_call_while_all_have_too_many() -> None:
    flight = InFlight(InFlightLimits(unread=100, account_unread=80))
    tickets = {owner: flight.enter(owner) for owner in "abc"}
    releases = {owner: tickets[owner].hold(size) for owner, size in {"a": 60, "b": 30, "c": 10}.items()}
    for owner in "abcd":
        flight.enter(owner).close()
    more = tickets["c"].hold(1)
    with refused("overloaded"):
        flight.enter("a")
    for owner in "bcd":  # have at most a third
        flight.enter(owner).close()
    more()
    flight.enter("a").close()
    more = tickets["b"].hold(20)
    for owner in "ab":
        with refused("overloaded"):
            flight.enter(owner)
    releases["a"]()
    for owner in "abcd":
        flight.enter(owner).close()
    for release in (more, releases["b"], releases["c"]):
        release()
    for ticket in tickets.values():
        ticket.close()
    assert (flight.unread, flight._readers, flight._owners) == (0, 0, {})


def test_a_plan_s_concurrency_limit_bounds_its_calls_in_flight() -> None:
    flight = InFlight(InFlightLimits())
    tickets = [flight.enter("small", 2) for _ in range(64)]
    with refused("concurrency_limit_exceeded") as error:
        flight.enter("small", 2)
    assert error.value.values == {"quota": "calls_in_flight", "limit": "64"}
    tickets += [flight.enter("large", 200) for _ in range(800)]
    with refused("concurrency_limit_exceeded") as error:
        flight.enter("large", 200)
    assert error.value.values["limit"] == "800"
    tickets += [flight.enter("none") for _ in range(1000)]
    with refused("overloaded"):
        flight.enter("none")


def test_one_plan_can_not_use_all_calls_of_a_small_server() -> None:
    flight = InFlight(SMALL)
    for _ in range(3):
        flight.enter("a", 2)
    with refused("concurrency_limit_exceeded"):
        flight.enter("a", 2)


def test_a_call_that_is_closed_twice_counts_once() -> None:
    flight = InFlight(SMALL)
    first, second = flight.enter("a"), flight.enter("a")
    first.reserve(10)
    second.reserve(20)
    first.close()
    first.close()
    assert (flight.calls, flight.bytes) == (1, 20)
    second.reserve(40)
    with refused("overloaded"):
        second.reserve(1)


def test_a_refused_reservation_counts_nothing() -> None:
    flight = InFlight(SMALL)
    ticket = flight.enter("a")
    with refused("overloaded"):
        ticket.reserve(61)
    assert (ticket.size, flight.bytes) == (0, 0)
    ticket.reserve(60)


def test_buffered_bytes_are_limited_and_released() -> None:
    flight = InFlight(SMALL)
    first, second, other = flight.enter("a"), flight.enter("a"), flight.enter("b")
    first.reserve(60)
    with refused("overloaded"):
        second.reserve(1)
    other.reserve(40)
    for ticket in (first, other):
        with refused("overloaded"):
            ticket.reserve(1)
    assert flight.bytes == 100, "all are taken"
    first.close()
    assert (flight.bytes, flight.calls) == (40, 2)
    second.reserve(60)
    assert flight.bytes == 100


def test_a_closed_ticket_releases_all_its_reservations() -> None:
    flight = InFlight()
    other = flight.enter("one")
    other.reserve(1)
    ticket = flight.enter("one")
    ticket.reserve(10)
    ticket.reserve(20)
    assert (ticket.size, flight.bytes) == (30, 31)
    ticket.close()
    assert (flight.calls, flight.bytes) == (1, 1)
    other.close()
    assert (flight.calls, flight.bytes) == (0, 0)


def test_by_default_an_account_has_a_quarter_of_the_bytes_and_half_of_the_calls() -> None:
    limits = InFlight().limits
    assert (limits.bytes, limits.account_bytes) == (512 * MIB, 128 * MIB)
    assert (limits.calls, limits.account_calls) == (2_000, 1_000)


async def test_slots_are_granted_in_order_and_separately_to_each_owner() -> None:
    semaphore = FairSemaphore(2)
    order: list[int] = []

    async def wait(number: int) -> None:
        await semaphore.acquire("a")
        order.append(number)

    waiting = [asyncio.ensure_future(wait(number)) for number in range(5)]
    await iterations()
    assert order == [0, 1]
    assert not semaphore.take("a")
    assert semaphore.take("b")
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


async def waiting(semaphore: FairSemaphore, count: int) -> list[asyncio.Task[None]]:
    """Takes the only slot, and starts waiters."""
    await semaphore.acquire("a")
    waiters = [asyncio.create_task(semaphore.acquire("a")) for _ in range(count)]
    await asyncio.sleep(0)
    return waiters


async def test_a_slot_passes_by_a_waiter_that_is_cancelled_before_its_release() -> None:
    semaphore = FairSemaphore(1)
    cancelled, next_one = await waiting(semaphore, 2)
    cancelled.cancel()
    semaphore.release("a")  # the waiter has not seen its cancellation yet
    async with asyncio.timeout(20):
        await next_one
    assert cancelled.cancelled()
    assert not semaphore.take("a")


async def test_a_slot_is_free_after_its_only_waiter_was_cancelled() -> None:
    semaphore = FairSemaphore(1)
    (cancelled,) = await waiting(semaphore, 1)
    cancelled.cancel()
    semaphore.release("a")
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    async with asyncio.timeout(20):
        await semaphore.acquire("a")
    assert not semaphore.take("a")


async def test_a_cancelled_waiter_is_not_kept_in_the_queue() -> None:
    semaphore = FairSemaphore(1)
    (cancelled,) = await waiting(semaphore, 1)
    await cancel(cancelled)
    assert not semaphore._owners["a"].waiters
