"""A thousand concurrent tasks over both protocols: exactly as many run as credits and limits allow."""

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
from tests.faults.drivers import GrpcDriver, Outcome, RestDriver, open_drivers
from tests.faults.server_process import SERVE, Deployment, ServerProcess
from tests.redis_server import RedisServer

STORES = ("one process on SQLite", "two workers on Redis")

TASKS = 1000
PRICE = 10_000
"""Microcredits of a text of 125 characters."""

PLANS = """
[plans.hundred]
requests_per_minute = 100

[plans.fifty]
concurrent_requests = 50
"""

pytestmark = pytest.mark.timeout(300)


def speech(name: str) -> dict[str, Any]:
    """A text-to-speech task that costs PRICE."""
    return {"model": "eleven-labs-tts", "text": f"{name} ".ljust(124, "o") + ".", "voice": "adam"}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Mapping[str, str]]:
    """Environment variables that select the store and the number of workers."""
    if request.param == STORES[0]:
        yield {}
        return
    with RedisServer() as server:
        yield {"POMELO_STORE": server.url, "POMELO_WORKERS": "2"}


@pytest.fixture
def vendor(upstream: FaultUpstream) -> Iterator[FaultUpstream]:
    """The fault upstream without scripts or received requests."""
    upstream.reset()
    yield upstream
    upstream.default = None
    upstream.reset()


def block_responses(vendor: FaultUpstream) -> Gate:
    """Makes the vendor wait with its responses until the gate opens."""
    gate = Gate()

    def script(received: Received) -> Reply:
        return Speech(before=(gate,))(received)

    vendor.default = script
    return gate


@asynccontextmanager
async def served(
    folder: Path, vendor: FaultUpstream, store: Mapping[str, str], micros: int, plan: str
) -> AsyncIterator[tuple[Deployment, ServerProcess, tuple[RestDriver, GrpcDriver]]]:
    """A server, an account with this plan and balance, and a driver for each protocol."""
    (folder / "pomelo.toml").write_text(PLANS)
    deployment = Deployment(folder, vendor, SERVE, POMELO_CONFIG=str(folder / "pomelo.toml"), **store)
    async with await deployment.prepare(micros, plan):
        process = await deployment.start()
        async with open_drivers(
            process.rest, process.grpc, deployment.key, concurrency=TASKS // 2
        ) as drivers:
            yield deployment, process, drivers


def start_tasks(drivers: tuple[RestDriver, GrpcDriver], name: str) -> list[asyncio.Task[Outcome]]:
    """Starts TASKS tasks: half of them over each protocol, half of each as streams."""
    return [
        asyncio.create_task(drivers[n % 2](speech(f"{name}.{n}"), f"{name}.{n}", stream=n % 4 < 2))
        for n in range(TASKS)
    ]


async def first_outcomes(tasks: list[asyncio.Task[Outcome]], count: int) -> list[Outcome]:
    """The outcomes of the first `count` tasks that end."""
    outcomes = []
    async with asyncio.timeout(120):
        for task in asyncio.as_completed(tasks):
            outcomes.append(await task)
            if len(outcomes) == count:
                break
    return outcomes


async def vendor_requests(vendor: FaultUpstream, count: int) -> list[Received]:
    """The next `count` requests that the vendor receives."""
    async with asyncio.timeout(120):
        return [await vendor.received() for _ in range(count)]


def check_refused(outcomes: list[Outcome], code: str, http: int, status: grpc.StatusCode) -> None:
    """Checks that all were refused with this error, over both protocols."""
    assert Counter(outcome.code for outcome in outcomes) == {code: len(outcomes)}
    assert {outcome.status for outcome in outcomes} == {http, status}


async def get_account(
    process: ServerProcess, deployment: Deployment
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The account, and the headers of the response."""
    headers = {"Authorization": f"Bearer {deployment.key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{process.rest}/api/v1/account", headers=headers) as answer,
    ):
        assert answer.status == 200
        return await answer.json(), answer.headers


async def stop(process: ServerProcess, deployment: Deployment) -> Books:
    """Terminates the server, checks its books, and returns them."""
    process.process.terminate()
    assert await process.wait() == 0
    books = await deployment.books()
    books.check_idle()
    return books


async def test_exactly_as_many_concurrent_tasks_run_as_credits_allow(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    gate = block_responses(vendor)
    async with served(tmp_path, vendor, store, 100 * PRICE, "unlimited") as (deployment, process, drivers):
        tasks = start_tasks(drivers, "credits")
        refused = await first_outcomes(tasks, TASKS - 100)
        check_refused(refused, "insufficient_credits", 402, grpc.StatusCode.FAILED_PRECONDITION)
        await vendor_requests(vendor, 100)
        account, headers = await get_account(process, deployment)
        assert headers["X-Credits-Remaining"] == "0", account
        gate.open()
        outcomes = await asyncio.gather(*tasks)
        assert Counter(outcome.code for outcome in outcomes) == {"ok": 100, "insufficient_credits": 900}
        late = await drivers[0](speech("late"), "late")
        assert late.code == "insufficient_credits"
        books = await stop(process, deployment)
        assert len(vendor.requests) == 100
        assert books.balance == {"granted": 100 * PRICE, "spent": 100 * PRICE, "held": 0, "available": 0}
        assert set(books.records) == {outcome.request_id for outcome in outcomes if outcome.complete}
        assert {record["cost"] for (record,) in books.records.values()} == {PRICE}


async def test_exactly_as_many_concurrent_tasks_run_as_the_minute_limit_allows(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    gate = block_responses(vendor)
    async with served(tmp_path, vendor, store, 10 * TASKS * PRICE, "hundred") as (
        deployment,
        process,
        drivers,
    ):
        tasks = start_tasks(drivers, "minute")
        refused = await first_outcomes(tasks, TASKS - 100)
        check_refused(refused, "rate_limit_exceeded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED)
        missing = [outcome for outcome in refused if "x-ratelimit-remaining" not in outcome.headers]
        assert not missing, (len(missing), missing[:2])
        assert {outcome.headers["x-ratelimit-remaining"] for outcome in refused} == {"0"}
        await vendor_requests(vendor, 100)
        gate.open()
        outcomes = await asyncio.gather(*tasks)
        assert Counter(outcome.code for outcome in outcomes) == {"ok": 100, "rate_limit_exceeded": 900}
        late = await drivers[1](speech("late"), "late")
        assert late.code == "rate_limit_exceeded"
        books = await stop(process, deployment)
        assert len(vendor.requests) == 100
        assert books.balance["spent"] == 100 * PRICE
        assert len(books.records) == 100


async def test_exactly_as_many_concurrent_tasks_run_as_the_concurrency_limit_allows(
    tmp_path: Path, vendor: FaultUpstream, store: Mapping[str, str]
) -> None:
    async with served(tmp_path, vendor, store, 10 * TASKS * PRICE, "fifty") as (deployment, process, drivers):
        finished = 0
        for wave in range(3):
            gate = block_responses(vendor)
            tasks = start_tasks(drivers, f"concurrent.{wave}")
            refused = await first_outcomes(tasks, TASKS - 50)
            check_refused(refused, "concurrency_limit_exceeded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED)
            running = await vendor_requests(vendor, 50)
            _, headers = await get_account(process, deployment)
            assert headers["X-RateLimit-Remaining-Concurrent"] == "0"
            cancelled = [task for task in tasks if not task.done()][::2]
            for task in cancelled:
                task.cancel()
            await asyncio.gather(*cancelled, return_exceptions=True)
            await wait_for_free(process, deployment, len(cancelled))
            gate.open()
            outcomes = [await task for task in tasks if task not in cancelled]
            assert Counter(outcome.code for outcome in outcomes) == {
                "ok": 25,
                "concurrency_limit_exceeded": 950,
            }
            finished += 25
            assert len(running) == 50
        await wait_for_free(process, deployment, 50)
        books = await stop(process, deployment)
        assert len(vendor.requests) == 150
        assert books.balance["spent"] == finished * PRICE
        assert len(books.records) == finished


async def wait_for_free(process: ServerProcess, deployment: Deployment, count: int) -> None:
    """Returns when exactly `count` more tasks may run concurrently."""
    async with asyncio.timeout(30):
        while (await get_account(process, deployment))[1]["X-RateLimit-Remaining-Concurrent"] != str(count):
            pass
