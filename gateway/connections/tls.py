"""TLS on accepted connections, with flow control to the last byte.

asyncio and uvloop encrypt a write as a whole and pass it to the TCP transport, and count only what this one
has refused as unsent. So a connection would count a response as read that waits in the TCP transport.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import cast

from gateway.connections.connection import Connection

_RECEIVE_SIZE = 16 * 1024
"""Bytes that are read in one piece before the handshake begins."""

_NO_LIMIT = 2**31 - 1
"""The largest limit of a buffer that uvloop accepts."""


async def open_tls(
    connect: Callable[[], Connection], accepted: socket.socket, context: ssl.SSLContext, seconds: float
) -> None:
    """Makes the connection that `connect` returns after a TLS handshake of at most `seconds`; the client
    has as much time to end TLS.

    Raises:
        OSError: the handshake failed or timed out, or the client has left.
    """
    loop = asyncio.get_running_loop()
    between = _Between()
    early = _EarlyData()
    tcp, _ = await loop.connect_accepted_socket(lambda: between, accepted)
    try:
        handshake = loop.create_task(
            loop.start_tls(
                tcp,
                early,
                context,
                server_side=True,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )
        )
        loop.call_soon(between.attach, tcp)  # runs when the task has set TLS's protocol, and before it reads
        tls = await handshake
        if tls is None or tls.is_closing():
            raise ConnectionResetError("the client has left")
    except BaseException:
        tcp.abort()
        raise
    connection = between.connection = connect()
    connection.has_tls, connection.tcp = True, tcp
    tls.set_protocol(connection)
    connection.connection_made(tls)
    # Only the TCP transport pauses the writer: what TLS keeps back, it keeps while that one is paused.
    tls.set_write_buffer_limits(high=_NO_LIMIT)
    tcp.set_write_buffer_limits(high=1, low=0)
    for data in early.received:
        connection.data_received(data)


class _EarlyData(asyncio.Protocol):
    """Keeps what arrives with the end of the handshake."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.received.append(data)


class _Between(asyncio.BufferedProtocol):
    """The protocol of the TCP transport: passes everything on to TLS's, and pauses the writer of
    `connection` while encrypted bytes are unsent.

    Until `attach`, it keeps what arrives: uvloop reads before a coroutine can start TLS.
    """

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self._tls: asyncio.BufferedProtocol | None = None
        self._is_lost = False
        self._paused = self._paused_again = False
        self._buffer = bytearray(_RECEIVE_SIZE)
        self._received = b""

    def attach(self, tcp: asyncio.Transport) -> None:
        """Takes the place of TLS's protocol, which gets what has arrived once it has started."""
        tls = cast(asyncio.BufferedProtocol, tcp.get_protocol())
        if tls is not self:  # otherwise TLS was cancelled before it started
            self._tls = tls
            tcp.set_protocol(self)
            asyncio.get_running_loop().call_soon(self._pass_on, tcp, tls)

    def _pass_on(self, tcp: asyncio.Transport, tls: asyncio.BufferedProtocol) -> None:
        received, self._received, self._buffer = self._received, b"", bytearray()
        while received and not tcp.is_closing():  # it is when the client has left
            buffer = cast(bytearray, tls.get_buffer(len(received)))
            size = min(len(buffer), len(received))
            buffer[:size] = received[:size]
            tls.buffer_updated(size)
            received = received[size:]
        if self._is_lost:
            tls.connection_lost(None)  # it has begun its handshake since: ends the timer

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer if self._tls is None else cast(bytearray, self._tls.get_buffer(sizehint))

    def buffer_updated(self, nbytes: int) -> None:
        if self._tls is None:
            self._received += self._buffer[:nbytes]
        else:
            self._tls.buffer_updated(nbytes)

    def eof_received(self) -> bool | None:
        return None if self._tls is None else self._tls.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        if self._tls is not None:
            self._tls.connection_lost(exc)  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        assert self._tls is not None
        self._tls.pause_writing()
        if self._paused:
            self._paused_again = True
        else:
            self._paused = True
            if self.connection is not None:
                self.connection.pause_writing()

    def resume_writing(self) -> None:
        assert self._tls is not None
        self._paused_again = False
        self._tls.resume_writing()  # which may write what it has kept back
        if not self._paused_again:
            self._paused = False
            if self.connection is not None:
                self.connection.resume_writing()
