"""Concurrency limits for unauthenticated calls: no caller can keep a place from the others."""

from __future__ import annotations

import asyncio
import time

import pytest

from pomelo.errors import PomeloError
from pomelo.server.limits import NewestFirst, Pool


async def settle() -> None:
    """Runs the event loop until ready tasks have run."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_pool_refuses_calls_above_its_limit() -> None:
    pool = Pool(1)
    with pool.place():
        with pytest.raises(PomeloError, match="more requests") as caught, pool.place():
            pass
        assert caught.value.code == "overloaded"
    with pool.place():
        assert pool.count == 1


async def test_a_slow_call_keeps_its_place_until_another_call_waits() -> None:
    places = NewestFirst(1, patience=0.1)
    ended: list[str] = []

    async def slow(name: str) -> None:
        try:
            async with places.place():
                await asyncio.Event().wait()
        except PomeloError as error:
            ended.append(f"{name} {error.code}")

    first = asyncio.ensure_future(slow("first"))
    await asyncio.sleep(0.2)
    assert not ended, "nobody waits"
    second = asyncio.ensure_future(slow("second"))
    await first
    assert ended == ["first overloaded"]
    began = time.monotonic()
    async with places.place():
        assert time.monotonic() - began < 1.0
        await second
    assert ended == ["first overloaded", "second overloaded"]


async def test_the_newest_is_next_and_a_cancelled_waiter_holds_up_no_other() -> None:
    places = NewestFirst(1, patience=10)
    order: list[int] = []

    async def quick(number: int) -> None:
        async with places.place():
            order.append(number)

    async with places.place():
        waiting = []
        for number in range(4):
            waiting.append(asyncio.ensure_future(quick(number)))
            await settle()
        waiting[3].cancel()
        await settle()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [2, 1, 0]
    async with places.place():
        pass  # the place is free again


async def test_beyond_two_hundred_the_oldest_stops_waiting() -> None:
    places = NewestFirst(1, patience=10)

    async def wait() -> str:
        try:
            async with places.place():
                return "ok"
        except PomeloError as error:
            return error.code

    async with places.place():
        waiting = [asyncio.ensure_future(wait()) for _ in range(203)]
        await settle()
    results = await asyncio.gather(*waiting)
    assert results[:3] == ["overloaded"] * 3
    assert set(results[3:]) == {"ok"}


async def test_a_place_that_a_slow_call_lost_is_not_free_a_second_time() -> None:
    places = NewestFirst(1, patience=0.05)
    inside = 0

    async def hold() -> None:
        nonlocal inside
        async with places.place():
            inside += 1
            try:
                await asyncio.Event().wait()
            finally:
                inside -= 1

    async with asyncio.timeout(5):
        slow = asyncio.ensure_future(hold())
        await settle()
        newer = asyncio.ensure_future(hold())
        with pytest.raises(PomeloError):
            await slow
        await settle()
        assert inside == 1
        last = asyncio.ensure_future(hold())
        await settle()
        assert inside == 1, "the last one waits"
        with pytest.raises(PomeloError):
            await newer
        last.cancel()
        await asyncio.wait([last])
        async with places.place():
            assert inside == 0


async def test_a_waiter_that_is_cancelled_as_its_turn_comes_passes_the_place_on() -> None:
    places = NewestFirst(1, patience=10)
    entered = asyncio.Event()

    async def wait() -> None:
        async with places.place():
            entered.set()

    async with places.place():
        older, newer = [asyncio.ensure_future(wait()) for _ in range(2)]
        await settle()
    newer.cancel()  # its turn came at this moment
    async with asyncio.timeout(5):
        await entered.wait()
        await older
    assert newer.cancelled() or not newer.done()


async def test_exactly_two_hundred_may_wait() -> None:
    places = NewestFirst(1, patience=10)

    async def wait() -> None:
        async with places.place():
            pass

    async with places.place():
        waiting = [asyncio.ensure_future(wait()) for _ in range(200)]
        await settle()
        assert not any(future.done() for future in waiting)
    await asyncio.gather(*waiting)


def test_a_place_of_a_pool_is_free_after_a_failure() -> None:
    pool = Pool(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), pool.place():
            raise ZeroDivisionError
    assert pool.count == 0


async def test_patience_with_a_call_begins_when_it_gets_its_place() -> None:
    places = NewestFirst(1, patience=0.1)
    leave = asyncio.Event()

    async def hold(until: asyncio.Event) -> None:
        async with places.place():
            await until.wait()

    async with asyncio.timeout(5):
        first = asyncio.ensure_future(hold(leave))
        await settle()
        older = asyncio.ensure_future(hold(leave))
        await settle()
        newer = asyncio.ensure_future(hold(asyncio.Event()))
        await asyncio.sleep(0.05)  # part of the first call's time
        leave.set()
        await first
        with pytest.raises(PomeloError):
            await newer
        await older
