"""Connections that serve many requests: what is counted anew for each request, and which one is closed first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress

import pytest

from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.gateway.door import KEY, Door, words

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
BODY = json.dumps({"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}).encode()
AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
ACCOUNT = b"GET /api/v1/account HTTP/1.1\r\n" + AUTHORIZED + b"\r\n"
NO_KEY = b"GET /api/v1/account HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /api/v1/task HTTP/1.1\r\n" + AUTHORIZED + b"Content-Type: application/json\r\n"
TASK = POST + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def status(reader: asyncio.StreamReader) -> int:
    """The status of the next answer, whose body is read."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = head.partition("content-length: ")[2].partition("\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split()[1])


async def is_healthy(door: Door) -> bool:
    """Asks on a connection of its own, after everything that has arrived before."""
    async with door.talk(HEALTH) as (reader, _):
        return await status(reader) == 200


async def test_a_good_key_ends_the_count_of_requests_without_one(door: Door) -> None:
    asked = [NO_KEY] * 3 + [ACCOUNT] + [NO_KEY] * 3 + [ACCOUNT]
    async with door.talk(b"") as (reader, writer):
        for each in asked:
            writer.write(each)
            assert await status(reader) == (200 if each is ACCOUNT else 401)


async def test_heads_that_come_in_two_pieces_are_bounded_one_by_one(door: Door) -> None:
    long = ACCOUNT[:-2] + b"X-Filler: " + b"x" * 7000
    async with door.talk(b"") as (reader, writer):
        for _ in range(6):
            writer.write(long)
            await writer.drain()
            assert await is_healthy(door)
            writer.write(b"\r\n\r\n")
            assert await status(reader) == 200


async def test_the_framing_of_bodies_is_bounded_one_by_one(door: Door) -> None:
    chunk = b"1;" + b"x" * 1000 + b"\r\n \r\n"
    framed = b"%x\r\n%b\r\n" % (len(BODY), BODY) + chunk * 400 + b"0\r\n\r\n"
    async with door.talk(b"") as (reader, writer):
        for _ in range(3):
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            await writer.drain()
            assert await is_healthy(door)
            writer.write(framed)
            assert await status(reader) == 200


async def test_of_idle_connections_the_one_idle_for_longest_is_closed_for_a_new_one(opened: OpenDoor) -> None:
    async with opened(max_connections=2) as door, door.talk(ACCOUNT) as (first, asks):
        assert await status(first) == 200
        async with door.talk(ACCOUNT) as (second, _):
            assert await status(second) == 200
            asks.write(ACCOUNT)
            assert await status(first) == 200
            async with door.talk(ACCOUNT) as (third, _):
                assert await status(third) == 200
                with suppress(ConnectionError):
                    assert await second.read() == b""
                asks.write(ACCOUNT)
                assert await status(first) == 200


async def test_half_a_request_may_wait_while_the_one_before_it_is_answered(opened: OpenDoor) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        begun.set()
        await asyncio.sleep(0.4)  # longer than a head may take
        for event in words("late"):
            yield event

    async with opened(head_timeout=0.1) as door:
        door.player.script = script
        async with door.talk(TASK) as (reader, writer):
            await begun.wait()
            writer.write(ACCOUNT[:20])
            assert await status(reader) == 200
            writer.write(ACCOUNT[20:])
            assert await status(reader) == 200


async def test_a_request_that_came_slowly_is_forgotten_once_it_is_complete(opened: OpenDoor) -> None:
    async with (
        opened(max_untrusted=1, untrusted_grace=0.2) as door,
        door.talk(NO_KEY[:9]) as (reader, writer),
    ):
        assert await is_healthy(door)
        writer.write(NO_KEY[9:])
        assert await status(reader) == 401
        async with door.talk(b""), door.talk(b""):
            await asyncio.sleep(0.8)  # several checks of the address's connections
            writer.write(NO_KEY)
            assert await status(reader) == 401


@pytest.mark.parametrize("times", [1, 3])
async def test_a_refused_client_gets_time_to_read_however_many_came_before(
    opened: OpenDoor, times: int
) -> None:
    async with opened(max_connections=8) as door:  # of which one may wait for its client to read
        for _ in range(times):
            async with door.talk(b"GET / HTTP/1.1\r\n") as (reader, writer):
                for number in range(40):
                    writer.write(b"A%d: " % number + b"x" * 1000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
                assert await status(reader) == 400
                ended = asyncio.ensure_future(reader.read())
                assert await is_healthy(door)
                assert not ended.done()
                ended.cancel()
            assert await is_healthy(door)
