"""The guard of gRPC connections at each of its limits, on real connections."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from pomelo.server.connections import ConnectionGuard, ConnectionLimits

LIMITS = ConnectionLimits(
    grace=60.0,
    key_timeout=60.0,
    # Nothing expires while a test runs.
    reset_window=math.inf,
    unexplained_rate=0,
    call_bytes=0,
)
MESSAGE = 1000
"""The maximum bytes of a message."""


@dataclass
class Client:
    """A connection. `peer` is its name in the server's calls; `received` counts the server's bytes."""

    peer: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: list[int]

    async def send(self, size: int) -> None:
        """Sends bytes; returns when the server has received them."""
        before = self.received[0]
        self.writer.write(b"x" * size)
        async with asyncio.timeout(5):
            while self.received[0] < before + size:  # noqa: ASYNC110
                await asyncio.sleep(0)


@dataclass
class GuardedServer:
    """A server, and the guard of its port."""

    guard: ConnectionGuard
    port: int
    stack: AsyncExitStack
    received: list[int]

    async def connect(self) -> Client:
        """Opens a connection; returns when the guard has seen it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.stack.callback(writer.transport.abort)
        host, port = writer.get_extra_info("sockname")
        before = self.guard.count
        async with asyncio.timeout(5):
            while self.guard.count == before:
                await asyncio.sleep(0)
                self.scan()
        return Client(f"ipv4:{host}:{port}", reader, writer, self.received)

    def scan(self) -> None:
        """Checks all connections."""
        self.guard.scan(time.monotonic())

    def stays(self, client: Client) -> bool:
        """Returns whether two more checks leave the connection open."""
        before = self.guard.count
        self.scan()
        self.scan()
        return self.guard.count == before and not client.reader.at_eof()

    async def closes(self, client: Client) -> bool:
        """Returns whether two more checks close the connection."""
        self.scan()
        self.scan()
        async with asyncio.timeout(5):
            try:
                return not await client.reader.read()
            except ConnectionError:
                return True


@asynccontextmanager
async def guarded_server(**limits: Any) -> AsyncIterator[GuardedServer]:
    """Runs a server that reads everything, and a guard with these limits."""
    guard = ConnectionGuard(replace(LIMITS, **limits), MESSAGE)
    received = [0]

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            received[0] += len(data)
        writer.close()

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(read, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        await stack.enter_async_context(guard.watch([port]))
        yield GuardedServer(guard, port, stack, received)


async def test_cancelled_calls_without_a_key_are_limited() -> None:
    async with guarded_server(unauthenticated_resets=3) as server:
        client = await server.connect()
        for _ in range(3):
            server.guard.reset(client.peer)
        assert server.stays(client)
        server.guard.reset(client.peer)
        assert await server.closes(client)


async def test_cancelled_calls_with_a_key_are_limited() -> None:
    async with guarded_server(unauthenticated_resets=0, resets=3) as server:
        client = await server.connect()
        server.guard.authenticated(client.peer)
        for _ in range(3):
            server.guard.reset(client.peer)
        assert server.stays(client)
        server.guard.reset(client.peer)
        assert await server.closes(client)


async def test_bytes_without_a_key_are_limited() -> None:
    async with guarded_server(unauthenticated_bytes=1000) as server:
        client = await server.connect()
        await client.send(900)
        assert server.stays(client)
        await client.send(200)
        assert await server.closes(client)


async def test_more_bytes_are_allowed_while_a_key_is_looked_up() -> None:
    async with guarded_server(unauthenticated_bytes=1000, unauthenticated_resets=0) as server:
        client = await server.connect()
        server.guard.checking(client.peer)
        await client.send(2000)
        assert server.stays(client)
        server.guard.checked(client.peer)
        assert await server.closes(client)


async def test_bytes_that_no_call_explains_are_limited() -> None:
    async with guarded_server(unexplained=1000) as server:
        client = await server.connect()
        server.guard.authenticated(client.peer)
        server.guard.ended(client.peer)
        await client.send(900)
        assert server.stays(client)
        await client.send(200)
        assert await server.closes(client)


async def test_messages_explain_their_bytes() -> None:
    async with guarded_server(unexplained=1000) as server:
        client = await server.connect()
        server.guard.authenticated(client.peer)
        server.guard.ended(client.peer)
        for _ in range(5):
            server.guard.received(client.peer, 1000)
            await client.send(1000)
            assert server.stays(client)
        await client.send(4000)
        assert await server.closes(client)


async def test_a_running_call_allows_one_message_more() -> None:
    async with guarded_server(unexplained=1000) as server:
        client = await server.connect()
        server.guard.authenticated(client.peer)
        await client.send(1000 + MESSAGE - 100)
        assert server.stays(client)
        server.guard.ended(client.peer)
        assert await server.closes(client)


async def test_bytes_since_the_last_call_are_limited() -> None:
    async with guarded_server(idle_bytes=1000) as server:
        client = await server.connect()
        for _ in range(3):  # each call resets the count
            server.guard.authenticated(client.peer)
            await client.send(5000)
            server.scan()
            server.guard.ended(client.peer)
            await client.send(900)
            assert server.stays(client)
        await client.send(200)
        assert await server.closes(client)


async def test_the_connection_of_a_gateway_has_no_limits() -> None:
    async with guarded_server(resets=1, unexplained=10, idle_bytes=10) as server:
        client = await server.connect()
        server.guard.authenticated(client.peer)
        server.guard.trust(client.peer)
        server.guard.ended(client.peer)
        for _ in range(5):
            server.guard.reset(client.peer)
        await client.send(5000)
        server.guard.limits = replace(server.guard.limits, connections=0)
        assert server.stays(client)


async def test_above_the_total_keyless_connections_close_first_then_idle_ones() -> None:
    async with guarded_server(connections=10) as server:
        # The connection that has been idle for longest is not the oldest.
        busy, fresh, idle, keyless = [await server.connect() for _ in range(4)]
        for client in (busy, idle, fresh):
            server.guard.authenticated(client.peer)
            server.scan()
            if client is not busy:
                server.guard.ended(client.peer)
        left = [busy, idle, fresh, keyless]
        for closed in (keyless, idle, fresh):
            server.guard.limits = replace(server.guard.limits, connections=len(left) - 1)
            assert await server.closes(closed)
            left.remove(closed)
            assert all(server.stays(client) for client in left)
        server.guard.limits = replace(server.guard.limits, connections=0)
        assert server.stays(busy), "a call runs on it"


async def test_an_address_that_floods_repeatedly_gets_fewer_connections() -> None:
    async with guarded_server(
        unauthenticated_resets=0, floods=2, per_flooding_address=1, grace=0.0
    ) as server:
        first, second = await server.connect(), await server.connect()
        flooding = await server.connect()
        server.guard.reset(flooding.peer)
        assert await server.closes(flooding)
        assert server.stays(first)
        assert server.stays(second)
        flooding = await server.connect()
        server.guard.reset(flooding.peer)
        assert await server.closes(flooding)
        assert await server.closes(first), "the older one"
        assert server.stays(second)
