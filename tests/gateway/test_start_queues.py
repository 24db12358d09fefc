"""Taking turns: requests that begin, and large bodies that are parsed."""

from __future__ import annotations

import asyncio

from gateway.connections.limits import StartQueue
from gateway.parsing.body import ParseQueue


async def test_a_turnstile_lets_so_many_through_in_each_turn_in_their_order() -> None:
    turnstile = StartQueue(3)
    loop = asyncio.get_running_loop()
    turn = 0
    began: list[tuple[int, int]] = []

    def count() -> None:
        nonlocal turn
        turn += 1
        if turn < 20:
            loop.call_soon(count)

    async def request(number: int) -> None:
        wait = turnstile.enter()
        if wait is not None:
            await wait
        began.append((number, turn))

    loop.call_soon(count)
    await asyncio.gather(*(request(number) for number in range(10)))
    assert [number for number, _ in began] == list(range(10))
    for each in {turn for _, turn in began}:
        assert sum(turn == each for _, turn in began) <= 3


async def test_a_cancelled_waiter_does_not_use_up_a_turn() -> None:
    turnstile = StartQueue(1)
    assert turnstile.enter() is None
    gone, next_one = turnstile.enter(), turnstile.enter()
    assert gone is not None
    assert next_one is not None
    gone.cancel()
    async with asyncio.timeout(5):
        await next_one
    for _ in range(3):
        await asyncio.sleep(0)
    assert turnstile.enter() is None


async def test_large_bodies_are_parsed_one_at_a_time_and_no_account_waits_behind_anothers_crowd() -> None:
    queue = ParseQueue()
    order: list[str] = []

    async def body(account: str) -> None:
        async with queue.body(account, 100_000) as steps:
            await steps.run(lambda: order.append(account))
            await steps.run(lambda: order.append(account))

    crowd = [asyncio.create_task(body("crowd")) for _ in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await body("other")
        assert order.count("crowd") <= 4
        await asyncio.gather(*crowd)
    assert len(order) == 12


async def test_an_account_rests_after_a_large_body_and_a_failed_or_cancelled_one_frees_the_way() -> None:
    queue = ParseQueue()
    loop = asyncio.get_running_loop()
    size = queue.RATE // 5

    async def fails() -> None:
        async with queue.body("acme", size) as steps:
            await steps.run(lambda: 1 // 0)

    begin = loop.time()
    results = await asyncio.gather(fails(), fails(), return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    assert loop.time() - begin >= 0.2
    waits = asyncio.create_task(fails())
    await asyncio.sleep(0)
    waits.cancel()
    async with asyncio.timeout(5), queue.body("acme", 0) as steps:
        assert await steps.run(lambda: 7) == 7
