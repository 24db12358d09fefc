"""Every request gives its place among the connections to a vendor back, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from yarl import URL

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from tests.unit.providers.raw_server import CHAT, OK, RawServer, raw_server, sends
from tests.waiting import cancel

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
REFUSED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"

Request = Callable[[Http, URL], Awaitable[object]]


async def whole(http: Http, url: URL) -> object:
    return await http.request_json(url, {}, b"{}", CHAT)


async def stream(http: Http, url: URL) -> object:
    async with http.stream_events(url, {}, b"{}", CHAT) as events:
        return await events.read()


REQUEST = pytest.mark.parametrize("request_of", [whole, stream])


def is_idle(limiter: ConnectionLimiter) -> bool:
    """Whether no connection is in use, and no host is remembered."""
    return not limiter.in_use and not limiter._hosts


@REQUEST
@pytest.mark.parametrize("response", [OK, HEAD, REFUSED, b"no HTTP\r\n\r\n", b""])
async def test_a_request_that_ends_gives_its_place_back(request_of: Request, response: bytes) -> None:
    limiter = ConnectionLimiter()
    async with raw_server(sends(response)) as server, Http(connections=limiter) as http:
        with suppress(UpstreamError):
            await request_of(http, server.url)
        assert is_idle(limiter)


@REQUEST
async def test_a_request_to_nobody_gives_its_place_back(request_of: Request) -> None:
    limiter = ConnectionLimiter()
    async with raw_server(sends()) as server:
        url = server.url
    async with Http(connections=limiter) as http:
        for wrong in (url, URL("ftp://127.0.0.1/")):
            with pytest.raises(UpstreamError):
                await request_of(http, wrong)
    assert is_idle(limiter)


@REQUEST
@pytest.mark.parametrize("response", [b"", HEAD], ids=["before the head", "within the body"])
async def test_a_request_that_is_cancelled_gives_its_place_back(request_of: Request, response: bytes) -> None:
    limiter = ConnectionLimiter()

    async def arrived(server: RawServer) -> None:
        while not (server.peers and server.peers[0].head):  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0)

    timeouts = Timeouts(silence=30, whole=30)
    async with (
        raw_server(sends(response, close=False)) as server,
        Http(timeouts, connections=limiter) as http,
    ):
        asking = asyncio.ensure_future(request_of(http, server.url))
        async with asyncio.timeout(20):
            await arrived(server)
            for _ in range(5):  # the response arrives, and is waited for
                await asyncio.sleep(0)
        assert limiter.in_use == 1
        await cancel(asking)
        assert is_idle(limiter)
