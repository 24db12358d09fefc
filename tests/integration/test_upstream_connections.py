"""Connections to a vendor, with a small limit: how many one account can use, and how its surplus is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pomelo.accounts.audit import audit
from pomelo.testing import Answer, Gate
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES, text_body

LIMIT = 8
SHARE = 7
"""What one account alone can have of LIMIT."""

WORDS = "one two three"


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("few"), upstream_connections=LIMIT) as opened:
        yield opened


async def until(happened: Callable[[], bool]) -> None:
    """Returns when something has happened."""
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 - counts have no event
            await asyncio.sleep(0.005)


async def test_the_surplus_of_one_account_is_refused_and_another_is_served_immediately(
    house: RunningApp,
) -> None:
    connections = house.server.connections
    hog, other = await house.account("all"), await house.account("all")
    refused_before = connections.refused
    gate = Gate()
    house.upstream.when("hold", Answer(WORDS, at={1: gate}))
    streams = [
        asyncio.create_task(
            house.ask(PROTOCOLS[n % 3], hog.live, text_body("hold", max_tokens=20), stream=True)
        )
        for n in range(SHARE)
    ]
    await until(lambda: connections.in_use == SHARE)

    async def timed(key: str, way: str, prompt: str, stream: bool) -> tuple[str, int, float, str]:
        began = time.monotonic()
        told = await house.ask(way, key, text_body(prompt, max_tokens=20), stream=stream)
        return told.code, told.status, time.monotonic() - began, told.metadata.get("retry-after", "")

    surplus = [
        asyncio.create_task(timed(hog.live, way, "surplus", stream))
        for way in PROTOCOLS
        for stream in (False, True)
    ]
    await until(lambda: connections.waiting == len(surplus))
    for way in PROTOCOLS:
        for stream in (False, True):
            code, _, seconds, _ = await timed(other.live, way, "Hello", stream)
            assert code == "ok"
            assert seconds < 1
    told = await asyncio.gather(*surplus)
    assert {code for code, *_ in told} == {"overloaded"}
    assert {(status, wait) for _, status, _, wait in told[2:]} == {(503, "1")}
    assert max(seconds for _, _, seconds, _ in told) < 6
    assert connections.refused - refused_before == len(surplus)
    assert not [request for request in house.upstream.requests if "surplus" in request.prompt]

    gate.open()
    assert [(one.code, one.content, one.done) for one in await asyncio.gather(*streams)] == [
        ("ok", WORDS, True)
    ] * SHARE
    await until(lambda: not connections.in_use)
    assert connections.waiting == 0
    balance = await house.balance(hog, live=True)
    records = await house.records(hog)
    assert balance.held == 0
    assert balance.spent == sum(record.cost for record in records)
    assert len(records) == SHARE
    assert await house.concurrency(hog, live=True) == 0
    last = await house.ask("rest", hog.live, text_body("Hello", max_tokens=20))
    assert int(last.headers["x-ratelimit-remaining"]) == 1_000 - SHARE - 1, "a refused call uses up nothing"
    found = await audit(house.server.store)
    assert not found.findings
    assert (found.difference_micros, found.holds) == (0, 0)


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_caller_who_leaves_while_waiting_leaves_the_queue_immediately(
    house: RunningApp, way: str
) -> None:
    connections = house.server.connections
    caller = await house.account()
    gate = Gate()
    house.upstream.when(f"stay {way}", Answer(WORDS, at={1: gate}))
    streams = [
        asyncio.create_task(house.ask(way, caller.live, text_body(f"stay {way}", max_tokens=20), stream=True))
        for _ in range(SHARE)
    ]
    await until(lambda: connections.in_use == SHARE)
    refused = connections.refused
    waiting = [
        asyncio.create_task(
            house.ask(way, caller.live, text_body(f"left {way}", max_tokens=20), stream=stream)
        )
        for stream in (False, True)
    ]
    await until(lambda: connections.waiting == 2)
    for call in waiting:
        call.cancel()
    await until(lambda: not connections.waiting)
    assert connections.refused == refused, "they left, and were not refused"
    await asyncio.gather(*waiting, return_exceptions=True)
    gate.open()
    await asyncio.gather(*streams)
    await until(lambda: not connections.in_use)
    assert not [request for request in house.upstream.requests if f"left {way}" in request.prompt]
    balance = await house.balance(caller, live=True)
    assert balance.held == 0
    assert len(await house.records(caller)) == SHARE


async def test_every_kind_of_task_gets_by_with_one_connection(tmp_path: Path) -> None:
    async with run_app(tmp_path, upstream_connections=1) as house:
        caller = await house.account()
        told = await asyncio.gather(
            *[
                house.ask(way, caller.live, body, stream=stream)
                for way in PROTOCOLS
                for body in TASK_BODIES.values()
                for stream in (False, True)
            ]
        )
        assert [one.code for one in told] == ["ok"] * len(told)
        assert house.server.connections.waited > 0
        assert house.server.connections.in_use == house.server.connections.waiting == 0
