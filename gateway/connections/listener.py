"""Accepts connections immediately, counts them from then on, and starts a few at a time.

A connection is counted before its TLS handshake, and its time is limited. It starts once its client has
sent something; until then it costs little more than a socket and a slot. Connections wait here and not in
the kernel's queue, where a health check would be behind all others.
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

from gateway.connections.connection import Connection
from gateway.connections.limits import Connections, Slot
from gateway.connections.tls import open_tls
from gateway.cors import Cors
from gateway.errors import raw_error_response
from pomelo.errors import PomeloError

log = logging.getLogger("pomelo.gateway")

HEALTH_REQUEST = b"GET /healthz "

_MAX_ACCEPTS = 256
"""Connections that are accepted in one iteration of the event loop, in some 10 µs each."""

_CLOSING_TIME = 1.0
"""Seconds in which connections that have sent something are started when the listener closes."""

_MAX_STARTS = 16
"""Connections that are started in one iteration, in some 100 µs each."""

_RECEIVE_SIZE = 64 * 1024
"""Approximately the bytes that the kernel buffers for a connection before it is read."""

_MAX_HEALTH_CHECKS = 8
"""Health checks that are started ahead of other connections in one iteration."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_ACCEPT_PAUSE = 0.1
"""Seconds for which accepting pauses when the process has no file descriptor left."""

_LOG_INTERVAL = 60.0
"""The minimum seconds between two log lines about missing file descriptors."""


class Listener:
    """Accepts connections on `sockets`, and closes the sockets at the end. `connect` returns the protocol
    of a connection.

    With `tls`, a connection starts with a TLS handshake of at most `handshake_timeout` seconds. With
    `cors`, refusals have CORS headers.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        connect: Callable[[Slot], Connection],
        connections: Connections,
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
        cors: Cors | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._connect = connect
        self._connections = connections
        self._tls = tls
        self._handshake_timeout = handshake_timeout
        self._cors = cors
        self._silent: set[_PendingConnection] = set()
        self._ready: deque[_PendingConnection] = deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._health_checks_left = _MAX_HEALTH_CHECKS
        self._last_log = -_LOG_INTERVAL

    def start(self) -> None:
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    async def close(self) -> None:
        """Stops accepting, and drops connections that have sent nothing. Starts those that have sent
        something, so that they are answered; a TLS handshake has `_CLOSING_TIME` seconds to end."""
        for listening in self._sockets:
            self._accept(listening)
            self._loop.remove_reader(listening)
            listening.close()
        self._sockets = []
        for pending in [*self._silent]:
            self._connections.close(pending.slot)
            pending.drop(False)
        while self._ready:
            self._start_ready()
        if self._starting:
            # Cancelling one of them would close a connection that has just been made, without an answer.
            _, late = await asyncio.wait(self._starting, timeout=_CLOSING_TIME)
            for task in late:
                task.cancel()
        self._connections.stop()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                accepted, address = listening.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._on_exhausted(listening, error)
                break  # otherwise the queue is empty, or the next client has disconnected
            accepted.setblocking(False)
            refusal = self._refusal if self._tls is None else None
            pending = _PendingConnection(self._loop, accepted, self._silent, refusal)
            slot = pending.slot = self._connections.open(address[0], pending.drop)
            if slot.open and not self._start_or_queue(pending):
                self._silent.add(pending)
                self._loop.add_reader(accepted, self._start_or_queue, pending)

    def _start_or_queue(self, pending: _PendingConnection) -> bool:
        """Starts or queues a connection that has sent something; returns False if it has not."""
        try:
            first = pending.socket.recv(len(HEALTH_REQUEST), socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            first = b""
        pending.stop_waiting()
        if not first:
            self._connections.close(pending.slot)
            pending.drop(False)
            return True
        pending.slot.waiting = True
        if first == HEALTH_REQUEST and self._health_checks_left:
            self._health_checks_left -= 1
            self._connections.protect_health_check(pending.slot)
            self._start(pending)
        else:
            self._ready.append(pending)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start_ready)
        return True

    def _refusal(self, received: bytes) -> bytes:
        """Returns the response that refuses a connection; `received` is what its client has sent."""
        cors = self._cors.unparsed_headers(received) if self._cors is not None else {}
        return raw_error_response(PomeloError("overloaded"), cors)

    def _start_ready(self) -> None:
        self._health_checks_left = _MAX_HEALTH_CHECKS
        ready = self._ready
        started = 0
        while ready and started < _MAX_STARTS:
            pending = ready.popleft()
            if pending.slot.open:
                self._start(pending)
                started += 1
        self._scheduled = bool(ready)
        if ready:
            self._loop.call_soon(self._start_ready)

    def _start(self, pending: _PendingConnection) -> None:
        slot = pending.slot
        if self._tls is not None:  # otherwise the client waits until its first bytes are read
            slot.waiting = False
            self._connections.mark_request_started(slot)
        task = self._loop.create_task(self._open(pending))
        self._starting.add(task)

        def end(send_refusal: bool) -> None:  # until the connection is made
            if send_refusal:
                pending.refuse()
            task.cancel()

        def started(_: asyncio.Task[None]) -> None:
            self._starting.discard(task)
            if not pending.opened:  # cancelled before its first step
                pending.drop(False)

        slot.end = end
        task.add_done_callback(started)

    async def _open(self, pending: _PendingConnection) -> None:
        pending.opened = True
        slot = pending.slot
        tls = self._tls
        try:
            if tls is None:
                await self._loop.connect_accepted_socket(lambda: self._connect(slot), pending.socket)
            else:
                await open_tls(lambda: self._connect(slot), pending.socket, tls, self._handshake_timeout)
        except OSError:  # the TLS handshake failed or timed out, or the client has left
            self._connections.close(slot)
        except asyncio.CancelledError:
            self._connections.close(slot)
            raise

    def _on_exhausted(self, listening: socket.socket, error: OSError) -> None:
        """Ends a connection that can be spared and pauses accepting: no file descriptor is left."""
        now = self._loop.time()
        if now - self._last_log >= _LOG_INTERVAL:
            self._last_log = now
            log.error("a connection can't be accepted: %s. Raise the limit of open files", error.strerror)
        self._connections.make_room()
        self._loop.remove_reader(listening)
        self._loop.call_later(_ACCEPT_PAUSE, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)


class _PendingConnection:
    """A connection that was accepted and has not started. While its client has sent nothing, it is among
    `silent`, and has a reader."""

    __slots__ = ("_loop", "_refusal", "_silent", "opened", "slot", "socket")

    slot: Slot

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        accepted: socket.socket,
        silent: set[_PendingConnection],
        refusal: Callable[[bytes], bytes] | None,
    ) -> None:
        self._loop = loop
        self._silent = silent
        self._refusal = refusal
        self.socket = accepted
        self.opened = False

    def stop_waiting(self) -> None:
        if self in self._silent:
            self._silent.remove(self)
            self._loop.remove_reader(self.socket)

    def drop(self, send_refusal: bool) -> None:
        """Closes a connection that has not started. With `send_refusal` and without TLS, sends `overloaded`
        first."""
        self.stop_waiting()
        if send_refusal:
            self.refuse()
        self.socket.close()

    def refuse(self) -> None:
        """Sends `overloaded`, without TLS, on a connection from which nothing has been read."""
        if self._refusal is None:
            return
        received = b""
        with suppress(OSError):  # unread bytes would make the close a reset, and lose the response
            received = self.socket.recv(_RECEIVE_SIZE)
        with suppress(OSError):
            self.socket.send(self._refusal(received))
            self.socket.shutdown(socket.SHUT_WR)
