"""Limits that Pomelo does not have: every store counts them without knowing them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from pomelo.stores.base import Store
from pomelo.stores.ledger import Count, Counter, LimitStatus, Refused, Reserved, ReserveRequest, Settlement
from tests.contract.ledger_rig import WALLET, Clock, Rig, record, refusal

DAY = 86_400.0


def images(amount: int, limit: int | None = 5) -> Counter:
    """Images a day."""
    return Counter("images", amount, limit, DAY)


def streams(key: str, amount: int = 1, limit: int | None = 2) -> Counter:
    """Concurrent streams of a key."""
    return Counter(f"streams:{key}", amount, limit)


def request(task_id: str, *counters: Counter, **changes: int | str) -> ReserveRequest:
    return ReserveRequest(record(task_id), 10, 10, counters, **changes)  # type: ignore[arg-type]


async def used(store: Store, *counters: Counter) -> list[int]:
    """The counts of these counters."""
    counts = (await store.limit_status(WALLET, counters)).counts
    return [counts[counter.name].used for counter in counters]


# --- with a window


async def test_a_window_lasts_as_long_as_its_counter_says(rig: Rig, clock: Clock) -> None:
    reserved = await rig.store.reserve(request("a", images(3), Counter("calls", 1, None, 0.5)))
    counts = reserved.limit_status.counts
    assert counts == {"images": Count(3, DAY), "calls": Count(1, 0.5)}
    clock.passes(0.5)
    assert await refusal(rig.store.reserve(request("b", images(3)))) == "images"
    clock.passes(DAY - 1)
    status = await rig.store.limit_status(WALLET, [images(1), Counter("calls", window=0.5)])
    assert status.counts == {"images": Count(3, 0.5), "calls": Count()}
    clock.passes(0.5)
    assert isinstance(await rig.store.reserve(request("b", images(3))), Reserved)
    assert await used(rig.store, images(0)) == [3]


async def test_a_task_that_takes_nothing_of_a_limit_is_not_refused_for_it(rig: Rig) -> None:
    assert isinstance(await rig.store.reserve(request("a", images(5), streams("ann", 2))), Reserved)
    taken = images(0, limit=3), streams("ann", 0, limit=1)  # the limits were lowered meanwhile
    assert isinstance(await rig.store.reserve(request("b", *taken)), Reserved)
    assert await refusal(rig.store.reserve(request("c", images(1, limit=3)))) == "images"


async def test_the_first_window_to_end_does_so_whatever_the_order_of_the_counters(
    rig: Rig, clock: Clock
) -> None:
    short, long = Counter("calls", 1, 1, 10.0), Counter("pages", 1, 5, 60.0)
    assert isinstance(await rig.store.reserve(request("a", short, long)), Reserved)
    assert await refusal(rig.store.reserve(request("b", short, long))) == "calls"
    clock.passes(11)
    assert isinstance(await rig.store.reserve(request("b", short, long)), Reserved)
    assert await used(rig.store, short, long) == [1, 2]


async def test_each_window_of_a_task_gets_its_own_actual_amount(rig: Rig) -> None:
    tokens = Counter("tokens:gpt-4", 40, None, 60.0)
    await rig.store.reserve(request("a", images(3), tokens))
    await rig.store.reserve(request("b", images(2), tokens))
    settled = await rig.store.settle(Settlement(record("a", cost=1), (images(1), tokens)))
    assert settled.limit_status.counts["images"].used == 1 + 2
    await rig.store.settle(Settlement(record("b", cost=1), (Counter("tokens:gpt-4", 7, None, 60.0),)))
    assert await used(rig.store, images(0), tokens) == [1 + 2, 40 + 7]


async def test_an_actual_amount_of_a_counter_that_was_not_reserved_is_not_counted(rig: Rig) -> None:
    await rig.store.reserve(request("a", images(3)))
    await rig.store.reserve(request("b", streams("ann")))
    await rig.store.settle(Settlement(record("b"), (images(2), streams("ann"), streams("bob"))))
    assert await used(rig.store, images(0), streams("ann"), streams("bob")) == [3, 0, 0]


async def test_a_refund_returns_the_amounts_of_all_windows(rig: Rig) -> None:
    minute = Counter("pages:a:b c", 4, None, 60.0)
    for task in ("a", "b"):
        await rig.store.reserve(request(task, images(2), minute, streams("ann")))
    await rig.store.void(WALLET, "a", refund=True)
    assert await used(rig.store, images(0), minute, streams("ann")) == [2, 4, 1]
    await rig.store.void(WALLET, "b")
    assert await used(rig.store, images(0), minute, streams("ann")) == [2, 4, 0]


async def test_windows_survive_a_restart_and_a_crash(rig: Rig) -> None:
    await rig.store.reserve(request("a", images(3), streams("ann")))
    await rig.close()
    await rig.open()
    assert await used(rig.store, images(0)) == [3]
    await rig.store.reserve(request("b", images(1), streams("ann", 2, None)))
    await rig.crash()
    assert await used(rig.store, images(0), streams("ann")) == [4, 0]
    assert await refusal(rig.store.reserve(request("c", images(2)))) == "images"


# --- without a window

ENDS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "settled": lambda store: store.settle(Settlement(record("a", cost=10), (streams("ann", 7),))),
    "voided": lambda store: store.void(WALLET, "a"),
    "refunded": lambda store: store.void(WALLET, "a", refund=True),
    "recovered": lambda store: store.recover(WALLET, "a"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_what_only_running_tasks_take_is_released_once_however_they_end(rig: Rig, end: str) -> None:
    await rig.store.reserve(request("a", streams("ann", 2, 3)))
    await rig.store.reserve(request("b", streams("bob")))
    assert await refusal(rig.store.reserve(request("c", streams("ann", 2, 3)))) == "streams:ann"
    await rig.store.reserve(request("c", streams("ann", 1, 3)))
    assert await used(rig.store, streams("ann"), streams("bob")) == [3, 1]
    for _ in range(2):
        await ENDS[end](rig.store)
        assert await used(rig.store, streams("ann"), streams("bob")) == [1, 1]
    await rig.store.void(WALLET, "c")
    assert await used(rig.store, streams("ann"), streams("bob")) == [0, 1]


async def test_a_running_task_counts_however_long_it_runs(rig: Rig, clock: Clock) -> None:
    await rig.store.reserve(request("a", streams("ann")))
    clock.passes(10 * DAY)
    status = await rig.store.limit_status(WALLET, [streams("ann")])
    assert status.counts == {"streams:ann": Count(1, 0.0)}
    await rig.store.reserve(request("b", streams("ann")))
    assert await refusal(rig.store.reserve(request("c", streams("ann")))) == "streams:ann"


# --- several


async def test_the_first_counter_whose_limit_would_be_exceeded_refuses_the_task(rig: Rig) -> None:
    await rig.store.reserve(request("a", images(5), streams("ann"), streams("bob", 2)))
    full = [streams("bob"), images(1), streams("ann")]
    for counters in (full, full[1:], full[::-1]):
        answer = await rig.store.reserve(request("b", *counters))
        assert isinstance(answer, Refused)
        expected = next(counter for counter in counters if counter.name != "streams:ann")
        assert (answer.code, answer.counter) == ("limit_exceeded", expected.name)
        assert set(answer.limit_status.counts) == {counter.name for counter in counters}
    assert isinstance(await rig.store.reserve(request("b", streams("ann"))), Reserved)
    assert await used(rig.store, images(0), streams("ann"), streams("bob")) == [5, 2, 2]


async def test_an_amount_of_0_is_reported_and_never_refused(rig: Rig) -> None:
    await rig.store.reserve(request("a", images(3), streams("ann", 2)))
    answer = await rig.store.reserve(request("b", images(0, 2), streams("ann", 0, 1), streams("bob", 0, 0)))
    assert isinstance(answer, Reserved)
    counts = answer.limit_status.counts
    assert [counts[name].used for name in ("images", "streams:ann", "streams:bob")] == [3, 2, 0]
    await rig.store.reserve(request("c", streams("bob", 0, 0)))
    for task in ("b", "c"):
        await rig.store.void(WALLET, task)
    assert await used(rig.store, images(0), streams("ann"), streams("bob")) == [3, 2, 0]


async def test_a_task_without_counters_counts_nothing(rig: Rig) -> None:
    reserved = await rig.store.reserve(request("a"))
    assert reserved.limit_status == LimitStatus(990, {})
    settled = await rig.store.settle(Settlement(record("a", cost=10)))
    assert settled.limit_status == await rig.store.limit_status(WALLET) == LimitStatus(990, {})


@pytest.mark.parametrize(
    ("shares", "amount"), [("images", 1_000 // 4), ("streams:ann", 500), ("other", 50), ("", 50)]
)
async def test_the_named_counter_says_how_many_tasks_share_the_credits(
    rig: Rig, shares: str, amount: int
) -> None:
    taken = (images(1), streams("ann"))
    await rig.store.reserve(ReserveRequest(record("a"), 0, 0, taken[:1]))
    shared = ReserveRequest(record("b"), 1, 5_000, taken, sufficient=1, shares=shares)
    reserved = await rig.store.reserve(shared)
    assert isinstance(reserved, Reserved)
    assert reserved.amount == amount
