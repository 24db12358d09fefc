"""Listening: who is served first, whose port it is, and what closing the gateway ends."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket

import aiohttp
import pytest

from gateway.app import open_rest
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import HEALTH, HI, raw_get, raw_task, read_status, read_until_closed
from tests.gateway.scripts import play, word


async def test_health_checks_are_answered_before_the_requests_of_a_crowd(gateway: GatewayApp) -> None:
    # All of them wait in the kernel's queue when the server accepts the first one.
    sockets = [socket.create_connection((gateway.host, gateway.port)) for _ in range(201)]
    *crowd, health = sockets
    for each in crowd:
        each.sendall(raw_get("/nowhere"))
    health.sendall(HEALTH)
    health.setblocking(False)
    received = await asyncio.get_running_loop().sock_recv(health, 1000)
    answered, _, _ = select.select(crowd, [], [], 0)
    for each in sockets:
        each.close()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert len(answered) < 100


async def test_closing_the_gateway_ends_running_requests_and_frees_the_port(open_gateway: OpenApp) -> None:
    started = asyncio.Event()
    async with aiohttp.ClientSession() as client:
        async with open_gateway(drain_timeout=0.1) as gateway:
            gateway.provider.script = play(word(), started.set, asyncio.Event().wait)
            url = f"{gateway.url}/api/v1/task"
            response = await client.post(url, json={**HI, "stream": True}, headers=gateway.headers)
            await asyncio.wait_for(started.wait(), 5)
            begin = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begin < 5
        assert gateway.provider.closed.is_set()
        response.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(gateway.url)


@pytest.mark.parametrize(
    "data", [b"", raw_task(b"", key="bad", framing="Content-Length: 9")], ids=["silent", "refused"]
)
async def test_closing_the_gateway_closes_connections_without_a_request(
    open_gateway: OpenApp, data: bytes
) -> None:
    times = {"linger_timeout": 60.0, "untrusted_timeout": 60.0, "head_timeout": 60.0}
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(**times))
        async with gateway.connect(data) as (reader, _):
            assert not data or await read_status(reader) == 401
            assert await gateway.is_healthy()
            await stack.aclose()
            async with asyncio.timeout(5):
                assert await read_until_closed(reader) == b""


async def test_a_port_is_not_shared_unless_asked_for(gateway: GatewayApp) -> None:
    with pytest.raises(OSError, match="in use"):
        async with open_rest(gateway.services, None, gateway.host, gateway.port):
            pass
