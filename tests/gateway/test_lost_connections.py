"""Connections whose client has left: nothing keeps them, and nothing is sent to them."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

from gateway.connections.connection import MAX_HEAD
from gateway.connections.limits import StartQueues
from pomelo.call import Call, Principal
from tests.gateway.flow import Clients, ClientTransport, open_clients
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import ACCOUNT, HI, raw_task
from tests.gateway.scripts import play, word
from tests.unit.telemetry.reports import Reports
from tests.waiting import until

LONG_HEAD = b"GET / HTTP/1.1\r\nA: " + b"x" * MAX_HEAD
STREAM = raw_task({**HI, "stream": True}, close=False)
MALFORMED = b"malformed\r\n\r\n"


async def leave(clients: Clients, data: bytes, *, reads: bool) -> weakref.ref[StartQueues]:
    """Connects a client, which sends `data`, may read the response, and leaves. Returns a reference to what only
    its connection has."""
    client = await clients.connect(data)
    await until(lambda: client.unread or not (reads or data.startswith(ACCOUNT)))
    if reads:
        client.read(len(client.unread))
    client.abort()
    await until(lambda: not client.connection.connected)
    assert len(clients.connections) == clients.connections.lingering == 0
    return weakref.ref(client.connection._start_queues)


@pytest.mark.parametrize(
    ("data", "reads"),
    [
        (b"", False),
        (b"GET /", False),
        (ACCOUNT, False),
        (ACCOUNT, True),
        (LONG_HEAD, False),
        (LONG_HEAD, True),
        (MALFORMED, False),
        (MALFORMED, True),
    ],
    ids=[
        *("new", "in a head", "unread response", "idle", "unread refusal", "refused"),
        *("left before its refusal", "refused as malformed"),
    ],
)
async def test_a_connection_whose_client_has_left_is_freed_without_the_garbage_collector(
    gateway: GatewayApp, data: bytes, reads: bool
) -> None:
    async with open_clients(gateway.services, linger_timeout=60.0) as clients:
        gc.disable()
        try:
            kept = await leave(clients, data, reads=reads)
            await until(lambda: kept() is None)
        finally:
            gc.enable()


async def test_a_call_whose_client_has_left_is_reported_without_a_status(open_gateway: OpenApp) -> None:
    reports, begun = Reports(), asyncio.Event()

    async def wait(call: Call) -> Principal:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        open_gateway(authenticate=wait) as gateway,
        open_clients(gateway.services, observers=[reports]) as clients,
    ):
        client = await clients.connect(ACCOUNT)
        await asyncio.wait_for(begun.wait(), 20)
        client.abort()
        await until(lambda: reports.calls)
    assert [(report.code, report.http_status) for report in reports.calls] == [("", 0)]


async def test_a_client_that_is_leaving_gets_no_comment(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    class LeavingTransport(ClientTransport):
        """A transport that closes, as asyncio's does when a write has failed, before it reports the loss."""

        checks = 0

        def get_write_buffer_size(self) -> int:
            self.checks += 1
            self._closing = True
            return 0

    gateway.provider.script = play(asyncio.Event().wait)
    async with open_clients(gateway.services, keep_alive=0.02) as clients:
        client = await clients.connect(STREAM, LeavingTransport)
        await until(lambda: client.checks >= 2)  # type: ignore[attr-defined]
        assert not client.unread
        client.connection.connection_lost(None)
        await asyncio.wait_for(gateway.provider.closed.wait(), 20)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_leaves_between_two_events_is_no_error_of_the_stream(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    class LeavingTransport(ClientTransport):
        """A transport that closes after each write, as asyncio's does when that has failed."""

        def write(self, data: bytes | bytearray | memoryview) -> None:
            super().write(data)
            self._closing = True

    begun = asyncio.Event()
    gateway.provider.script = play(word("one "), begun.wait, word("two "), asyncio.Event().wait)
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(STREAM, LeavingTransport)
        await until(lambda: b"one " in client.unread)
        begun.set()
        await asyncio.wait_for(gateway.provider.closed.wait(), 20)
        assert b"two " not in client.unread
        client.connection.connection_lost(None)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
