"""A guard of connections that the test lists in place of the kernel, scan by scan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pomelo.server.accepted_sockets import AcceptedSocket
from pomelo.server.connection_guard import ConnectionGuard
from pomelo.server.connection_limits import ConnectionLimits

MESSAGE = 1_000
"""Maximum bytes of a message."""


class Kernel:
    """Lists connections, and records those that are disconnected; they stay listed, as gRPC has not closed
    them yet."""

    def __init__(self) -> None:
        self.sockets: list[AcceptedSocket] = []
        self.disconnected: list[AcceptedSocket] = []
        self.ended: list[AcceptedSocket] = []

    def list(self) -> Iterator[AcceptedSocket]:
        return iter(self.sockets)

    def end(self, connection: AcceptedSocket) -> None:
        self.ended.append(connection)

    def disconnect(self, connection: AcceptedSocket) -> bool:
        self.disconnected.append(connection)
        return True


class Guarded:
    """A guard, its connections, and a clock that only scans advance. No other scan runs while a test does not
    wait."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.guard = ConnectionGuard(ConnectionLimits(), MESSAGE)
        # Whole, and ahead of the real time of the guard, whose clock then jumps by a fixed step: sums are exact.
        self.now = float(round(time.monotonic()) + 60)

    def limit(self, **limits: Any) -> None:
        self.guard.limits = replace(self.guard.limits, **limits)

    def connect(self, host: str = "192.0.2.1", *, calls: int | None = None) -> AcceptedSocket:
        """Opens a connection that is scanned once; with `calls`, a call with a key has ended on it, and so
        many run."""
        number = len(self.kernel.sockets) + 1
        connection = AcceptedSocket(number, number, (host, number, 0, 0))
        self.kernel.sockets.append(connection)
        for _ in range(0 if calls is None else calls + 1):
            self.guard.authenticated(connection.peer)
        if calls is not None:
            self.guard.ended(connection.peer)
        self.scan(0.0)
        return connection

    def scan(self, seconds: float = 0.25) -> float:
        """Scans after so many seconds, and returns the time until the next scan."""
        self.now += seconds
        return self.guard.scan(self.now)

    @property
    def closed(self) -> list[AcceptedSocket]:
        return self.kernel.disconnected

    def call(self, connection: AcceptedSocket) -> None:
        """Runs a call on a connection."""
        self.guard.authenticated(connection.peer)
        self.guard.ended(connection.peer)
