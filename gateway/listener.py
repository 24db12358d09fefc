"""Accepts connections immediately, counts them from then on, and starts a few at a time.

A connection is counted before its TLS handshake, and its time is limited whatever its client does.
It starts once its client has sent something; until then it costs little more than a socket and a
slot. Connections wait here and not in the kernel's queue, where a health check would be behind all
others.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from gateway.connection import Connection, overloaded
from gateway.connections import Connections, Slot
from gateway.cors import Cors

log = logging.getLogger("pomelo.gateway")

BACKLOG = 4096
"""Connections that the kernel queues while the event loop is busy."""

HEALTH = b"GET /healthz "

_ACCEPTS = 256
"""Connections that are accepted in one iteration of the event loop, in some 10 µs each."""

_BEGINS = 16
"""Connections that are started in one iteration, in some 100 µs each."""

_ACCEPTED = 64 * 1024
"""Approximately the bytes that the kernel buffers for a connection before it is read."""

_CHECKS = 8
"""Health checks that are started ahead of other connections in one iteration."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_PAUSE = 0.1
"""Seconds for which accepting pauses when the process has no file descriptor left."""

_TOLD_EVERY = 60.0
"""The minimum seconds between two log lines about that."""


async def bind(host: str, port: int, *, reuse_port: bool) -> list[socket.socket]:
    """Returns sockets that listen on each address of `host`, all on one port (0: a free one).

    Raises:
        OSError: an address can't be used.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                listening = socket.socket(family, kind, protocol)
            except OSError:
                continue  # a family that this system does not have
            sockets.append(listening)
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((address[0], port, *address[2:]))
            port = listening.getsockname()[1]
            listening.listen(BACKLOG)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, f"{host} is no address of this machine")
    return sockets


class Listener:
    """Accepts connections on `sockets`, and closes these at the end. `connect` makes the protocol
    of a connection.

    With `tls`, a connection starts with a TLS handshake of at most `handshake` seconds. With `cors`,
    refusals have CORS headers.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        connect: Callable[[Slot], Connection],
        connections: Connections,
        *,
        tls: ssl.SSLContext | None,
        handshake: float,
        cors: Cors | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._connect = connect
        self._connections = connections
        self._tls = tls
        self._handshake = handshake
        self._cors = cors
        self._silent: set[_Arrival] = set()
        self._arrived: deque[_Arrival] = deque()
        self._beginning: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._checks = _CHECKS
        self._told = -_TOLD_EVERY

    def start(self) -> None:
        """Starts to accept connections."""
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def close(self) -> None:
        """Stops accepting, and drops connections that have not started."""
        for listening in self._sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self._sockets = []
        for arrival in (*self._arrived, *self._silent):
            self._connections.close(arrival.slot)
            arrival.drop(False)
        for task in self._beginning:
            task.cancel()
        self._connections.stop()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            try:
                accepted, address = listening.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._exhausted(listening, error)
                break  # otherwise the queue is empty, or the next client has disconnected
            accepted.setblocking(False)
            arrival = _Arrival(self._loop, accepted, refusal=self._refusal if self._tls is None else None)
            slot = arrival.slot = self._connections.open(address[0], arrival.drop)
            if slot.open and not self._look(arrival):
                arrival.watch(self._silent, self._look)

    def _look(self, arrival: _Arrival) -> bool:
        """Starts or queues a connection that has sent something. Returns False if nothing has
        arrived."""
        try:
            first = arrival.socket.recv(len(HEALTH), socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            first = b""
        arrival.forget()
        if not first:
            self._connections.close(arrival.slot)
            arrival.drop(False)
            return True
        if first == HEALTH and self._checks:
            self._checks -= 1
            self._begin(arrival)
        else:
            arrival.slot.waiting = True
            self._arrived.append(arrival)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._begin_some)
        return True

    def _refusal(self, received: bytes) -> bytes:
        """The answer to a client whose connection does not start; `received` has come from it."""
        return overloaded(self._cors.unparsed_headers(received) if self._cors is not None else {})

    def _begin_some(self) -> None:
        self._checks = _CHECKS
        arrived = self._arrived
        begun = 0
        while arrived and begun < _BEGINS:
            arrival = arrived.popleft()
            if arrival.slot.open:
                self._begin(arrival)
                begun += 1
        self._scheduled = bool(arrived)
        if arrived:
            self._loop.call_soon(self._begin_some)

    def _begin(self, arrival: _Arrival) -> None:
        slot = arrival.slot
        slot.waiting = False
        self._connections.hears(slot)
        task = self._loop.create_task(self._open(arrival))
        self._beginning.add(task)

        def end(told: bool) -> None:  # until the connection is made
            task.cancel()

        def begun(_: asyncio.Task[None]) -> None:
            self._beginning.discard(task)
            if not arrival.opened:  # cancelled before its first step
                arrival.drop(False)

        slot.end = end
        task.add_done_callback(begun)

    async def _open(self, arrival: _Arrival) -> None:
        arrival.opened = True
        slot = arrival.slot
        tls = self._tls
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._connect(slot),
                arrival.socket,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else self._handshake,
                ssl_shutdown_timeout=None if tls is None else self._handshake,
            )
        except OSError:  # the TLS handshake failed or timed out, or the client has left
            self._connections.close(slot)
        except asyncio.CancelledError:
            self._connections.close(slot)
            raise

    def _exhausted(self, listening: socket.socket, error: OSError) -> None:
        """Ends a connection that can be spared and pauses accepting: no file descriptor is left."""
        now = self._loop.time()
        if now - self._told >= _TOLD_EVERY:
            self._told = now
            log.error("a connection can't be accepted: %s. Raise the limit of open files", error.strerror)
        self._connections.make_room()
        self._loop.remove_reader(listening)
        self._loop.call_later(_PAUSE, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)


class _Arrival:
    """A connection that was accepted and has not started."""

    __slots__ = ("_loop", "_refusal", "opened", "silent", "slot", "socket")

    slot: Slot

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        accepted: socket.socket,
        *,
        refusal: Callable[[bytes], bytes] | None,
    ) -> None:
        self._loop = loop
        self._refusal = refusal
        self.socket = accepted
        self.opened = False
        self.silent: set[_Arrival] | None = None

    def watch(self, silent: set[_Arrival], heard: Callable[[_Arrival], object]) -> None:
        """Adds itself to `silent` until `forget`; `heard` is called once the first byte has
        arrived."""
        silent.add(self)
        self.silent = silent
        self._loop.add_reader(self.socket, heard, self)

    def forget(self) -> None:
        """Stops waiting for the first byte."""
        if self.silent is not None:
            self.silent.discard(self)
            self.silent = None
            self._loop.remove_reader(self.socket)

    def drop(self, told: bool) -> None:
        """Closes a connection that has not started. With `told` and without TLS, sends `overloaded`
        first."""
        self.forget()
        if told and self._refusal is not None:
            received = b""
            with suppress(OSError):
                received = self.socket.recv(_ACCEPTED)  # else the close would be a reset and lose the answer
            with suppress(OSError):
                self.socket.send(self._refusal(received))
                self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()
