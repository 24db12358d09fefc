"""The queues of starting requests and of large bodies to parse."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gateway.connections.limits import StartQueue
from gateway.parsing.body import ParseQueue
from pomelo.errors import PomeloError
from tests.calls import call_of
from tests.unit.loop import iterations


def alone() -> bool:
    """Says that no other account has a call in flight."""
    return True


def in_company() -> bool:
    """Says that another account has a call in flight."""
    return False


async def test_a_start_queue_releases_its_rate_per_iteration_in_order() -> None:
    queue = StartQueue(3)
    loop = asyncio.get_running_loop()
    turn = 0
    started: list[tuple[int, int]] = []

    def count() -> None:
        nonlocal turn
        turn += 1
        if turn < 20:
            loop.call_soon(count)

    async def request(number: int) -> None:
        wait = queue.enter()
        if wait is not None:
            await wait
        started.append((number, turn))

    loop.call_soon(count)
    await asyncio.gather(*(request(number) for number in range(10)))
    assert [number for number, _ in started] == list(range(10))
    for each in {turn for _, turn in started}:
        assert sum(turn == each for _, turn in started) <= 3


async def test_a_queue_without_requests_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    queue = StartQueue(2)
    for _ in range(3):
        queue.enter()
    await iterations()
    scheduled: list[Any] = []
    schedule = loop.call_soon

    def record(callback: Any, *args: Any, **options: Any) -> asyncio.Handle:
        scheduled.append(callback)
        return schedule(callback, *args, **options)

    monkeypatch.setattr(loop, "call_soon", record)
    await iterations()
    assert queue._next_iteration not in scheduled


async def test_a_cancelled_waiter_does_not_consume_a_turn() -> None:
    queue = StartQueue(1)
    assert queue.enter() is None
    cancelled, following = queue.enter(), queue.enter()
    assert cancelled is not None
    assert following is not None
    cancelled.cancel()
    async with asyncio.timeout(20):
        await following
    for _ in range(3):
        await asyncio.sleep(0)
    assert queue.enter() is None


async def test_large_bodies_are_parsed_one_at_a_time_and_accounts_do_not_block_each_other() -> None:
    queue = ParseQueue()
    order: list[str] = []

    async def body(account: str) -> None:
        async with queue.body(account, 100_000, in_company, call_of(None)) as steps:
            steps.run(lambda: order.append(account))
            steps.run(lambda: order.append(account))

    crowd = [asyncio.create_task(body("crowd")) for _ in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await body("other")
        assert order.count("crowd") <= 4
        await asyncio.gather(*crowd)
    assert len(order) == 12


async def test_an_account_pauses_after_a_large_body_and_failures_release_its_turn() -> None:
    queue = ParseQueue()
    loop = asyncio.get_running_loop()
    size = queue.RATE // 5

    async def fails() -> None:
        async with queue.body("acme", size, in_company, call_of(None)) as steps:
            steps.run(lambda: 1 // 0)

    begin = loop.time()
    results = await asyncio.gather(fails(), fails(), return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    assert loop.time() - begin >= 0.2
    waiting = asyncio.create_task(fails())
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(20), queue.body("acme", 0, in_company, call_of(None)) as steps:
        assert steps.run(lambda: 7) == 7


async def test_an_account_pauses_three_times_as_long_as_its_steps_took() -> None:
    queue = ParseQueue()
    loop = asyncio.get_running_loop()
    async with queue.body("acme", 0, in_company, call_of(None)) as steps:
        for _ in range(2):
            steps.run(lambda: time.sleep(0.05))
    end = loop.time()
    async with asyncio.timeout(20), queue.body("acme", 0, in_company, call_of(None)):
        assert loop.time() - end > 0.29


async def test_an_account_that_is_alone_parses_without_a_pause_one_body_an_iteration() -> None:
    queue = ParseQueue()
    loop = asyncio.get_running_loop()
    turn = 0
    parsed: list[int] = []

    def count() -> None:
        nonlocal turn
        turn += 1
        if len(parsed) < 10:
            loop.call_soon(count)

    async def body() -> None:
        async with queue.body("acme", 3600 * queue.RATE, alone, call_of(None)) as steps:
            steps.run(lambda: parsed.append(turn))

    loop.call_soon(count)
    async with asyncio.timeout(60):
        await asyncio.gather(*(body() for _ in range(10)))
    assert len(set(parsed)) == 10


async def test_an_account_pauses_if_another_one_comes_while_its_body_is_parsed() -> None:
    queue = ParseQueue()
    answers = [alone]
    async with queue.body("acme", 3600 * queue.RATE, lambda: answers[-1](), call_of(None)):
        answers.append(in_company)
    waiting = asyncio.create_task(queue.body("acme", 0, alone, call_of(None)).__aenter__())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_the_deadline_of_a_request_ends_the_wait_for_its_turn_to_be_parsed() -> None:
    queue = ParseQueue()
    async with queue.body("acme", 0, alone, call_of(None)):
        with pytest.raises(PomeloError, match="deadline") as late:
            async with asyncio.timeout(20), queue.body("acme", 0, alone, call_of(None, 0.05)):
                raise AssertionError
    assert late.value.code == "deadline_exceeded"
    async with asyncio.timeout(20), queue.body("acme", 0, alone, call_of(None)) as steps:
        assert steps.run(lambda: 7) == 7
