"""A connection of a gateway over a transport whose client reads only when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from gateway.app import close_connections, make_gateway, respond
from gateway.connections.connection import Connection, Respond
from gateway.connections.http import HttpConnection
from gateway.connections.limits import ConnectionLimits, Connections, Slot, StartQueues
from gateway.options import GatewayOptions
from pomelo.service import Services
from pomelo.telemetry.readiness import Readiness


class ClientTransport(asyncio.Transport):
    """A transport with the flow control of asyncio's, but without a kernel that buffers. `unread` is what was
    written and not read; `received` what the client has read."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.unread = bytearray()
        self.received = b""
        self.is_aborted = False
        self.closed = asyncio.Event()
        self._high, self._low = 64 * 1024, 16 * 1024
        self._paused = False
        self._reading = True
        self._closing = False
        self._on_write: Callable[[], None] = lambda: None

    def read_everything(self) -> None:
        """Makes the client read what is written, now and later."""
        self._on_write = lambda: self.read(len(self.unread))
        self._on_write()

    def read(self, size: int) -> None:
        """Makes the client read the next `size` bytes."""
        self.received += self.unread[:size]
        del self.unread[:size]
        if self._paused and len(self.unread) <= self._low:
            self._paused = False
            self.connection.resume_writing()
        if self._closing and not self.unread:
            self._lose()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.unread += data
        if not self._paused and len(self.unread) > self._high:
            self._paused = True
            self.connection.pause_writing()
        self._on_write()

    def get_write_buffer_size(self) -> int:
        return len(self.unread)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high, self._low = high or 0, low or 0

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True

    def is_reading(self) -> bool:
        return self._reading

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True
        if not self.unread:
            self._lose()

    def abort(self) -> None:
        self._closing = self.is_aborted = True
        self._lose()

    def _lose(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


@dataclass
class Clients:
    """Connects clients to a gateway; `connections` are their slots."""

    connections: Connections
    _respond: Respond
    _live: set[HttpConnection]
    _options: GatewayOptions

    def connection(self, slot: Slot) -> Connection:
        """Returns a new connection that occupies `slot`."""
        return Connection(
            self._respond, self._live, self.connections, StartQueues(), self._options, Readiness(), None, slot
        )

    def accept(self, transport_type: type[ClientTransport] = ClientTransport) -> ClientTransport:
        """Returns the transport of a new client, whose connection has yet to be made."""
        return transport_type(self.connection(self.connections.open("192.0.2.1", lambda _: None)))

    async def connect(
        self, data: bytes, transport_type: type[ClientTransport] = ClientTransport
    ) -> ClientTransport:
        """Returns the transport of a new client, which has sent `data`."""
        transport = self.accept(transport_type)
        transport.connection.connection_made(transport)
        await asyncio.sleep(0)
        transport.connection.data_received(data)
        return transport


@asynccontextmanager
async def open_clients(
    services: Services, *, closing_time: float = 0.1, **options: Any
) -> AsyncIterator[Clients]:
    """Runs a gateway over `services`, without listening. On exit, its requests have `closing_time` seconds."""
    given = GatewayOptions(**options)
    gateway = make_gateway(services, given, Readiness())
    live: set[HttpConnection] = set()
    limits = ConnectionLimits(max_connections=given.max_connections, lifetime=given.untrusted_timeout)
    connections = Connections(limits)
    try:
        yield Clients(connections, partial(respond, gateway), live, given)
    finally:
        connections.stop()
        await close_connections(live, closing_time)
