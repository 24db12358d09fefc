"""The guard of gRPC connections, on real connections."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from pomelo.server import connection_guard
from pomelo.server.connection_guard import ConnectionGuard
from pomelo.server.connection_limits import ConnectionLimits

LIMITS = ConnectionLimits(
    grace=60.0,
    key_timeout=60.0,
    # Nothing of what happened is forgotten while a test runs.
    reset_window=math.inf,
    unexplained_rate=0,
    call_bytes=0,
)
MESSAGE = 1000
"""Maximum bytes of a message."""


@dataclass
class Client:
    """One connection; `peer` is gRPC's name of it."""

    peer: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    taken: list[int]

    async def send(self, size: int) -> None:
        """Sends bytes, and returns when the server has received them."""
        before = self.taken[0]
        self.writer.write(b"x" * size)
        async with asyncio.timeout(20):
            while self.taken[0] < before + size:  # noqa: ASYNC110
                await asyncio.sleep(0)


@dataclass
class Watched:
    """A guard and its port."""

    guard: ConnectionGuard
    port: int
    stack: AsyncExitStack
    taken: list[int]

    async def connect(self, *, authenticated: bool = False) -> Client:
        """Opens a connection, and returns it after the guard has scanned it, optionally with a valid key."""
        before = self.guard.count
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.stack.callback(writer.transport.abort)
        host, port = writer.get_extra_info("sockname")
        async with asyncio.timeout(20):
            while self.guard.count == before:
                await asyncio.sleep(0)
                self.scan()
        client = Client(f"ipv4:{host}:{port}", reader, writer, self.taken)
        if authenticated:
            self.guard.authenticated(client.peer)
        return client

    def scan(self) -> None:
        """Scans all connections."""
        self.guard.scan(time.monotonic())

    def stays(self, client: Client) -> bool:
        """Whether another scan leaves the connection open."""
        before = self.guard.count
        self.scan()
        self.scan()
        return self.guard.count == before and not client.reader.at_eof()

    async def closes(self, client: Client) -> bool:
        """Whether another scan closes the connection."""
        self.scan()
        self.scan()
        async with asyncio.timeout(20):
            try:
                return not await client.reader.read()
            except ConnectionError:
                return True


@asynccontextmanager
async def watched(**limits: Any) -> AsyncIterator[Watched]:
    """Opens a server that reads everything, and a guard with these limits."""
    guard = ConnectionGuard(replace(LIMITS, **limits), MESSAGE)
    taken = [0]

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # the guard resets it
            while data := await reader.read(65_536):
                taken[0] += len(data)
        writer.close()

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(take, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        await stack.enter_async_context(guard.watch(port))
        yield Watched(guard, port, stack, taken)


async def test_bytes_since_the_last_call_are_limited() -> None:
    async with watched(idle_bytes=1000) as opened:
        client = await opened.connect()
        for _ in range(3):  # each call starts a new wait
            opened.guard.authenticated(client.peer)
            await client.send(5000)
            opened.scan()
            opened.guard.ended(client.peer)
            await client.send(900)
            assert opened.stays(client)
        await client.send(200)
        assert await opened.closes(client)


async def test_bytes_of_a_call_that_ended_since_the_last_scan_are_not_idle() -> None:
    async with watched(idle_bytes=1_000, unexplained=1_000) as opened:
        client = await opened.connect(authenticated=True)
        opened.scan()  # the call is open, and receives its messages until it ends
        await client.send(20_000)
        opened.guard.received(client.peer, 20_000)
        opened.guard.ended(client.peer)
        assert opened.stays(client)
        await client.send(1_000)
        assert opened.stays(client)
        await client.send(1)
        assert await opened.closes(client)


async def test_an_address_that_has_flooded_repeatedly_has_a_smaller_share() -> None:
    async with watched(unauthenticated_resets=0, floods=2, per_flooding_address=1, grace=0.0) as opened:
        first, second = await opened.connect(), await opened.connect()
        flooding = await opened.connect()
        opened.guard.reset(flooding.peer)
        assert await opened.closes(flooding)
        assert opened.stays(first)
        assert opened.stays(second)
        flooding = await opened.connect()
        opened.guard.reset(flooding.peer)
        assert await opened.closes(flooding)
        assert await opened.closes(first), "the older one"
        assert opened.stays(second)


async def test_the_connection_whose_call_was_active_last_is_closed_last() -> None:
    async with watched(connections=10) as opened:
        active, idle = await opened.connect(), await opened.connect()
        opened.guard.authenticated(active.peer)
        opened.scan()
        opened.guard.authenticated(idle.peer)
        opened.guard.ended(idle.peer)
        opened.scan()
        opened.guard.received(active.peer, 5)
        opened.scan()
        opened.guard.ended(active.peer)
        opened.guard.limits = replace(opened.guard.limits, connections=1)
        assert await opened.closes(idle)
        assert opened.stays(active)


async def test_connections_do_not_age_while_the_event_loop_is_blocked() -> None:
    async with watched(key_timeout=60.0) as opened:
        await opened.connect()
        opened.guard.scan(time.monotonic() + 1000)
        assert opened.guard.count == 1


async def test_connections_closed_since_the_last_line_are_logged_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def closed() -> list[str]:
        return [r.getMessage().split()[0] for r in caplog.records if r.name == "pomelo.server"]

    async with watched(unauthenticated_resets=0) as opened:
        for _ in range(3):
            client = await opened.connect()
            opened.guard.reset(client.peer)
            assert await opened.closes(client)
        opened.scan()
        assert closed() == ["1"]
    assert closed() == ["1", "2"]


async def test_a_connection_that_is_ended_is_not_reset_before_its_client_has_read_everything() -> None:
    async with watched() as one:
        client = await one.connect(authenticated=True)
        one.guard.ended(client.peer)
        one.guard.drain()
        one.scan()
        one.scan()
        await client.send(100)  # such as a window update, for what it has read so far
        await client.send(100)
        assert await client.reader.read() == b""


async def test_hanging_up_waits_until_every_client_has_closed_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_guard, "_HANG_UP_TIME", 60.0)
    async with watched() as one:
        clients = [await one.connect(authenticated=known) for known in (True, True, False)]
        for client in clients[:2]:
            one.guard.ended(client.peer)
        one.guard.sending(clients[0].peer)
        hanging_up = asyncio.create_task(one.guard.hang_up())
        for client in clients[1:]:
            assert await client.reader.read() == b""
            client.writer.close()
        assert not clients[0].reader.at_eof(), "its response is not written yet"
        assert not hanging_up.done()
        one.guard.sent(clients[0].peer)
        assert await clients[0].reader.read() == b""
        assert not hanging_up.done()
        clients[0].writer.close()
        async with asyncio.timeout(20):
            await hanging_up


async def test_hanging_up_ends_when_its_time_is_over() -> None:
    async with watched() as one:
        client = await one.connect(authenticated=True)  # with a call that does not end
        async with asyncio.timeout(20):
            await one.guard.hang_up()
            assert await client.reader.read() == b""


async def test_while_it_drains_a_response_that_is_being_read_keeps_its_connection() -> None:
    async with watched() as one:
        client = await one.connect(authenticated=True)
        one.guard.sending(client.peer)
        one.guard.ended(client.peer)
        one.guard.drain()
        assert one.stays(client)
        one.guard.sent(client.peer)
        assert await one.closes(client)
