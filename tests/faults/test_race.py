"""A thousand concurrent tasks over both protocols: exactly as many run as credits and limits allow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.testing import FaultUpstream, Gate, Speech
from tests.faults.books import Books
from tests.faults.drivers import GrpcDriver, Outcome, RestDriver
from tests.faults.server_process import SERVE, Deployment, ServerProcess
from tests.faults.vendor import Vendor
from tests.redis_server import RedisServer
from tests.tasks import TASK_BODIES
from tests.waiting import first

STORES = ("one process on SQLite", "two workers on Redis")

TASKS = 1000
MAX_CALLS = {STORES[0]: TASKS, STORES[1]: 200}
"""Concurrent calls. Redis has 0.9 s for each, which a thousand concurrent calls exceed on a busy machine."""
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
    return TASK_BODIES["tts"] | {"text": f"{name} ".ljust(124, "o") + "."}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A store, and the environment variables that select it and the number of workers."""
    if request.param == STORES[0]:
        yield STORES[0], {}
        return
    with RedisServer() as server:
        yield STORES[1], {"POMELO_STORE": server.url, "POMELO_WORKERS": "2"}


class Server:
    """A server, its account, and a driver for each protocol; `upstream` is its vendor."""

    def __init__(
        self,
        deployment: Deployment,
        process: ServerProcess,
        drivers: tuple[RestDriver, GrpcDriver],
        upstream: FaultUpstream,
        max_calls: int,
    ) -> None:
        self._deployment = deployment
        self._process = process
        self.drivers = drivers
        self._upstream = upstream
        self._room = asyncio.Semaphore(max_calls)

    def start_tasks(self, name: str) -> list[asyncio.Task[Outcome]]:
        """Starts TASKS tasks: half of them over each protocol, half of each as streams."""

        async def run(n: int) -> Outcome:
            async with self._room:
                return await self.drivers[n % 2](speech(f"{name}.{n}"), f"{name}.{n}", stream=n % 4 < 2)

        return [asyncio.create_task(run(n)) for n in range(TASKS)]

    async def received(self, count: int) -> None:
        """Returns when the vendor has received `count` more requests."""
        async with asyncio.timeout(120):
            for _ in range(count):
                await self._upstream.received()

    async def account_headers(self) -> Mapping[str, str]:
        headers = {"Authorization": f"Bearer {self._deployment.key}"}
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self._process.rest}/api/v1/account", headers=headers) as answer,
        ):
            assert answer.status == 200
            return answer.headers

    async def wait_for_free(self, count: int) -> None:
        """Returns when exactly `count` more tasks may run concurrently."""
        name, expected = "X-RateLimit-Remaining-Concurrent", str(count)
        await first(self.account_headers, lambda headers: headers[name] == expected)

    async def stop(self, requests: int) -> Books:
        """Terminates the server, checks its books and the number of requests to the vendor; returns the books."""
        self._process.process.terminate()
        assert await self._process.wait() == 0
        books = await self._deployment.books()
        books.check_idle()
        assert len(self._upstream.requests) == requests
        return books


Open = Callable[[int, str], AbstractAsyncContextManager[Server]]


@pytest.fixture
def serving(
    tmp_path: Path, upstream: FaultUpstream, vendor: Vendor, store: tuple[str, Mapping[str, str]]
) -> Open:
    """Returns a function that starts a server whose account has these microcredits and this plan."""
    config = tmp_path / "pomelo.toml"
    config.write_text(PLANS)

    @asynccontextmanager
    async def start(micros: int, plan: str) -> AsyncIterator[Server]:
        deployment = Deployment(tmp_path, upstream, *SERVE, POMELO_CONFIG=str(config), **store[1])
        async with await deployment.prepare(micros, plan):
            process = await deployment.start()
            async with process.drivers(TASKS // 2) as drivers:
                yield Server(deployment, process, drivers, upstream, MAX_CALLS[store[0]])

    return start


async def first_outcomes(tasks: list[asyncio.Task[Outcome]], count: int) -> list[Outcome]:
    """The outcomes of the first `count` tasks that end."""
    outcomes = []
    async with asyncio.timeout(120):
        for task in asyncio.as_completed(tasks):
            outcomes.append(await task)
            if len(outcomes) == count:
                break
    return outcomes


def hold(vendor: Vendor) -> Gate:
    """Makes the vendor wait with its responses until the gate opens."""
    gate = Gate()
    vendor.speech = Speech(before=(gate,))
    return gate


def check_refused(outcomes: list[Outcome], code: str, http: int, status: grpc.StatusCode) -> None:
    """Checks that all were refused with this error, over both protocols."""
    assert Counter(outcome.code for outcome in outcomes) == {code: len(outcomes)}
    assert {outcome.status for outcome in outcomes} == {http, status}


@pytest.mark.parametrize(
    ("micros", "plan", "code", "http", "status", "header"),
    [
        (
            100 * PRICE, "unlimited", "insufficient_credits",
            402, grpc.StatusCode.FAILED_PRECONDITION, "x-credits-remaining",
        ),
        (
            10 * TASKS * PRICE, "hundred", "rate_limit_exceeded",
            429, grpc.StatusCode.RESOURCE_EXHAUSTED, "x-ratelimit-remaining",
        ),
    ],
    ids=["credits", "minute limit"],
)  # fmt: skip
async def test_exactly_as_many_concurrent_tasks_run_as_credits_or_the_minute_limit_allow(
    micros: int,
    plan: str,
    code: str,
    http: int,
    status: grpc.StatusCode,
    header: str,
    serving: Open,
    vendor: Vendor,
) -> None:
    gate = hold(vendor)
    async with serving(micros, plan) as server:
        tasks = server.start_tasks("task")
        refused = await first_outcomes(tasks, TASKS - 100)
        check_refused(refused, code, http, status)
        assert {outcome.headers.get(header) for outcome in refused} == {"0"}
        await server.received(100)
        assert (await server.account_headers())[header] == "0"
        gate.open()
        outcomes = await asyncio.gather(*tasks)
        assert Counter(outcome.code for outcome in outcomes) == {"ok": 100, code: 900}
        for driver in server.drivers:
            assert (await driver(speech("late"), "late")).code == code
        books = await server.stop(requests=100)
        left = micros - 100 * PRICE
        expected = {"granted": micros, "spent": 100 * PRICE, "held": 0, "credit_limit": 0, "available": left}
        assert books.balance == expected
        assert set(books.records) == {outcome.request_id for outcome in outcomes if outcome.complete}
        assert {record["cost"] for (record,) in books.records.values()} == {PRICE}


async def test_exactly_as_many_concurrent_tasks_run_as_the_concurrency_limit_allows(
    serving: Open, vendor: Vendor
) -> None:
    async with serving(10 * TASKS * PRICE, "fifty") as server:
        for wave in range(3):
            gate = hold(vendor)
            tasks = server.start_tasks(f"concurrent.{wave}")
            refused = await first_outcomes(tasks, TASKS - 50)
            check_refused(refused, "concurrency_limit_exceeded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED)
            await server.received(50)
            assert (await server.account_headers())["X-RateLimit-Remaining-Concurrent"] == "0"
            cancelled = [task for task in tasks if not task.done()][::2]
            for task in cancelled:
                task.cancel()
            await asyncio.gather(*cancelled, return_exceptions=True)
            await server.wait_for_free(len(cancelled))
            gate.open()
            codes = Counter([(await task).code for task in tasks if task not in cancelled])
            assert codes == {"ok": 25, "concurrency_limit_exceeded": 950}
        await server.wait_for_free(50)
        books = await server.stop(requests=150)
        assert books.balance["spent"] == 75 * PRICE
        assert len(books.records) == 75
