"""Calls that are started and never finished."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from tests.faults import http2
from tests.serving import Served

MIB = 1024 * 1024
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIST_MODELS = "/pomelo.v1.ModelService/ListModels"
RUN_TASK = "/pomelo.v1.TaskService/RunTask"
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
DOWNLOAD = "/pomelo.v1.MediaService/DownloadMedia"
HALF = http2.prefixed(b"\x0a" * (9 * MIB - 100_000), size=9 * MIB)
"""8.9 of 9 MiB."""


def flood(size: int) -> bytes:
    """A RunTask request of about that many bytes, made up of empty messages."""
    return _nested(_nested(b"\x0a\x00" * (size // 2), 2), 1)


def _nested(inner: bytes, field_number: int) -> bytes:
    size, head = len(inner), bytearray((field_number << 3 | 2,))
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*head, size)) + inner


BOMB = http2.prefixed(gzip.compress(flood(9_400_000)), compressed=True)
"""4.7 million empty messages in 9 KB."""


class Attack:
    """Connections, and the calls on them."""

    def __init__(self, served: Served, connections: list[http2.Connection]) -> None:
        self._served = served
        self._connections = connections
        self.calls: list[tuple[http2.Connection, http2.Stream]] = []
        self._sending: list[asyncio.Future[int]] = []

    def begin(
        self,
        count: int,
        path: str,
        metadata: Iterable[tuple[str, str]] = (),
        data: bytes = b"",
        *,
        end: bool = False,
    ) -> None:
        """Starts that many calls; each sends `data` as the windows allow, and half-closes only with `end`."""
        for number in range(count):
            connection = self._connections[number % len(self._connections)]
            call = connection.begin(path, metadata)
            self.calls.append((connection, call))
            if data:
                self._sending.append(asyncio.ensure_future(connection.send(call, data, end=end)))

    async def show(self, key: str) -> None:
        """Authenticates each connection with one successful call: after that the connection guard no longer
        closes it, and only the limits on calls apply."""
        for connection in self._connections:
            call = connection.begin(LIST_MODELS, [("authorization", f"Bearer {key}")])
            await connection.send(call, http2.prefixed(b""), end=True)
            await connection.over(call)

    async def over(self) -> None:
        """Returns when every call is over."""
        for connection, call in self.calls:
            await connection.over(call)

    async def sent(self, count: int) -> None:
        """Returns when that many calls have sent all their data."""
        while sum(one.done() for one in self._sending) < count:
            await asyncio.wait(
                [one for one in self._sending if not one.done()], return_when="FIRST_COMPLETED"
            )

    def longest(self) -> float:
        """Seconds that the longest call took."""
        return max(call.lasted for _, call in self.calls)

    def end(self) -> None:
        """Stops sending."""
        for sending in self._sending:
            sending.cancel()


@asynccontextmanager
async def attack(served: Served, connections: int = 10) -> AsyncIterator[Attack]:
    """Opens that many connections."""
    opened = [http2.connect(served.host, served.grpc_port) for _ in range(connections)]
    entered = [await one.__aenter__() for one in opened]
    attacking = Attack(served, entered)
    try:
        yield attacking
    finally:
        attacking.end()
        for one in opened:
            await one.__aexit__(None, None, None)
