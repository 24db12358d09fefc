"""A thousand tasks at once, over both wires: exactly those run that can be paid and that the plan allows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.testing import FaultUpstream, Gate, Received, Reply, Speech
from tests.faults.books import Books
from tests.faults.callers import Grpc, Rest, Told, callers
from tests.faults.house import SERVE, House, Process
from tests.redis_server import RedisServer

STORES = ("one process on SQLite", "two workers on Redis")

TASKS = 1000
PRICE = 10_000
"""Microcredits of 125 characters of speech."""

PLANS = """
[plans.hundred]
requests_per_minute = 100

[plans.fifty]
concurrent_requests = 50
"""

pytestmark = pytest.mark.timeout(300)


def speech(name: str) -> dict[str, Any]:
    """A task of that price."""
    return {"model": "eleven-labs-tts", "text": f"{name} ".ljust(124, "o") + ".", "voice": "adam"}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Mapping[str, str]]:
    """The variables of each store, and of as many workers as it can have."""
    if request.param == STORES[0]:
        yield {}
        return
    with RedisServer() as server:
        yield {"POMELO_STORE": server.url, "POMELO_WORKERS": "2"}


@pytest.fixture
def vendor(upstream: FaultUpstream) -> Iterator[FaultUpstream]:
    """The playing vendors, with nothing set and nothing asked yet."""
    upstream.reset()
    yield upstream
    upstream.default = None
    upstream.reset()


def hold_back(vendor: FaultUpstream) -> Gate:
    """From now on the vendor says nothing until the gate opens."""
    gate = Gate()

    def speak(received: Received) -> Reply:
        return Speech(before=(gate,))(received)

    vendor.default = speak
    return gate


@asynccontextmanager
async def served(
    folder: Path, vendor: FaultUpstream, store: Mapping[str, str], micros: int, plan: str
) -> AsyncIterator[tuple[House, Process, tuple[Rest, Grpc]]]:
    """A server, an account on that plan with so many microcredits, and callers on both wires."""
    (folder / "pomelo.toml").write_text(PLANS)
    house = House(folder, vendor, SERVE, POMELO_CONFIG=str(folder / "pomelo.toml"), **store)
    async with await house.prepare(micros, plan):
        process = await house.start()
        async with callers(process.rest, process.grpc, house.key, at_once=TASKS // 2) as wires:
            yield house, process, wires


def all_at_once(wires: tuple[Rest, Grpc], name: str) -> list[asyncio.Task[Told]]:
    """So many tasks, in turn over each wire, whole and as streams."""
    return [
        asyncio.create_task(wires[one % 2](speech(f"{name}.{one}"), f"{name}.{one}", stream=one % 4 < 2))
        for one in range(TASKS)
    ]


async def ended(tasks: list[asyncio.Task[Told]], count: int) -> list[Told]:
    """What the first so many were told."""
    told = []
    async with asyncio.timeout(120):
        for task in asyncio.as_completed(tasks):
            told.append(await task)
            if len(told) == count:
                break
    return told


async def asked(vendor: FaultUpstream, count: int) -> list[Received]:
    """The next so many requests that the vendor gets."""
    async with asyncio.timeout(120):
        return [await vendor.received() for _ in range(count)]


def check_refused(told: list[Told], code: str, http: int, status: grpc.StatusCode) -> None:
    """All were refused, each wire in its own words."""
    assert Counter(one.code for one in told) == {code: len(told)}
    assert {one.status for one in told} == {http, status}


async def look(process: Process, house: House) -> tuple[dict[str, Any], Mapping[str, str]]:
    """What the account is told of itself, and its headers."""
    headers = {"Authorization": f"Bearer {house.key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{process.rest}/api/v1/account", headers=headers) as answer,
    ):
        assert answer.status == 200
        return await answer.json(), answer.headers


async def close(process: Process, house: House) -> Books:
    """Ends the server; its books, which add up, with nothing held."""
    process.process.terminate()
    assert await process.ended() == 0
    books = await house.books()
    books.check_idle()
    return books


async def test_of_a_thousand_tasks_at_once_exactly_those_run_that_can_be_paid(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    gate = hold_back(vendor)
    async with served(tmp_path, vendor, store, 100 * PRICE, "unlimited") as (house, process, wires):
        tasks = all_at_once(wires, "paid")
        refused = await ended(tasks, TASKS - 100)
        check_refused(refused, "insufficient_credits", 402, grpc.StatusCode.FAILED_PRECONDITION)
        await asked(vendor, 100)
        account, headers = await look(process, house)
        assert headers["X-Credits-Remaining"] == "0", account
        gate.open()
        told = await asyncio.gather(*tasks)
        assert Counter(one.code for one in told) == {"ok": 100, "insufficient_credits": 900}
        late = await wires[0](speech("late"), "late")
        assert late.code == "insufficient_credits"
        books = await close(process, house)
        assert len(vendor.requests) == 100
        assert books.balance == {"granted": 100 * PRICE, "spent": 100 * PRICE, "held": 0, "available": 0}
        assert set(books.records) == {one.request_id for one in told if one.whole}
        assert {record["cost"] for (record,) in books.records.values()} == {PRICE}


async def test_of_a_thousand_tasks_at_once_exactly_as_many_run_as_a_minute_allows(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    gate = hold_back(vendor)
    async with served(tmp_path, vendor, store, 10 * TASKS * PRICE, "hundred") as (house, process, wires):
        tasks = all_at_once(wires, "minute")
        refused = await ended(tasks, TASKS - 100)
        check_refused(refused, "rate_limit_exceeded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED)
        bad = [one for one in refused if "x-ratelimit-remaining" not in one.headers]
        assert not bad, (len(bad), bad[:2])
        assert {one.headers["x-ratelimit-remaining"] for one in refused} == {"0"}
        await asked(vendor, 100)
        gate.open()
        told = await asyncio.gather(*tasks)
        assert Counter(one.code for one in told) == {"ok": 100, "rate_limit_exceeded": 900}
        late = await wires[1](speech("late"), "late")
        assert late.code == "rate_limit_exceeded"
        books = await close(process, house)
        assert len(vendor.requests) == 100
        assert books.balance["spent"] == 100 * PRICE
        assert len(books.records) == 100


async def test_of_a_thousand_tasks_at_once_exactly_as_many_run_as_there_are_slots_and_none_is_lost(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    async with served(tmp_path, vendor, store, 10 * TASKS * PRICE, "fifty") as (house, process, wires):
        finished = 0
        for wave in range(3):
            gate = hold_back(vendor)
            tasks = all_at_once(wires, f"slots.{wave}")
            refused = await ended(tasks, TASKS - 50)
            check_refused(refused, "concurrency_limit_exceeded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED)
            running = await asked(vendor, 50)
            _, headers = await look(process, house)
            assert headers["X-RateLimit-Remaining-Concurrent"] == "0"
            leaving = [task for task in tasks if not task.done()][::2]
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            await free(process, house, len(leaving))
            gate.open()
            told = [await task for task in tasks if task not in leaving]
            assert Counter(one.code for one in told) == {"ok": 25, "concurrency_limit_exceeded": 950}
            finished += 25
            assert len(running) == 50
        await free(process, house, 50)
        books = await close(process, house)
        assert len(vendor.requests) == 150
        assert books.balance["spent"] == finished * PRICE
        assert len(books.records) == finished


async def free(process: Process, house: House, count: int) -> None:
    """Returns when exactly so many slots are free."""
    async with asyncio.timeout(30):
        while (await look(process, house))[1]["X-RateLimit-Remaining-Concurrent"] != str(count):
            pass
