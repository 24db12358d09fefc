"""Which connections are evicted when there are too many, and what their clients are sent."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from contextlib import AsyncExitStack, suppress

import pytest

from gateway.app import fit_connections
from tests.gateway.flow import open_clients
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import (
    ACCOUNT,
    BAD,
    GOOD,
    HEALTH,
    HI,
    raw_get,
    raw_task,
    read_response,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import play
from tests.waiting import until

KEPT = raw_task(HI, close=False)


async def is_overloaded(reader: asyncio.StreamReader) -> bool:
    """Reads the next response; returns whether it is the `overloaded` error of the error table."""
    status, headers, body = await read_response(reader)
    assert (headers["content-type"], headers["retry-after"]) == ("application/json", "1")
    assert headers["x-request-id"].startswith("req_")
    return (status, json.loads(body)["error"]["code"]) == (503, "overloaded")


async def test_untrusted_connections_are_evicted_before_trusted_ones(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(max_connections=2) as gateway,
        gateway.connect(ACCOUNT) as (caller, calls),
        gateway.connect() as (untrusted, _),
    ):
        assert await read_status(caller) == 200
        async with gateway.connect() as (new, news):
            assert await is_overloaded(untrusted)
            assert await read_until_closed(untrusted) == b""
            for reader, writer in ((new, news), (caller, calls)):
                writer.write(ACCOUNT)
                assert await read_status(reader) == 200


async def test_an_idle_connection_is_evicted_and_a_busy_one_is_not(open_gateway: OpenApp) -> None:
    started = asyncio.Event()
    async with open_gateway(max_connections=2) as gateway:
        gateway.provider.script = play(started.set, asyncio.Event().wait)
        async with gateway.connect(KEPT), gateway.connect() as (idle, others):
            await asyncio.wait_for(started.wait(), 20)
            others.write(ACCOUNT)
            assert await read_status(idle) == 200
            async with gateway.connect(ACCOUNT) as (new, _):
                assert await read_status(new) == 200
                assert await read_until_closed(idle) == b""
            assert not gateway.provider.closed.is_set()


async def test_the_connection_that_is_idle_the_longest_is_evicted(open_gateway: OpenApp) -> None:
    async with open_gateway(max_connections=2) as gateway, gateway.connect(ACCOUNT) as (first, asks):
        assert await read_status(first) == 200
        async with gateway.connect(ACCOUNT) as (second, _):
            assert await read_status(second) == 200
            asks.write(ACCOUNT)
            assert await read_status(first) == 200
            async with gateway.connect(ACCOUNT) as (third, _):
                assert await read_status(third) == 200
                assert await read_until_closed(second) == b""
                asks.write(ACCOUNT)
                assert await read_status(first) == 200


async def test_callers_by_links_are_distinguished_by_their_address(open_gateway: OpenApp) -> None:
    async with open_gateway(max_connections=3) as gateway, AsyncExitStack() as stack:
        link = raw_get((await gateway.link()).removeprefix(gateway.url))
        await gateway.http.close()
        idle = []
        for address in ("127.0.0.2", "127.0.0.1", "127.0.0.1"):
            reader, writer = await stack.enter_async_context(gateway.connect(link, local_addr=(address, 0)))
            assert await read_status(reader) == 200
            idle.append((reader, writer))
        async with gateway.connect(ACCOUNT) as (new, _):  # evicts one of the address that has the most
            assert await read_status(new) == 200
            assert await read_until_closed(idle[1][0]) == b""
        reader, writer = idle[0]
        writer.write(link)
        assert await read_status(reader) == 200


async def test_when_all_connections_are_busy_a_new_one_gets_overloaded_and_health_checks_are_served(
    open_gateway: OpenApp,
) -> None:
    started = asyncio.Event()
    async with open_gateway(max_connections=1, linger_timeout=5.0) as gateway:
        gateway.provider.script = play(started.set, asyncio.Event().wait)
        async with gateway.connect(KEPT):
            await asyncio.wait_for(started.wait(), 20)
            oversized = raw_task(b"x", framing="Content-Length: 1000000")
            similar = raw_get("/healthz-of-others")
            for data in (GOOD, ACCOUNT, BAD, oversized, similar, b"GET / HTTP/1.1\r\n\r\n"):
                async with gateway.connect(data) as (reader, writer):
                    assert await is_overloaded(reader)
                    writer.write(b"x" * 100_000)  # later bytes do not discard the response
            for _ in range(3):
                async with gateway.connect(HEALTH) as (reader, _):
                    status, headers, body = await read_response(reader)
                    assert headers["connection"] == "close"
                    assert (status, body) == (200, b'{"status":"ok"}')


async def test_a_client_that_has_yet_to_read_its_response_does_not_wait_for_the_server(
    gateway: GatewayApp,
) -> None:
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(BAD)
        await until(lambda: client.unread)
        assert client.connection.slot.busy
        assert not client.connection.slot.waiting


@pytest.mark.parametrize("busy", [False, True], ids=["untrusted", "surplus"])
async def test_a_health_check_is_not_evicted_by_later_connections(open_gateway: OpenApp, busy: bool) -> None:
    started = asyncio.Event()
    async with open_gateway(max_connections=2) as gateway, AsyncExitStack() as stack:
        gateway.provider.script = play(started.set, asyncio.Event().wait)
        if busy:
            for _ in range(2):
                started.clear()
                await stack.enter_async_context(gateway.connect(KEPT))
                await asyncio.wait_for(started.wait(), 20)
        reader, writer = await stack.enter_async_context(gateway.connect(HEALTH[:20]))
        others = [await stack.enter_async_context(gateway.connect(BAD[:20])) for _ in range(100)]
        assert await is_overloaded(others[0][0])
        writer.write(HEALTH[20:])
        assert await read_status(reader) == 200


async def test_slow_heads_of_one_address_are_limited_and_its_authenticated_callers_served(
    open_gateway: OpenApp,
) -> None:
    async with open_gateway(max_untrusted=3, untrusted_grace=0.2) as gateway, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(gateway.connect()) for _ in range(8)]
        for _, writer in slow:
            writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x")
        for reader, _ in slow[:5]:
            assert await is_overloaded(reader)
        assert await gateway.status_of(ACCOUNT) == 200
        for reader, writer in slow[5:]:
            writer.write(b"\r\n\r\n")
            assert await read_status(reader) == 404


async def test_concurrent_connections_of_one_address_are_all_served(open_gateway: OpenApp) -> None:
    async with open_gateway(max_untrusted=5, untrusted_grace=0.1) as gateway:

        async def send_request() -> int:
            async with gateway.connect() as (reader, writer):
                await asyncio.sleep(0.5)  # the client is slow to send its request
                writer.write(ACCOUNT)
                return await read_status(reader)

        assert set(await asyncio.gather(*[send_request() for _ in range(300)])) == {200}


async def test_the_connection_limit_fits_the_file_descriptor_limit(caplog: pytest.LogCaptureFixture) -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert fit_connections(files // 2) == files // 2
    assert not caplog.records
    assert fit_connections(files) == files // 2
    assert "POMELO_MAX_CONNECTIONS" in caplog.text


async def test_without_descriptors_an_unauthenticated_connection_is_evicted_and_accepting_continues(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway.connect() as (untrusted, _):
        while not await gateway.is_healthy():
            pass
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = [socket.create_connection((gateway.host, gateway.port)) for _ in range(4)]
        sockets: list[socket.socket] = []
        try:
            number = waiting[-1].fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, before[1]))
            with suppress(OSError):
                while True:
                    sockets.append(socket.socket())
            await until(lambda: "Raise the limit of open files" in caplog.text)
            assert await is_overloaded(untrusted)
            await asyncio.sleep(0.5)  # several further attempts to accept
            assert caplog.text.count("Raise the limit of open files") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in (*sockets, *waiting):
                each.close()
    assert await gateway.is_healthy()


async def test_an_evicted_idle_client_is_sent_nothing(open_gateway: OpenApp) -> None:
    async with open_gateway(max_connections=1) as gateway, gateway.connect(BAD) as (idle, _):
        assert await read_status(idle) == 401
        assert await gateway.status_of(ACCOUNT) == 200
        assert await read_until_closed(idle) == b""
