"""Attacks over gRPC: calls that are started and never finished."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

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
PARTIAL = http2.prefixed(b"\x0a" * (9 * MIB - 100_000), size=9 * MIB)
"""The first 8.9 MiB of a message of 9 MiB."""


def many_messages(size: int) -> bytes:
    """A RunTask request of about `size` bytes that consists of empty messages."""
    return _nested(_nested(b"\x0a\x00" * (size // 2), 2), 1)


def _nested(inner: bytes, field_number: int) -> bytes:
    size, head = len(inner), bytearray((field_number << 3 | 2,))
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*head, size)) + inner


GZIP_BOMB = http2.prefixed(gzip.compress(many_messages(9_400_000)), compressed=True)
"""4.7 million empty messages, compressed to 9 KB."""


class Attack:
    """Starts calls on some connections, in turn."""

    def __init__(self, connections: list[http2.Connection]) -> None:
        self._connections = connections
        self.calls: list[tuple[http2.Connection, http2.Stream]] = []
        self._sending: list[asyncio.Future[int]] = []

    def start(
        self,
        count: int,
        path: str,
        metadata: Iterable[tuple[str, str]] = (),
        data: bytes = b"",
        *,
        end: bool = False,
    ) -> None:
        """Starts `count` calls. Each sends `data` as the flow control allows, and half-closes only with
        `end`."""
        for number in range(count):
            connection = self._connections[number % len(self._connections)]
            call = connection.begin(path, metadata)
            self.calls.append((connection, call))
            if data:
                self._sending.append(asyncio.ensure_future(connection.send(call, data, end=end)))

    async def authenticate(self, key: str) -> None:
        """Makes one successful call on each connection: the connection guard does not close it then, and only
        the limits on calls apply."""
        for connection in self._connections:
            call = connection.begin(LIST_MODELS, [("authorization", f"Bearer {key}")])
            await connection.send(call, http2.prefixed(b""), end=True)
            await connection.over(call)

    async def wait_ended(self) -> None:
        for connection, call in self.calls:
            await connection.over(call)

    async def wait_sent(self, count: int) -> None:
        while sum(one.done() for one in self._sending) < count:
            await asyncio.wait(
                [one for one in self._sending if not one.done()], return_when="FIRST_COMPLETED"
            )

    def longest(self) -> float:
        return max(call.lasted for _, call in self.calls)

    def stop(self) -> None:
        for sending in self._sending:
            sending.cancel()


@asynccontextmanager
async def attack(served: Served, connections: int = 10) -> AsyncIterator[Attack]:
    """Opens `connections` connections to the gRPC port, and closes them on exit."""
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(http2.connect(served.host, served.grpc_port))
            for _ in range(connections)
        ]
        attacking = Attack(opened)
        try:
            yield attacking
        finally:
            attacking.stop()
