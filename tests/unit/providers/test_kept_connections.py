"""On which connection a request goes out, and which requests are sent again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from pomelo.errors import PomeloError
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http import pool
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.errors import ErrorMapping
from tests.breaking_proxy import BreakingProxy, breaking_proxy
from tests.unit.providers.raw_server import CHAT, OK, PAID, Peer, raw_server, sends
from tests.waiting import cancel, until


@dataclass
class Server:
    """An HTTP server: where it is, and what it got: method, size of the body, number of the connection."""

    url: str = ""
    received: list[tuple[str, int, int]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)


@pytest.fixture(name="server")
async def _server() -> AsyncIterator[Server]:
    server, connections = Server(), []

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        if request.transport not in connections:
            connections.append(request.transport)
        server.received.append((request.method, len(body), connections.index(request.transport)))
        server.headers.append(request.headers)
        return web.json_response({})

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = "http://{}:{}/".format(*runner.addresses[0])
    yield server
    await runner.cleanup()


@pytest.fixture(name="proxy")
async def _proxy(server: Server) -> AsyncIterator[BreakingProxy]:
    async with breaking_proxy(server.url) as opened:
        yield opened


@pytest.fixture(name="http")
async def _http() -> AsyncIterator[Http]:
    async with Http(Timeouts(connect=1, silence=2, whole=2)) as opened:
        yield opened


def form() -> aiohttp.MultipartWriter:
    """A form of one field."""
    writer = aiohttp.MultipartWriter("form-data")
    writer.append(b"x" * 1000).set_content_disposition("form-data", name="file")
    return writer


async def test_requests_that_may_be_repeated_share_a_connection(server: Server, http: Http) -> None:
    for body in (b"{}", None, b"{}"):
        await http.request_json(URL(server.url), {}, body, CHAT)
    assert {connection for _, _, connection in server.received} == {0}


@pytest.mark.parametrize(("make", "error_mapping"), [(lambda: b"{}", PAID), (form, PAID), (form, CHAT)])
async def test_a_request_that_must_not_be_repeated_has_its_own_connection(
    server: Server, http: Http, make: Any, error_mapping: ErrorMapping
) -> None:
    await http.request_json(URL(server.url), {}, b"{}", CHAT)
    for _ in range(3):
        await http.request_json(URL(server.url), {}, make(), error_mapping)
    assert [connection for _, _, connection in server.received] == [0, 1, 2, 3]
    assert [headers.get("Connection") for headers in server.headers] == [None, "close", "close", "close"]


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("size", [2, 3_000_000])
async def test_a_request_on_a_connection_that_breaks_is_sent_again_on_a_new_one(
    server: Server, proxy: BreakingProxy, http: Http, size: int, resets: bool
) -> None:
    proxy.resets = resets
    for _ in range(4):
        await http.request_json(URL(proxy.url), {}, b"x" * size, CHAT)
    assert [(method, got) for method, got, _ in server.received] == [("POST", size)] * 4
    assert proxy.broken == 2
    assert [headers.get("Connection") for headers in server.headers].count("close") == 2


async def test_of_several_kept_connections_the_one_that_was_used_last_is_used(http: Http) -> None:
    """The others become idle, and are closed."""
    second = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.request()
        if peer is server.peers[0]:
            await second.wait()
        peer.writer.write(OK)
        await peer.request()
        peer.writer.write(OK)

    async with raw_server(answer) as server:
        first = asyncio.create_task(http.request_json(server.url, {}, b"{}", CHAT))
        await until(lambda: server.peers and server.peers[0].head)
        await http.request_json(server.url, {}, b"{}", CHAT)
        second.set()
        await first
        await http.request_json(server.url, {}, b'{"last": 1}', CHAT)
        assert [peer.body for peer in server.peers] == [b'{"last": 1}', b"{}"]


async def test_several_broken_connections_cost_a_request_only_one_more_attempt(
    proxy: BreakingProxy, http: Http
) -> None:
    asked = (http.request_json(URL(proxy.url), {}, b"{}", CHAT) for _ in range(5))
    await asyncio.gather(*asked)
    assert proxy.connections == 5, "all are kept now"
    await http.request_json(URL(proxy.url), {}, b"{}", CHAT)
    assert (proxy.connections, proxy.broken) == (6, 1)


async def test_a_charged_request_is_never_sent_twice_and_works_beside_broken_connections(
    server: Server, proxy: BreakingProxy, http: Http
) -> None:
    proxy.forwards = True
    for _ in range(2):
        await http.request_json(URL(proxy.url), {}, b"{}", PAID)
        await http.request_json(URL(proxy.url), {}, None, PAID)
    assert [method for method, _, _ in server.received if method == "POST"] == ["POST"] * 2


async def test_a_request_on_a_broken_new_connection_is_not_retried(http: Http) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(1)
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        url = URL("http://{}:{}/".format(*listener.sockets[0].getsockname()))
        for error_mapping, retry in ((CHAT, RetryPolicy.SAME_ROUTE), (PAID, RetryPolicy.NEVER)):
            with pytest.raises(UpstreamError) as failure:
                await http.request_json(url, {}, b"{}", error_mapping)
            assert (failure.value.code, failure.value.retry) == ("provider_unavailable", retry)
    assert connections == 2


async def test_a_truncated_response_on_a_kept_connection_is_not_requested_again(http: Http) -> None:
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"{}"):
                requests += 1
                body = b"{}" if requests == 1 else b"{"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)
                if requests == 2:
                    writer.close()
                    return

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        url = URL("http://{}:{}/".format(*listener.sockets[0].getsockname()))
        await http.request_json(url, {}, b"{}", CHAT)
        with pytest.raises(PomeloError) as failure:
            await http.request_json(url, {}, b"{}", CHAT)
    assert failure.value.code == "provider_failed"
    assert requests == 2


async def test_an_idle_connection_is_closed_before_common_servers_close_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.KEEPALIVE < 5
    monkeypatch.setattr(pool, "KEEPALIVE", 0.05)
    async with Http() as http:
        for _ in range(2):
            await http.request_json(URL(server.url), {}, b"{}", CHAT)
            await asyncio.sleep(0.1)
    assert [connection for _, _, connection in server.received] == [0, 1]


@pytest.mark.parametrize(
    "received",
    [b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\nContent-Length: 2", b"HTTP/1.1 102 Processing\r\n\r\n"],
    ids=["a part of the first line", "a head without its end", "an interim response"],
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
async def test_a_request_is_not_sent_again_once_the_vendor_has_begun_to_answer(
    received: bytes, kept: bool
) -> None:
    async with raw_server(sends(*[OK] * kept, received)) as server, Http() as http:
        if kept:
            await http.request_json(server.url, {}, b"{}", CHAT)
        with pytest.raises(UpstreamError) as caught:
            await http.request_json(server.url, {}, b"{}", CHAT)
    assert (caught.value.code, caught.value.retry) == ("provider_failed", RetryPolicy.NEVER)
    assert caught.value.reason == "the vendor's response broke off"
    assert len(server.peers) == 1


async def test_idle_connections_are_closed_without_a_further_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "KEEPALIVE", 0.1)
    gates = asyncio.Event(), asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.request()
        await gates[server.peers.index(peer)].wait()
        peer.writer.write(OK)
        await peer.reader.read()

    async with raw_server(answer) as server, Http() as http:
        asked = [asyncio.create_task(http.request_json(server.url, {}, b"{}", CHAT)) for _ in gates]
        await until(lambda: len(server.peers) == 2)
        gates[0].set()
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.05)  # so that they expire one after the other
        gates[1].set()
        await asyncio.gather(*asked)
        for peer in server.peers:
            assert await peer.left()


async def test_a_call_that_is_cancelled_while_certificates_are_loaded_cancels_no_other(http: Http) -> None:
    async with raw_server(sends()) as server:
        url = server.url.with_scheme("https")
        first = asyncio.create_task(http.request_json(url, {}, b"{}", CHAT))
        await asyncio.sleep(0)
        await cancel(first)
        with pytest.raises(UpstreamError):
            await http.request_json(url, {}, b"{}", CHAT)
