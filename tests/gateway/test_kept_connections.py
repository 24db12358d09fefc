"""Connections that serve many requests: limits that apply to each request."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from functools import partial

import pytest

from gateway.connections.connection import MAX_UNAUTHENTICATED
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.service import Visit
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import (
    ACCOUNT,
    CHUNKED,
    EXPECT,
    HEALTH,
    HI,
    KEY,
    code_of,
    raw_get,
    raw_task,
    read_response,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import play, text_events

BODY = json.dumps(HI).encode()
NO_KEY = raw_get("/api/v1/account")


async def test_a_valid_key_resets_the_count_of_unauthenticated_requests(gateway: GatewayApp) -> None:
    asked = [NO_KEY] * 3 + [ACCOUNT] + [NO_KEY] * 3 + [ACCOUNT]
    async with gateway.connect() as (reader, writer):
        for each in asked:
            writer.write(each)
            assert await read_status(reader) == (200 if each is ACCOUNT else 401)


async def test_a_valid_key_keeps_the_connection_of_an_account_with_too_many_calls(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(in_flight=InFlightLimits(account_calls=1), untrusted_timeout=0.6) as gateway,
        gateway.connect() as (reader, writer),
    ):
        writer.write(ACCOUNT)
        assert await read_status(reader) == 200
        started, ended = asyncio.Event(), asyncio.Event()
        gateway.provider.script = play(started.set, ended.wait, *text_events("late"))
        running = asyncio.create_task(code_of(gateway.post_task(HI)))
        await started.wait()
        for _ in range(MAX_UNAUTHENTICATED + 1):
            writer.write(ACCOUNT)
            assert await read_status(reader) == 503
        await asyncio.sleep(0.9)  # longer than the lifetime of an untrusted connection
        ended.set()
        assert await running == (200, "")
        writer.write(ACCOUNT)
        assert await read_status(reader) == 200


async def test_a_valid_key_keeps_the_connection_if_a_server_elsewhere_has_too_many_calls(
    gateway: GatewayApp,
) -> None:
    class Elsewhere:
        async def admit(self, call: Call) -> Visit:
            call.response_headers["X-Pomelo-Mode"] = "test"
            raise PomeloError("overloaded")

    async with gateway.over(access=Elsewhere()) as other, other.connect() as (reader, writer):
        for _ in range(MAX_UNAUTHENTICATED + 1):
            writer.write(ACCOUNT)
            assert await read_status(reader) == 503


async def test_the_size_of_each_request_head_is_limited_separately(gateway: GatewayApp) -> None:
    long = ACCOUNT[:-2] + b"X-Filler: " + b"x" * 7000
    async with gateway.connect() as (reader, writer):
        for _ in range(6):
            writer.write(long)
            await writer.drain()
            assert await gateway.is_healthy()
            writer.write(b"\r\n\r\n")
            assert await read_status(reader) == 200


async def test_the_framing_of_each_body_is_limited_separately(gateway: GatewayApp) -> None:
    chunk = b"1;" + b"x" * 1000 + b"\r\n \r\n"
    framed = b"%x\r\n%b\r\n" % (len(BODY), BODY) + chunk * 400 + b"0\r\n\r\n"
    async with gateway.connect() as (reader, writer):
        for _ in range(3):
            writer.write(raw_task(b"", framing=CHUNKED, close=False))
            await writer.drain()
            assert await gateway.is_healthy()
            writer.write(framed)
            assert await read_status(reader) == 200


@pytest.mark.parametrize(("chunks", "status"), [(700, 200), (900, 400)])
async def test_a_body_may_have_as_much_framing_as_bytes_and_half_a_mebibyte_more(
    gateway: GatewayApp, chunks: int, status: int
) -> None:
    content = BODY + b" " * 300_000
    async with gateway.connect(raw_task(b"", framing=CHUNKED, close=False)) as (reader, writer):
        assert await gateway.is_healthy()
        writer.write(b"%x\r\n%b\r\n" % (len(content), content))
        with suppress(ConnectionError):
            for _ in range(chunks):
                writer.write(b"1;" + b"x" * 1000 + b"\r\n \r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        assert await read_status(reader) == status


async def test_half_a_request_may_wait_while_the_previous_one_is_handled(open_gateway: OpenApp) -> None:
    started = asyncio.Event()

    late = partial(asyncio.sleep, 0.6)  # longer than a head may take
    async with open_gateway(head_timeout=0.4) as gateway:
        gateway.provider.script = play(started.set, late, *text_events("late"))
        async with gateway.connect(raw_task(HI, close=False)) as (reader, writer):
            await started.wait()
            writer.write(ACCOUNT[:20])
            assert await read_status(reader) == 200
            writer.write(ACCOUNT[20:])
            assert await read_status(reader) == 200


async def test_the_body_of_the_next_request_may_arrive_while_the_previous_one_is_handled(
    open_gateway: OpenApp,
) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    large = raw_task({**HI, "messages": [{"role": "user", "content": "x" * 45_000}]}, close=False)
    async with open_gateway() as gateway:
        gateway.provider.script = play(started.set, go_on.wait, *text_events("late"))
        async with gateway.connect(raw_task(HI, close=False)) as (reader, writer):
            await started.wait()
            for at in range(0, len(large), 15_000):
                writer.write(large[at : at + 15_000])
                assert await gateway.is_healthy()  # the part has arrived
            go_on.set()
            for _ in range(2):
                assert await read_status(reader) == 200


async def test_a_connection_ends_as_its_client_asked_although_the_rest_of_a_body_came(
    gateway: GatewayApp,
) -> None:
    fields = f"Authorization: Bearer {KEY}", "Content-Length: 9", "Connection: close"
    async with gateway.connect(raw_get("/api/v1/nowhere", *fields)) as (reader, writer):
        assert await read_status(reader) == 404
        writer.write(b"x" * 9 + ACCOUNT)
        assert await read_until_closed(reader) == b""


async def test_a_completed_slow_request_no_longer_counts_against_its_connection(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(max_untrusted=1, untrusted_grace=0.2) as gateway,
        gateway.connect(NO_KEY[:9]) as (reader, writer),
    ):
        assert await gateway.is_healthy()
        writer.write(NO_KEY[9:])
        assert await read_status(reader) == 401
        async with gateway.connect(), gateway.connect():
            await asyncio.sleep(0.8)  # several checks of the address's connections
            writer.write(NO_KEY)
            assert await read_status(reader) == 401


async def test_a_health_check_leaves_a_trusted_connection_trusted(open_gateway: OpenApp) -> None:
    async with open_gateway(untrusted_timeout=0.6) as gateway, gateway.connect() as (reader, writer):
        for each in (ACCOUNT, HEALTH, ACCOUNT):
            writer.write(each)
            assert await read_status(reader) == 200
            await asyncio.sleep(0.9)  # longer than the lifetime of an untrusted connection


async def test_a_connection_ends_if_the_rest_of_an_answered_body_does_not_arrive_in_time(
    open_gateway: OpenApp,
) -> None:
    with_body = ACCOUNT[:-2] + b"Content-Length: 5\r\n\r\n"
    times = {"idle_timeout": 60.0, "untrusted_timeout": 60.0}
    async with (
        asyncio.timeout(20),
        open_gateway(linger_timeout=0.1, **times) as gateway,
        gateway.connect(with_body + b"half") as (reader, writer),
    ):
        assert await read_status(reader) == 200
        assert await reader.read() == b""
    async with (
        open_gateway(linger_timeout=60.0, **times) as gateway,
        gateway.connect(with_body + b"half") as (reader, writer),
    ):
        assert await read_status(reader) == 200
        writer.write(b"." + ACCOUNT)
        assert await read_status(reader) == 200


async def test_only_the_known_expectation_is_answered(gateway: GatewayApp) -> None:
    head = raw_task(BODY, "Expect: something", close=False)[: -len(BODY)]
    async with gateway.connect(head) as (reader, writer):
        assert await gateway.is_healthy()
        writer.write(BODY)
        assert await read_status(reader) == 200


LARGE = "Content-Length: 100000000"
SMALL = "Content-Length: 5"


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (raw_task(b"", EXPECT, framing=LARGE, close=False), 413),
        (raw_task(b"", EXPECT, framing=SMALL, content_type="text/plain", close=False), 415),
        (raw_task(b"", EXPECT, "X-Request-Timeout: soon", framing=SMALL, close=False), 400),
        (raw_get("/api/v1/nope", f"Authorization: Bearer {KEY}", EXPECT, SMALL), 404),
        (raw_get("/api/v1/task", f"Authorization: Bearer {KEY}", EXPECT, SMALL), 405),
        (ACCOUNT[:-2] + f"{EXPECT}\r\n{SMALL}\r\n\r\n".encode(), 200),
    ],
    ids=["too large", "content type", "header", "path", "method", "a body that is not read"],
)
@pytest.mark.parametrize("sent", [b"", b"{"], ids=["nothing of it", "a part of it"])
async def test_a_response_in_place_of_100_continue_is_the_last_one(
    open_gateway: OpenApp, refused: bytes, status: int, sent: bytes
) -> None:
    async with (
        open_gateway(linger_timeout=60.0) as gateway,
        gateway.connect(refused + sent) as (reader, writer),
    ):
        received, headers, _ = await read_response(reader)
        assert (received, headers.get("connection")) == (status, "close")
        writer.write_eof()  # a client closes the connection then
        assert await read_until_closed(reader) == b""


async def test_a_response_in_place_of_100_continue_is_the_last_one_if_it_is_a_file(
    gateway: GatewayApp,
) -> None:
    path = (await gateway.link()).partition(str(gateway.port))[2]
    async with gateway.connect(raw_get(path, EXPECT, SMALL)) as (reader, _):
        status, headers, _ = await read_response(reader)
        assert (status, headers.get("connection")) == (200, "close")


@pytest.mark.parametrize("waits", [False, True], ids=["without waiting", "after 100 Continue"])
async def test_a_request_whose_body_comes_keeps_its_connection(gateway: GatewayApp, waits: bool) -> None:
    head = raw_task(BODY, EXPECT, close=False)[: -len(BODY)]
    for body, expected in ((BODY, 200), (b"x" * len(BODY), 400)):
        async with gateway.connect(head if waits else head + body) as (reader, writer):
            if waits:
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(body)
            status, headers, _ = await read_response(reader)
            assert (status, headers.get("connection")) == (expected, None)
            writer.write(ACCOUNT)
            assert await read_status(reader) == 200
