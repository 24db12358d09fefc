"""Connections that serve many requests: limits that apply to each request, and the order of eviction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import KEY, GatewayApp, OpenApp, text_events

BODY = json.dumps({"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}).encode()
AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
ACCOUNT = b"GET /api/v1/account HTTP/1.1\r\n" + AUTHORIZED + b"\r\n"
NO_KEY = b"GET /api/v1/account HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /api/v1/task HTTP/1.1\r\n" + AUTHORIZED + b"Content-Type: application/json\r\n"
TASK = POST + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def status(reader: asyncio.StreamReader) -> int:
    """Reads the next response; returns its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = head.partition("content-length: ")[2].partition("\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split()[1])


async def is_healthy(gateway: GatewayApp) -> bool:
    """Returns whether a health check on a new connection succeeds, once earlier data was processed."""
    async with gateway.connect(HEALTH) as (reader, _):
        return await status(reader) == 200


async def test_a_valid_key_resets_the_count_of_unauthenticated_requests(gateway: GatewayApp) -> None:
    asked = [NO_KEY] * 3 + [ACCOUNT] + [NO_KEY] * 3 + [ACCOUNT]
    async with gateway.connect(b"") as (reader, writer):
        for each in asked:
            writer.write(each)
            assert await status(reader) == (200 if each is ACCOUNT else 401)


async def test_the_size_of_each_request_head_is_limited_separately(gateway: GatewayApp) -> None:
    long = ACCOUNT[:-2] + b"X-Filler: " + b"x" * 7000
    async with gateway.connect(b"") as (reader, writer):
        for _ in range(6):
            writer.write(long)
            await writer.drain()
            assert await is_healthy(gateway)
            writer.write(b"\r\n\r\n")
            assert await status(reader) == 200


async def test_the_framing_of_each_body_is_limited_separately(gateway: GatewayApp) -> None:
    chunk = b"1;" + b"x" * 1000 + b"\r\n \r\n"
    framed = b"%x\r\n%b\r\n" % (len(BODY), BODY) + chunk * 400 + b"0\r\n\r\n"
    async with gateway.connect(b"") as (reader, writer):
        for _ in range(3):
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            await writer.drain()
            assert await is_healthy(gateway)
            writer.write(framed)
            assert await status(reader) == 200


async def test_the_connection_that_is_idle_the_longest_is_evicted(
    open_gateway: OpenApp,
) -> None:
    async with open_gateway(max_connections=2) as gateway, gateway.connect(ACCOUNT) as (first, asks):
        assert await status(first) == 200
        async with gateway.connect(ACCOUNT) as (second, _):
            assert await status(second) == 200
            asks.write(ACCOUNT)
            assert await status(first) == 200
            async with gateway.connect(ACCOUNT) as (third, _):
                assert await status(third) == 200
                with suppress(ConnectionError):
                    assert await second.read() == b""
                asks.write(ACCOUNT)
                assert await status(first) == 200


async def test_half_a_request_may_wait_while_the_previous_one_is_handled(open_gateway: OpenApp) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        started.set()
        await asyncio.sleep(0.6)  # longer than a head may take
        for event in text_events("late"):
            yield event

    async with open_gateway(head_timeout=0.4) as gateway:
        gateway.provider.script = script
        async with gateway.connect(TASK) as (reader, writer):
            await started.wait()
            writer.write(ACCOUNT[:20])
            assert await status(reader) == 200
            writer.write(ACCOUNT[20:])
            assert await status(reader) == 200


async def test_a_completed_slow_request_no_longer_counts_against_its_connection(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(max_untrusted=1, untrusted_grace=0.2) as gateway,
        gateway.connect(NO_KEY[:9]) as (reader, writer),
    ):
        assert await is_healthy(gateway)
        writer.write(NO_KEY[9:])
        assert await status(reader) == 401
        async with gateway.connect(b""), gateway.connect(b""):
            await asyncio.sleep(0.8)  # several checks of the address's connections
            writer.write(NO_KEY)
            assert await status(reader) == 401


@pytest.mark.parametrize("times", [1, 3])
async def test_every_refused_client_gets_time_to_read_its_response(open_gateway: OpenApp, times: int) -> None:
    async with open_gateway(max_connections=8) as gateway:  # one of them may wait for its client to read
        for _ in range(times):
            async with gateway.connect(b"GET / HTTP/1.1\r\n") as (reader, writer):
                for number in range(40):
                    writer.write(b"A%d: " % number + b"x" * 1000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
                assert await status(reader) == 400
                ended = asyncio.ensure_future(reader.read())
                assert await is_healthy(gateway)
                assert not ended.done()
                ended.cancel()
            assert await is_healthy(gateway)
