"""The waits between the requests for a task that a vendor works on, and the failures that end them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http import polling
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from pomelo.providers.http.polling import MAX_FAILURES, UNKNOWN, poll
from tests.unit.providers.raw_server import Peer, raw_server, sends
from tests.unit.sleeps import Sleeps
from tests.waiting import until

MAPPING = ErrorMapping("acme", lambda body: ErrorBody(), statuses={404: "not_found"})
WORKING = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"on"}'
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
FAILED = b"HTTP/1.1 500 Failed\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
DENIED = b"HTTP/1.1 401 Denied\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(name="http")
async def _http() -> AsyncIterator[Http]:
    async with Http() as opened:
        yield opened


@pytest.fixture(name="waits")
def _waits(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    return Sleeps(monkeypatch)


async def polled(http: Http, waits: Sleeps, *responses: bytes, count: int = 1) -> list[Any]:
    """The first `count` statuses of a vendor that sends these responses, or those before an error and its code."""
    statuses: list[Any] = []
    waits.begin()
    async with raw_server(sends(*responses)) as server:
        try:
            async with aclosing(poll(http, server.url, {}, MAPPING, interval=2.0)) as answers:
                async for answer in answers:
                    statuses.append(answer["status"])
                    if len(statuses) == count:
                        break
        except UpstreamError as error:
            statuses.append(error.code)
    return statuses


async def test_requests_become_rarer_up_to_twice_the_interval(http: Http, waits: Sleeps) -> None:
    assert await polled(http, waits, *[WORKING] * 6, count=6) == ["on"] * 6
    assert waits == [2.0, 2.5, 3.125, 3.90625, 4.0, 4.0]


async def test_failures_are_retried_with_growing_waits_and_a_response_ends_their_row(
    http: Http, waits: Sleeps
) -> None:
    row = [FAILED] * MAX_FAILURES
    assert await polled(http, waits, *row, WORKING, *row, FAILED, count=2) == ["on", "provider_unavailable"]
    assert waits == [2.0, 4.0, 8.0, 16.0, 4.0, 4.0, 8.0, 16.0]


async def test_the_wait_that_the_vendor_asks_for_replaces_the_own_one(http: Http, waits: Sleeps) -> None:
    assert await polled(http, waits, BUSY, WORKING) == ["on"]
    assert waits == [2.0, 7.0]
    waits.clear()
    assert await polled(http, waits, BUSY.replace(b"7", b"1"), WORKING, WORKING, count=2) == ["on", "on"]
    assert waits == [2.0, 1.0, 2.5]


async def test_a_wait_that_the_vendor_asks_for_is_not_repeated(http: Http, waits: Sleeps) -> None:
    busy = BUSY.replace(b"7", b"60")
    assert await polled(http, waits, busy, MISSING, MISSING, WORKING, count=3) == [UNKNOWN, UNKNOWN, "on"]
    assert waits == [2.0, 60.0, 4.0, 4.0]


async def test_a_request_without_a_response_is_cut_off_and_retried(
    http: Http, waits: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "POLL_TIMEOUT", 0.05)
    waits.begin()

    async def silent(peer: Peer) -> None:
        await peer.reader.read()

    async with raw_server(silent) as server:
        with pytest.raises(UpstreamError) as failure:
            await anext(poll(http, server.url, {}, MAPPING, interval=2.0))
    assert failure.value.code == "deadline_exceeded"
    assert waits == [2.0, 4.0, 8.0, 16.0]


async def test_a_request_that_gets_no_connection_is_repeated_without_a_limit() -> None:
    limiter = ConnectionLimiter(1, max_wait=0.001)
    async with raw_server(sends(WORKING)) as server, Http(connections=limiter) as http:
        host = f"{server.url.raw_host}:{server.url.port}"
        await limiter.acquire(host, "another")
        async with aclosing(poll(http, server.url, {}, MAPPING, interval=0.001)) as answers:
            answer = asyncio.ensure_future(anext(answers))
            await until(lambda: limiter.refused > MAX_FAILURES + 1)
            limiter.release(host, "another")
            assert await answer == {"status": "on"}


def test_a_poll_takes_less_time_than_a_whole_response() -> None:
    assert polling.POLL_TIMEOUT <= 30 < Timeouts().whole


async def test_a_refusal_is_not_retried(http: Http, waits: Sleeps) -> None:
    assert await polled(http, waits, DENIED) == ["provider_failed"]
    assert waits == [2.0]


async def test_an_unknown_task_is_a_status(http: Http, waits: Sleeps) -> None:
    assert await polled(http, waits, MISSING, MISSING, WORKING, count=3) == [UNKNOWN, UNKNOWN, "on"]
    assert waits == [2.0, 2.0, 2.0]
