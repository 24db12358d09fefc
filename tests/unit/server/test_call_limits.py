"""Concurrency limits of unauthenticated calls: no caller can keep the others out."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.errors import PomeloError
from pomelo.runtime.in_flight import FairSemaphore, InFlight
from pomelo.server import call_limits
from pomelo.server.call_limits import CallLimits, NewestFirst, Pool, Running, ServerState
from tests.unit.loop import iterations
from tests.waiting import cancel


async def take(limiter: NewestFirst) -> None:
    """Takes a slot and releases it."""
    async with limiter.slot():
        pass


def test_a_pool_refuses_calls_above_its_limit() -> None:
    pool = Pool(1)
    with pool:
        with pytest.raises(PomeloError, match="more requests") as caught, pool:
            pass
        assert caught.value.code == "overloaded"
    with pool:
        assert pool.count == 1


async def test_a_slow_call_keeps_its_slot_until_another_call_waits() -> None:
    limiter = NewestFirst(1, patience=0.1)
    ended: list[str] = []

    async def slow(name: str) -> None:
        try:
            async with limiter.slot():
                await asyncio.Event().wait()
        except PomeloError as error:
            ended.append(f"{name} {error.code}")

    first = asyncio.ensure_future(slow("first"))
    await asyncio.sleep(0.2)
    assert not ended, "no other call waits"
    second = asyncio.ensure_future(slow("second"))
    await first
    assert ended == ["first overloaded"]
    async with asyncio.timeout(20), limiter.slot():
        await second
    assert ended == ["first overloaded", "second overloaded"]


async def test_a_call_keeps_its_slot_for_a_while_after_the_event_loop_was_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    limiter = NewestFirst(1, patience=1_000)
    arrived = asyncio.Event()

    async def receive() -> None:
        async with limiter.slot("quick"):
            await arrived.wait()

    quick = asyncio.ensure_future(receive())
    await iterations()
    waiting = asyncio.ensure_future(take(limiter))
    await iterations()
    ahead += 1_500
    await iterations()
    arrived.set()  # its bytes had come meanwhile, but the event loop sees them after its timers
    await asyncio.gather(quick, waiting)
    assert not limiter._is_slow("quick")

    slow = asyncio.ensure_future(hold(limiter, "slow"))
    await iterations()
    waiting = asyncio.ensure_future(take(limiter))
    for _ in range(3):
        ahead += 1_100
        await iterations()
    await waiting
    with pytest.raises(PomeloError):
        await slow


async def test_a_slow_call_that_has_waited_loses_its_slot_too() -> None:
    limiter = NewestFirst(1, patience=0.05)

    async def slow() -> str:
        try:
            async with limiter.slot():
                await asyncio.Event().wait()
        except PomeloError as error:
            return error.code
        return ""

    calls = []
    for _ in range(3):
        calls.append(asyncio.ensure_future(slow()))
        await iterations()
    async with asyncio.timeout(20):
        assert await calls[0] == await calls[2] == "overloaded"
    calls[1].cancel()
    await asyncio.wait(calls)


async def hold(limiter: NewestFirst, owner: str) -> None:
    """Takes a slot and keeps it."""
    async with limiter.slot(owner):
        await asyncio.Event().wait()


async def lose(limiter: NewestFirst, owner: str, *, cancelled: bool) -> None:
    """Makes an owner slow: it loses a slot, or is cancelled with one."""
    slow = asyncio.ensure_future(hold(limiter, owner))
    await iterations()
    if cancelled:
        await cancel(slow)
    else:
        await take(limiter)
        with pytest.raises(PomeloError):
            await slow


@pytest.mark.parametrize("cancelled", [False, True], ids=["lost", "cancelled"])
async def test_an_owner_that_has_lost_a_slot_is_served_last(cancelled: bool) -> None:
    limiter = NewestFirst(1, patience=0.05)
    order: list[str] = []

    async def quick(owner: str) -> None:
        async with limiter.slot(owner):
            order.append(owner)

    async with asyncio.timeout(20):
        await lose(limiter, "slow", cancelled=cancelled)
        async with limiter.slot("first"):
            waiting = []
            for owner in ("a", "b", "slow"):
                waiting.append(asyncio.ensure_future(quick(owner)))
                await iterations()
        await asyncio.gather(*waiting)
    assert order == ["b", "a", "slow"]


async def test_an_owner_is_slow_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter = NewestFirst(1, patience=100)
    for seconds, is_slow in ((60.0, True), (0.0, False)):
        monkeypatch.setattr(call_limits, "_SLOW_TIME", seconds)
        await lose(limiter, "slow", cancelled=True)
        assert limiter._is_slow("slow") is is_slow


async def test_few_slow_owners_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_limits, "_MAX_SLOW", 2)
    limiter = NewestFirst(1, patience=100)
    for owner in ("a", "b", "a", "c"):
        await lose(limiter, owner, cancelled=True)
    assert [owner for owner in "abc" if limiter._is_slow(owner)] == ["a", "c"]


async def test_the_newest_waiter_is_next_and_a_cancelled_one_blocks_no_other() -> None:
    limiter = NewestFirst(1, patience=10)
    order: list[int] = []

    async def quick(number: int) -> None:
        async with limiter.slot():
            order.append(number)

    async with limiter.slot():
        waiting = []
        for number in range(4):
            waiting.append(asyncio.ensure_future(quick(number)))
            await iterations()
        waiting[3].cancel()
        await iterations()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [2, 1, 0]
    async with limiter.slot():
        pass  # the slot is free again


async def test_the_oldest_of_more_than_200_waiters_is_refused() -> None:
    limiter = NewestFirst(1, patience=10)

    async def wait() -> str:
        try:
            async with limiter.slot():
                return "ok"
        except PomeloError as error:
            return error.code

    async with limiter.slot():
        waiting = [asyncio.ensure_future(wait()) for _ in range(203)]
        await iterations()
    results = await asyncio.gather(*waiting)
    assert results[:3] == ["overloaded"] * 3
    assert set(results[3:]) == {"ok"}


async def test_a_slot_that_a_slow_call_lost_is_released_only_once() -> None:
    limiter = NewestFirst(1, patience=0.6)
    inside = 0

    async def hold() -> None:
        nonlocal inside
        async with limiter.slot():
            inside += 1
            try:
                await asyncio.Event().wait()
            finally:
                inside -= 1

    async with asyncio.timeout(20):
        slow = asyncio.ensure_future(hold())
        await iterations()
        newer = asyncio.ensure_future(hold())
        with pytest.raises(PomeloError):
            await slow
        await iterations()
        assert inside == 1
        last = asyncio.ensure_future(hold())
        await iterations()
        assert inside == 1, "the last one waits"
        with pytest.raises(PomeloError):
            await newer
        last.cancel()
        await asyncio.wait([last])
        async with limiter.slot():
            assert inside == 0


async def test_a_waiter_that_is_cancelled_with_its_slot_passes_it_on() -> None:
    limiter = NewestFirst(1, patience=10)
    entered = asyncio.Event()

    async def wait() -> None:
        async with limiter.slot():
            entered.set()

    async with limiter.slot():
        older, newer = [asyncio.ensure_future(wait()) for _ in range(2)]
        await iterations()
    newer.cancel()  # its slot was granted in this iteration
    async with asyncio.timeout(20):
        await entered.wait()
        await older
    assert newer.cancelled() or not newer.done()


async def test_a_slot_passes_by_a_waiter_that_is_cancelled_before_its_release() -> None:
    limiter = NewestFirst(1, patience=10)
    async with limiter.slot():
        older, newer = [asyncio.ensure_future(take(limiter)) for _ in range(2)]
        await iterations()
        newer.cancel()  # it has not seen its cancellation when the slot is released
    async with asyncio.timeout(20):
        await older
    assert newer.cancelled()


async def test_200_calls_can_wait_while_the_oldest_is_cancelled() -> None:
    limiter = NewestFirst(1, patience=10)
    async with limiter.slot():
        waiting = [asyncio.ensure_future(take(limiter)) for _ in range(200)]
        await iterations()
        assert not any(future.done() for future in waiting)
        waiting.append(asyncio.ensure_future(take(limiter)))
        waiting[0].cancel()  # it has not seen its cancellation when the new call begins to wait
        await iterations()
        assert [future.done() for future in waiting] == [True] + [False] * 200
    await asyncio.gather(*waiting[1:])


async def test_a_timeout_of_a_call_itself_is_not_reported_as_overloaded() -> None:
    limiter = NewestFirst(1)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with limiter.slot():
                raise TimeoutError


def test_a_slot_of_a_pool_is_released_after_a_failure() -> None:
    pool = Pool(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), pool:
            raise ZeroDivisionError
    assert pool.count == 0


async def test_the_patience_of_a_call_begins_with_its_slot() -> None:
    limiter = NewestFirst(1, patience=1.2)
    leave = asyncio.Event()

    async def hold(until: asyncio.Event) -> None:
        async with limiter.slot():
            await until.wait()

    async with asyncio.timeout(20):
        first = asyncio.ensure_future(hold(leave))
        await iterations()
        older = asyncio.ensure_future(hold(leave))
        await iterations()
        newer = asyncio.ensure_future(hold(asyncio.Event()))
        await asyncio.sleep(0.6)  # part of the first call's time
        leave.set()
        await first
        with pytest.raises(PomeloError):
            await newer
        await older


async def capacity(limit: Pool | InFlight | NewestFirst | FairSemaphore) -> int:
    """Returns how many of twenty calls, of two owners, get a slot immediately."""
    inside = 0
    leave = asyncio.Event()

    async def hold(number: int) -> None:
        nonlocal inside
        if isinstance(limit, FairSemaphore):
            await limit.acquire("owner")
            inside += 1
        elif isinstance(limit, InFlight):
            limit.enter(str(number % 2))
            inside += 1
        elif isinstance(limit, Pool):
            with limit:
                inside += 1
                await leave.wait()
        else:
            async with limit.slot():
                inside += 1
                await leave.wait()

    calls = [asyncio.ensure_future(hold(number)) for number in range(20)]
    await iterations()
    entered = inside
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return entered


async def test_each_kind_of_calls_has_its_own_limit() -> None:
    limits = CallLimits(
        unauthenticated=2, unauthenticated_reads=3, health_reads=4, lookups=5, forwarded=6, reads=7, uploads=8
    )
    state = ServerState(limits=limits)
    assert [
        await capacity(state.unauthenticated),
        await capacity(state.unauthenticated_reads),
        await capacity(state.health_reads),
        await capacity(state.lookups),
        await capacity(state.forwarded),
        await capacity(state.reads),
        await capacity(state.uploads),
    ] == [2, 3, 4, 5, 6, 7, 8]


async def test_idle_waits_for_a_handler_that_begins_as_the_last_one_ends() -> None:
    running = Running()
    with running:
        idle = asyncio.create_task(running.idle())
        await iterations()
    with running:
        await iterations()
        assert not idle.done()
    async with asyncio.timeout(20):
        await idle
    await running.idle()
