"""Opens connections to vendors, and keeps those that can serve another request for a moment."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from functools import cache

from aiohappyeyeballs import start_connection
from aiohttp.abc import AbstractResolver

from pomelo.network.tls import default_context
from pomelo.providers.http.dns import Addresses
from pomelo.providers.http.errors import ConnectError, ConnectTimeoutError, SecureConnectionError
from pomelo.providers.http.protocol import Connection, Origin
from pomelo.runtime.process import shielded

KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. Common servers close theirs after five."""

_TCP_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 5}
"""Options of TCP keep-alive: seconds of silence before a probe and between two; probes that may fail."""

_SECOND_ATTEMPT = 0.25
"""Seconds after which the next address of a host is tried beside the first."""


class Pool:
    """The connections of one client, which keeps at most `max_kept` idle ones for each origin. `timeout` is
    in seconds, for looking up the name, TCP and TLS together. Create it in the running loop."""

    def __init__(self, max_kept: int, resolver: AbstractResolver, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_kept = max_kept
        self._timeout = timeout
        self._addresses = Addresses(resolver)
        self._tls: asyncio.Future[ssl.SSLContext] | None = None
        self._open: set[Connection] = set()
        self._idle: dict[Origin, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._all_lost: asyncio.Future[None] | None = None

    async def close(self) -> None:
        """Close all connections, also those that serve a request, and the resolver."""
        self._closed = True
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            self._all_lost = self._loop.create_future()
            for connection in self._open:
                connection.abort()
            await self._all_lost
        await self._addresses.close()

    def take(self, origin: Origin) -> Connection | None:
        """Return an idle connection, the one that was used last; None without one."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.closed:
                continue
            if self._loop.time() - connection.idle_since < KEEPALIVE:
                return connection
            connection.abort()
        return None

    def keep(self, connection: Connection) -> None:
        """Take a connection back that has finished its request."""
        idle = self._idle.setdefault(connection.origin, [])
        if self._closed or len(idle) >= self._max_kept:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        idle.append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(KEEPALIVE, self._drop_idle)

    async def connect(self, origin: Origin, *, keep: bool) -> Connection:
        """Return a new connection, which is kept after its request if `keep`.

        Raises:
            ConnectError: no connection could be opened, or the pool is closed.
            ValueError: the resolver refuses the host's address.
        """
        tls = None
        if origin.tls:
            if self._tls is None:
                self._tls = self._loop.run_in_executor(None, tls_context)
            try:
                tls = await shielded(self._tls)
            except OSError as error:
                self._tls = None
                raise ConnectError from error
        try:
            async with asyncio.timeout(self._timeout):
                return await self._connect(origin, tls, keep)
        except TimeoutError:
            raise ConnectTimeoutError from None

    async def _connect(self, origin: Origin, tls: ssl.SSLContext | None, keep: bool) -> Connection:
        addresses = await self._addresses.resolve(origin.host, origin.port)
        connection = Connection(self._loop, origin, self._lost, keep=keep)
        try:
            connected = await start_connection(addresses, happy_eyeballs_delay=_SECOND_ATTEMPT)
            _probe(connected)
            await self._loop.create_connection(
                lambda: connection,
                sock=connected,
                ssl=tls,
                server_hostname=origin.host.rstrip(".") if tls else None,
            )
        except ssl.SSLError as error:
            raise SecureConnectionError from error
        except (OSError, RuntimeError) as error:  # uvloop raises RuntimeError for some closed sockets
            raise ConnectError from error
        if self._closed:
            connection.abort()
            raise ConnectError
        if not connection.closed:
            self._open.add(connection)
        return connection

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if self._all_lost is not None and not self._open and not self._all_lost.done():
            self._all_lost.set_result(None)

    def _drop_idle(self) -> None:
        """Close the connections that were idle too long, and come back for the others."""
        self._timer = None
        expired = self._loop.time() - KEEPALIVE
        for origin, idle in tuple(self._idle.items()):
            while idle and (idle[0].closed or idle[0].idle_since <= expired):
                idle.pop(0).abort()
            if not idle:
                del self._idle[origin]
        if self._idle:
            oldest = min(idle[0].idle_since for idle in self._idle.values())
            self._timer = self._loop.call_later(max(oldest - expired, 0.001), self._drop_idle)


@cache
def tls_context() -> ssl.SSLContext:
    """The context of all connections. Loading the system's certificates takes 50 ms.

    Raises:
        OSError: there is no file descriptor for loading them.
    """
    context = default_context()
    context.set_alpn_protocols(("http/1.1",))
    authorities = ssl.get_default_verify_paths().cafile
    if authorities is not None and not context.cert_store_stats()["x509"]:
        # OpenSSL ignores that it can't open the file. Without the certificates, no vendor could be called.
        try:
            context.load_verify_locations(authorities)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
    return context


def _probe(connected: socket.socket) -> None:
    """Turns on TCP keep-alive: a vendor may be silent for minutes, and a NAT forgets silent connections."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has it
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
