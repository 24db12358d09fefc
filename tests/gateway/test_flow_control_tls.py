"""Clients that read late or not at all, with TLS and without, on both event loops."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop

from gateway.app import close_connections
from gateway.connections.connection import Connection, Respond
from gateway.connections.http import HttpConnection
from gateway.connections.limits import ConnectionLimits, Connections, Slot, StartQueues
from gateway.connections.listener import Listener
from gateway.options import GatewayOptions
from gateway.request import Request
from gateway.responses import Response, ResponseStream
from pomelo.network.listening import bind
from pomelo.telemetry.readiness import Readiness
from tests.certificates import trusting
from tests.waiting import until

SIZE = 20 * 1024 * 1024
BODY = b"x" * SIZE
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test on an event loop of its own."""

    def run_test(test: Coroutine[Any, Any, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(test, 60))

    return run_test


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def tls(request: pytest.FixtureRequest, certificate: ssl.SSLContext) -> ssl.SSLContext | None:
    return certificate if request.param else None


@dataclass
class Served:
    """Connections that were made to `port`."""

    port: int
    has_tls: bool
    connections: Connections
    made: list[Connection] = field(default_factory=list)

    @asynccontextmanager
    async def connect(self, data: bytes) -> AsyncIterator[socket.socket]:
        """Sends bytes on a new connection, and closes it at the end."""
        client = await asyncio.to_thread(self._connect)
        try:
            await asyncio.to_thread(client.sendall, data)
            yield client
        finally:
            client.close()

    def _connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return trusting().wrap_socket(client) if self.has_tls else client

    async def stalled(self) -> Connection:
        """Returns the connection once its client has left something unread."""
        await until(lambda: self.made and self.made[0].writing_paused, 20)
        return self.made[0]


@asynccontextmanager
async def serve(respond: Respond, tls: ssl.SSLContext | None, **options: Any) -> AsyncIterator[Served]:
    """Serves `respond` to callers with a key."""
    connections = Connections(ConnectionLimits())
    live: set[HttpConnection] = set()

    async def answer(request: Request) -> Response | None:
        request.connection.trust("account")
        return await respond(request)

    def connect(slot: Slot) -> Connection:
        made = Connection(
            answer,
            live,
            connections,
            StartQueues(),
            GatewayOptions(**options),
            Readiness(),
            None,
            slot,
        )
        served.made.append(made)
        return made

    sockets = await bind("127.0.0.1", 0, reuse_port=False)
    served = Served(sockets[0].getsockname()[1], tls is not None, connections)
    listener = Listener(sockets, connect, connections, tls=tls, handshake_timeout=20)
    listener.start()
    try:
        yield served
    finally:
        await listener.close()
        await close_connections(live, 0.1)


def read_all(client: socket.socket, size: int = SIZE) -> bytes:
    """Returns the first `size` bytes of the body of a response."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(1)
    parts = []
    while size and (data := client.recv(min(size, 256 * 1024))):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def read_rest(client: socket.socket) -> int:
    """Reads until the connection is closed; returns the number of bytes."""
    size = 0
    while data := client.recv(256 * 1024):
        size += len(data)
    return size


@pytest.mark.parametrize("data", [GET, LAST], ids=["kept", "last"])
def test_a_body_is_sent_only_when_its_client_has_read_it(
    run: Run, tls: ssl.SSLContext | None, data: bytes
) -> None:
    async def test() -> None:
        ended = []

        async def respond(request: Request) -> Response:
            return Response({}, BODY, 200, lambda: ended.append(request))

        async with serve(respond, tls) as served, served.connect(data) as client:
            connection = await served.stalled()
            assert connection.slot.busy
            assert not ended
            assert connection.transport is not None
            assert not connection.transport.is_closing()  # TLS would have seconds to send the rest
            assert await asyncio.to_thread(read_all, client) == BODY
            await until(lambda: ended)

    run(test())


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_little_of_an_unread_body_is_in_memory_in_encrypted_form(
    run: Run, certificate: ssl.SSLContext, is_stream: bool
) -> None:
    async def test() -> None:
        async def respond(request: Request) -> Response | None:
            if not is_stream:
                return Response({}, BODY)
            await ResponseStream(request, {}).finish(BODY)
            return None

        async with serve(respond, certificate) as served, served.connect(GET):
            connection = await served.stalled()
            assert connection.tcp is not None
            assert connection.transport is not None
            unsent = connection.tcp.get_write_buffer_size() + connection.transport.get_write_buffer_size()
            assert 0 < unsent < 128 * 1024

    run(test())


def test_a_stream_is_finished_only_when_its_client_has_read_it(run: Run, tls: ssl.SSLContext | None) -> None:
    async def test() -> None:
        finished = []

        async def respond(request: Request) -> None:
            stream = ResponseStream(request, {"Content-Length": str(2 * SIZE)})
            if stream.push(BODY):
                await stream.drain()
            finished.append("first")
            await stream.finish(BODY)
            finished.append("last")

        async with serve(respond, tls) as served, served.connect(LAST) as client:
            connection = await served.stalled()
            assert not finished
            assert await asyncio.to_thread(read_all, client, SIZE) == BODY
            await until(lambda: finished == ["first"] and connection.writing_paused)
            assert connection.slot.busy
            assert await asyncio.to_thread(read_rest, client) == SIZE
            await until(lambda: finished == ["first", "last"])

    run(test())


def test_a_client_that_reads_nothing_is_disconnected(run: Run, tls: ssl.SSLContext | None) -> None:
    async def test() -> None:
        async def respond(request: Request) -> Response:
            return Response({}, BODY)

        async with serve(respond, tls, write_timeout=0.1) as served, served.connect(LAST) as client:
            await until(lambda: served.made and not served.made[0].slot.open, 20)
            received = 0
            with suppress(ConnectionResetError):  # Python's TLS reports some resets as an end
                received = await asyncio.to_thread(read_rest, client)
            assert received < SIZE

    run(test())


def test_a_request_that_arrives_with_the_end_of_the_handshake_is_answered(
    run: Run, certificate: ssl.SSLContext
) -> None:
    """Python's sockets send it on its own; browsers do not."""

    def exchange(port: int) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trusting().wrap_bio(incoming, outgoing)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(outgoing.read())
                    incoming.write(client.recv(64 * 1024))
            tls.write(GET)
            client.sendall(outgoing.read())
            received = b""
            while b"hello" not in received:
                try:
                    received += tls.read(64 * 1024)
                except ssl.SSLWantReadError:
                    incoming.write(client.recv(64 * 1024))
            return received

    async def test() -> None:
        async def respond(request: Request) -> Response:
            return Response({}, b"hello")

        async with serve(respond, certificate) as served:
            received = await asyncio.to_thread(exchange, served.port)
            assert received.startswith(b"HTTP/1.1 200 OK\r\n")

    run(test())


def test_a_client_that_leaves_in_the_handshake_frees_its_slot(run: Run, certificate: ssl.SSLContext) -> None:
    async def test() -> None:
        async def respond(request: Request) -> Response:
            return Response({}, b"hello")

        failed: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        tls = trusting().wrap_bio(ssl.MemoryBIO(), outgoing := ssl.MemoryBIO())
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        async with serve(respond, certificate) as served:
            with socket.create_connection(("127.0.0.1", served.port)) as client:
                client.sendall(outgoing.read())
            async with served.connect(GET) as later:  # accepted after the first one
                assert await asyncio.to_thread(read_all, later, 5) == b"hello"
            await until(lambda: not len(served.connections), 20)
            assert len(served.made) == 1
        assert not failed

    run(test())


def test_a_client_that_leaves_before_the_handshake_leaves_nothing(
    run: Run, certificate: ssl.SSLContext
) -> None:
    def handshakes() -> int:
        gc.collect()
        return sum(type(each).__name__ == "SSLProtocol" for each in gc.get_objects())

    async def test() -> None:
        async def respond(request: Request) -> Response:
            return Response({}, b"hello")

        async with serve(respond, certificate) as served:
            for number in range(30):
                with socket.create_connection(("127.0.0.1", served.port)) as client:
                    client.sendall(b"\x16")
                    if number % 2:  # the connection is reset
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            async with served.connect(GET) as later:  # accepted after them
                assert await asyncio.to_thread(read_all, later, 5) == b"hello"
            await until(lambda: not len(served.connections), 20)
            await until(lambda: not handshakes(), 10)

    run(test())
