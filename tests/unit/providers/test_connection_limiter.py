"""Connections to a vendor's host: shares, queues, waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any

import pytest
from yarl import URL

from pomelo.errors import PomeloError
from pomelo.providers import Credentials
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import LIMIT, MAX_WAIT, ConnectionLimiter, NoConnectionError
from pomelo.testing import Answer, FaultUpstream, Gate, Script, Stop, error_reply
from pomelo.testing.addresses import unanswered_connection
from tests.providers.rig import read_all
from tests.providers.text_rig import OPENAI
from tests.unit.providers.raw_server import CHAT
from tests.waiting import cancel, until

HOST = "vendor:443"
LONG_WAIT = 20.0
"""A wait that no test exhausts."""


async def completes_immediately(work: Awaitable[Any]) -> bool:
    """Whether the work completes without waiting."""
    task = asyncio.ensure_future(work)
    for _ in range(3):
        await asyncio.sleep(0)
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def is_refused_immediately(limiter: ConnectionLimiter, account: str) -> bool:
    """Whether a call is refused without waiting."""
    try:
        await completes_immediately(limiter.acquire(HOST, account))
    except PomeloError:
        return True
    return False


async def fill(limiter: ConnectionLimiter, account: str, host: str = HOST) -> int:
    """Acquires connections until one would have to wait; returns their number."""
    number = 0
    while await completes_immediately(limiter.acquire(host, account)):
        number += 1
    return number


async def wait_until(limiter: ConnectionLimiter, waiting: int) -> None:
    """Returns when `waiting` calls wait."""
    async with asyncio.timeout(LONG_WAIT):
        while limiter.waiting != waiting:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0)


def queued(limiter: ConnectionLimiter, account: str, order: list[str], name: str) -> asyncio.Task[None]:
    """Starts a call that appends its name to `order` when it has its connection."""

    async def call() -> None:
        await limiter.acquire(HOST, account)
        order.append(name)

    return asyncio.create_task(call())


def idle(limiter: ConnectionLimiter) -> bool:
    """Whether no connection is in use and no call waits."""
    return not limiter.in_use and not limiter.waiting and not limiter._hosts


@pytest.mark.parametrize("limit", [2, 3, 4, 8, 16, LIMIT])
async def test_one_account_leaves_room_for_another_and_no_account_takes_the_last_connection(
    limit: int,
) -> None:
    limiter = ConnectionLimiter(limit, max_wait=LONG_WAIT)
    alone = await fill(limiter, "a")
    assert alone < limit
    assert alone >= limit * 3 // 4 or limit < 4
    assert await completes_immediately(limiter.acquire(HOST, "b"))
    assert not await completes_immediately(limiter.acquire(HOST, "a"))


async def test_the_largest_plan_fits_into_one_accounts_share() -> None:
    assert await fill(ConnectionLimiter(), "a") >= 200


async def test_several_accounts_leave_room_for_one_more() -> None:
    limiter = ConnectionLimiter(LIMIT, max_wait=LONG_WAIT)
    taken = [await fill(limiter, f"account {number}") for number in range(8)]
    assert min(taken) >= 2
    assert taken[1] > 20, "a second large account need not wait for the first"
    assert limiter.in_use < LIMIT
    assert await completes_immediately(limiter.acquire(HOST, "one more"))


async def test_the_only_connection_is_taken_in_turn() -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT)
    await limiter.acquire(HOST, "a")
    order: list[str] = []
    calls = [queued(limiter, account, order, account) for account in ("a", "b")]
    await wait_until(limiter, 2)
    limiter.release(HOST, "a")
    await calls[0]
    limiter.release(HOST, "a")
    await calls[1]
    limiter.release(HOST, "b")
    assert order == ["a", "b"]
    assert idle(limiter)


async def test_hosts_do_not_share_connections() -> None:
    limiter = ConnectionLimiter(4, max_wait=LONG_WAIT)
    assert await fill(limiter, "a", "one:443") == await fill(limiter, "a", "two:443")


async def test_a_call_waits_for_a_connection_of_its_own_account() -> None:
    limiter = ConnectionLimiter(4, max_wait=LONG_WAIT)
    number = await fill(limiter, "a")
    limiter_waited = limiter.waited
    order: list[str] = []
    call = queued(limiter, "a", order, "next")
    await wait_until(limiter, 1)
    limiter.release(HOST, "a")
    await call
    assert limiter.in_use == number
    assert limiter.waited == limiter_waited + 1
    assert limiter.refused == 0


async def test_calls_of_one_account_are_served_in_order_and_accounts_in_turn() -> None:
    limiter = ConnectionLimiter(3, max_wait=LONG_WAIT)
    for account in ("x", "y", "z"):
        await limiter.acquire(HOST, account)
    order: list[str] = []
    calls = []
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        calls.append(queued(limiter, name[0], order, name))
        await wait_until(limiter, len(calls))
    holders = ["x", "y", "z"]
    while len(order) < 6:
        before = len(order)
        limiter.release(HOST, holders.pop(0))
        for _ in range(3):
            await asyncio.sleep(0)
        holders += [name[0] for name in order[before:]]
    assert [name for name in order if name[0] == "a"] == ["a1", "a2", "a3"]
    assert order[:3] == ["a1", "b1", "c1"]
    for holder in holders:
        limiter.release(HOST, holder)
    assert idle(limiter)


async def test_an_account_with_several_waiting_calls_takes_its_place_behind_the_others() -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT)
    await limiter.acquire(HOST, "x")
    order: list[str] = []
    calls = []
    for name in ("a1", "a2", "b1"):
        calls.append(queued(limiter, name[0], order, name))
        await wait_until(limiter, len(calls))
    limiter.release(HOST, "x")
    for served, call in enumerate((calls[0], calls[2], calls[1]), 1):
        await asyncio.wait_for(call, LONG_WAIT)
        assert len(order) == served
        limiter.release(HOST, order[-1][0])
    assert order == ["a1", "b1", "a2"]
    assert idle(limiter)


async def test_a_later_call_does_not_overtake_those_that_wait() -> None:
    limiter = ConnectionLimiter(4, max_wait=LONG_WAIT)
    await fill(limiter, "a")
    order: list[str] = []
    first = queued(limiter, "a", order, "first")
    await wait_until(limiter, 1)
    limiter.release(HOST, "a")
    second = queued(limiter, "a", order, "second")
    await first
    await wait_until(limiter, 1)
    assert order == ["first"]
    limiter.release(HOST, "a")
    await second


async def test_the_wait_is_bounded_and_ends_in_overloaded_before_anything_is_sent() -> None:
    limiter = ConnectionLimiter(1, max_wait=0.05)
    await limiter.acquire(HOST, "a")
    began = time.monotonic()
    with pytest.raises(NoConnectionError) as raised:
        await limiter.acquire(HOST, "b")
    assert 0.04 <= time.monotonic() - began < 20
    error = raised.value
    assert (error.code, error.retry_after, error.retry) == ("overloaded", 1, RetryPolicy.NEXT_ROUTE)
    assert error.row.http == 503
    assert (limiter.in_use, limiter.waiting, limiter.waited, limiter.refused) == (1, 0, 1, 1)
    limiter.release(HOST, "a")
    assert idle(limiter)


def test_the_default_wait_is_two_seconds_at_most() -> None:
    assert MAX_WAIT <= 2.0


async def test_the_queue_is_bounded_in_all_and_for_each_account() -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT, max_waiting=5, max_account_waiting=2)
    await limiter.acquire(HOST, "holder")
    order: list[str] = []
    calls = [queued(limiter, account, order, account) for account in ("a", "a", "b", "b", "c")]
    await wait_until(limiter, 5)
    for account in ("a", "c", "d"):
        assert await is_refused_immediately(limiter, account)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert limiter.waiting == 0
    queued_calls = [queued(limiter, "a", order, "a") for _ in range(2)]
    await wait_until(limiter, 2)
    assert await is_refused_immediately(limiter, "a")
    for call in queued_calls:
        call.cancel()
    await asyncio.gather(*queued_calls, return_exceptions=True)
    limiter.release(HOST, "holder")
    assert idle(limiter)


async def test_a_caller_who_cancels_is_dequeued_immediately_and_the_next_is_served() -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT)
    await limiter.acquire(HOST, "a")
    order: list[str] = []
    cancelled, waiting = queued(limiter, "b", order, "cancelled"), queued(limiter, "b", order, "waiting")
    await wait_until(limiter, 2)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert limiter.waiting == 1
    limiter.release(HOST, "a")
    await waiting
    assert order == ["waiting"]
    limiter.release(HOST, "b")
    assert idle(limiter)


@pytest.mark.parametrize("first", ["cancel", "grant"])
async def test_a_caller_who_cancels_on_its_turn_holds_no_connection(first: str) -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT)
    await limiter.acquire(HOST, "a")
    order: list[str] = []
    cancelled, waiting = queued(limiter, "b", order, "cancelled"), queued(limiter, "c", order, "waiting")
    await wait_until(limiter, 2)
    if first == "cancel":
        cancelled.cancel()
        limiter.release(HOST, "a")
    else:
        limiter.release(HOST, "a")
        cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await asyncio.wait_for(waiting, LONG_WAIT)
    assert order == ["waiting"]
    limiter.release(HOST, "c")
    assert idle(limiter)


async def test_many_calls_of_many_accounts_release_all_connections() -> None:
    limiter = ConnectionLimiter(5, max_wait=0.02)
    peak = 0

    async def call(account: str, number: int) -> str:
        nonlocal peak
        try:
            async with asyncio.timeout(0.01 if number % 7 == 0 else LONG_WAIT):
                await limiter.acquire(HOST, account)
                peak = max(peak, limiter.in_use)
                try:
                    await asyncio.sleep(0.001 * (number % 5))
                finally:
                    limiter.release(HOST, account)
        except TimeoutError:
            return "left"
        except PomeloError as error:
            return error.code
        return "ok"

    outcomes = await asyncio.gather(*[call(f"account {n % 6}", n) for n in range(300)])
    assert set(outcomes) <= {"ok", "left", "overloaded"}
    assert outcomes.count("ok") > 5
    assert peak <= 5
    assert limiter.refused == outcomes.count("overloaded") > 0
    assert idle(limiter)


async def test_only_the_limiter_limits_connections() -> None:
    gate = Gate()
    limiter = ConnectionLimiter(400)
    async with FaultUpstream() as upstream, Http(connections=limiter) as http:
        upstream.default = Answer(at={1: gate})
        provider = OpenAI(Credentials("sk-x", upstream.openai_base_url), http)

        calls = [asyncio.create_task(read_all(provider, OPENAI.job(stream=True))) for _ in range(300)]
        async with asyncio.timeout(60):
            for _ in calls:
                await upstream.received()
        assert limiter.in_use == upstream.serving == len(calls)
        gate.open()
        assert all(await asyncio.gather(*calls))
        assert idle(limiter)


@pytest.mark.parametrize(
    "reply", [error_reply(500), Answer(before=(Stop.RESET,)), Answer(at={1: Stop.CLOSE})]
)
async def test_a_call_that_fails_releases_its_connection(reply: Script) -> None:
    limiter = ConnectionLimiter(1, max_wait=LONG_WAIT)
    async with FaultUpstream() as upstream, Http(connections=limiter) as http:
        provider = OpenAI(Credentials("sk-x", upstream.openai_base_url), http)
        for _ in range(3):
            upstream.script(reply)
            with pytest.raises(PomeloError):
                await read_all(provider, OPENAI.job(stream=True))
            assert idle(limiter)


async def test_waits_and_refusals_are_logged_at_most_once_in_an_interval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    limiter = ConnectionLimiter(1, max_wait=0.001, clock=lambda: now)
    await limiter.acquire(HOST, "holder")
    for _ in range(20):
        with pytest.raises(PomeloError):
            await limiter.acquire(HOST, "acme")
    assert len(caplog.records) == 1
    now += 11
    with pytest.raises(PomeloError):
        await limiter.acquire(HOST, "acme")
    assert len(caplog.records) == 2
    line = caplog.records[1].getMessage()
    assert caplog.records[1].levelno == logging.WARNING
    assert all(
        part in line for part in (HOST, "1 of 1 in use", "account acme", "POMELO_UPSTREAM_CONNECTIONS")
    )
    assert "20 waited and 20 were refused" in line


async def test_a_new_account_gets_an_eighth_of_the_reserve() -> None:
    connections = ConnectionLimiter()
    for number in range(LIMIT - LIMIT // 10):
        assert connections.try_acquire(HOST, f"account {number}")
    new = [[connections.try_acquire(HOST, f"new {n}") for _ in range(5)].count(True) for n in range(8)]
    assert new == [LIMIT // 10 // 8] * 8


async def test_an_account_without_connections_takes_no_memory() -> None:
    connections = ConnectionLimiter(20)
    assert connections.try_acquire(HOST, "ann")
    for number in range(50):
        assert connections.try_acquire(HOST, f"account {number}")
        connections.release(HOST, f"account {number}")
    assert connections._hosts[HOST].used == {"ann": 1}


async def test_one_account_gets_exactly_its_share() -> None:
    connections = ConnectionLimiter(20)
    assert [connections.try_acquire(HOST, "ann") for _ in range(20)].count(True) == 16
    assert connections.try_acquire(HOST, "bob"), "of the reserve"


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_call_that_ends_while_it_connects_gives_its_place_back(cancelled: bool) -> None:
    limiter = ConnectionLimiter(1)
    timeouts = Timeouts(connect=60.0 if cancelled else 0.05)
    with unanswered_connection("http://127.0.0.1:1/") as url:
        async with Http(timeouts, connections=limiter) as http:
            calling = asyncio.create_task(http.request_json(URL(url), {}, b"{}", CHAT))
            await until(lambda: limiter.in_use == 1)
            if cancelled:
                await cancel(calling)
            else:
                with pytest.raises(UpstreamError):
                    await calling
            assert limiter.in_use == 0
