"""Trailers of chunked requests, which are ignored: they never become headers of the next request."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from tests.gateway.flow import Clients, ClientTransport, open_clients
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import (
    CHUNKED,
    HI,
    KEY,
    headers_of,
    raw_get,
    raw_task,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import play, text_events
from tests.waiting import until

TASK = raw_task(HI, close=False)
BODY = json.dumps(HI).encode()
CHUNKED_TASK = raw_task(b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY), framing=CHUNKED, close=False)
NO_KEY = f"POST /nokey HTTP/1.1\r\nHost: x\r\n{CHUNKED}\r\n\r\n0\r\n".encode()
NEXT = raw_get("/api/v1/models/next", f"Authorization: Bearer {KEY}")

TRAILERS = [
    b"Authorization: Bearer pml_test_other", b"Idempotency-Key: k1", b"Prefer: handling=strict",
    b"X-Request-Timeout: 0.01", b"Host: y", b"Content-Type: text/plain", b"Content-Encoding: br\r\nX: y",
    b"X: 0", b"X: a\r\n 0", b"X:\r\n\t0", b"0: 0", b"X: y\r\n0: ", b"X:",
]  # fmt: skip


async def _received(client: ClientTransport) -> bytes:
    """Returns everything that the client received, once its connection is closed."""
    client.read_everything()
    async with asyncio.timeout(20):
        await client.closed.wait()
    return client.received


async def _send(clients: Clients, *pieces: bytes) -> ClientTransport:
    """Returns a client that has sent the pieces; the gateway handles nothing before the last of them."""
    first, *others = pieces
    client = await clients.connect(first)
    for piece in others:
        client.connection.data_received(piece)
    return client


def _is_last(response: bytes) -> bool:
    """Whether only one response was received, after which the client sends nothing more. That to a request that
    the parser refuses has HTTP/1.0, for which it is the default."""
    return response.count(b"HTTP/1.") == 1 and (
        headers_of(response).get("connection") == "close" or response.startswith(b"HTTP/1.0 4")
    )


def _split(data: bytes) -> list[tuple[bytes, ...]]:
    """Returns the data in one piece, in two at each place, and in pieces of one byte."""
    halves = [(data[:at], data[at:]) for at in range(1, len(data))]
    return [(data,), *halves, tuple(data[at : at + 1] for at in range(len(data)))]


@pytest.mark.parametrize("trailers", TRAILERS)
async def test_a_request_with_trailers_is_the_last_one_on_its_connection(
    gateway: GatewayApp, trailers: bytes
) -> None:
    async with open_clients(gateway.services) as clients, asyncio.TaskGroup() as tasks:

        async def exchange(pieces: tuple[bytes, ...]) -> None:
            client = await _send(clients, *pieces)
            assert _is_last(await _received(client))

        for pieces in _split(NO_KEY + trailers + b"\r\n\r\n"):
            # Together, because a connection whose request the parser refuses is closed after a while.
            tasks.create_task(exchange(pieces))


@pytest.mark.parametrize("asked", [CHUNKED_TASK, NO_KEY], ids=["a task", "without a key"])
@pytest.mark.parametrize("trailers", TRAILERS)
async def test_a_trailer_never_reaches_a_request_behind_it(
    gateway: GatewayApp, trailers: bytes, asked: bytes
) -> None:
    sent = asked + trailers + b"\r\n\r\n"
    assert _is_last(await gateway.exchange(sent + NEXT))
    async with gateway.connect(sent) as (reader, writer):
        received = await reader.readuntil(b"\r\n\r\n")
        writer.write(NEXT)
        assert _is_last(received + await read_until_closed(reader))


@pytest.mark.parametrize("asked", [CHUNKED_TASK, NO_KEY], ids=["a task", "without a key"])
async def test_a_chunked_request_without_trailers_keeps_its_connection(
    gateway: GatewayApp, asked: bytes
) -> None:
    async with open_clients(gateway.services) as clients:
        for pieces in _split(asked + b"\r\n"):
            client = await _send(clients, *pieces)
            client.read_everything()
            await until(lambda client=client: client.connection._task is None)  # type: ignore[misc]
            assert b"Connection: close" not in client.received
            client.connection.data_received(NEXT)
            await until(lambda client=client: b"task type: next" in client.received)  # type: ignore[misc]
            client.abort()


async def test_what_follows_a_chunked_request_before_its_response_is_not_read(gateway: GatewayApp) -> None:
    sent = NO_KEY + b"\r\n"
    for following in (
        NEXT,
        NEXT[:1],
        NEXT[:-1],
        NEXT[:-2],
        NEXT + NEXT,
        sent,
        sent[:-1],
        b"0\r\n\r\n",
        b"\r\n",
    ):
        async with open_clients(gateway.services) as clients:
            for pieces in _split(sent + following):
                received = await _received(await _send(clients, *pieces))
                assert _is_last(received)


@pytest.mark.parametrize("trailers", [b"", b"Prefer: handling=strict\r\n"], ids=["no trailers", "trailers"])
async def test_chunked_requests_in_a_pipeline_end_their_connection_at_the_latest_with_their_trailers(
    gateway: GatewayApp, trailers: bytes
) -> None:
    go_on = asyncio.Event()
    gateway.provider.script = play(go_on.wait, *text_events("late"))
    sent = TASK + NEXT + CHUNKED_TASK + trailers + b"\r\n" + NEXT + CHUNKED_TASK + b"\r\n"
    async with gateway.connect(sent) as (reader, _):
        assert await gateway.is_healthy()
        go_on.set()
        received = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"400", b"200"]
    assert received.count(b"Connection: close") == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_large_chunked_body_that_fills_the_buffers_keeps_its_connection(
    gateway: GatewayApp, version: str
) -> None:
    body = BODY + b" " * 300_000
    pieces = (body[at : at + 999] for at in range(0, len(body), 999))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = raw_task(b"", "Connection: keep-alive", framing=CHUNKED, version=version, close=False)
    async with gateway.connect(head + chunks) as (reader, writer):
        assert await gateway.is_healthy()
        writer.write(b"0\r\n\r\n")
        assert await read_status(reader) == 200
        writer.write(NEXT)
        if version == "1.1":
            assert await read_status(reader) == 400
        else:
            assert await reader.read() == b""
