"""A client of the gRPC port that sends and receives frames, for tests of connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from tests.faults import frames

MODELS = "/pomelo.v1.ModelService/ListModels"
SOON = 7.0
"""Seconds allowed for an event that should take about one second, and without the limits of a test 8 or more."""


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, key: str) -> None:
        """Calls ListModels as the first call, and returns when it has ended."""
        self.send(frames.hello())
        self.call(key)
        await self.answered()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def call(self, key: str, stream: int = 1) -> None:
        """Calls ListModels."""
        authorization = ("authorization", f"Bearer {key}")
        self.send(frames.headers(stream, MODELS, authorization) + frames.message(stream, b""))

    async def answered(self, stream: int = 1) -> None:
        """Returns when that call has ended."""
        async with asyncio.timeout(20):
            while True:
                head = await self._reader.readexactly(9)
                await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
                if kind == frames.HEADERS and number == stream and flags & frames.END_STREAM:
                    return

    async def closed(self, within: float = SOON) -> None:
        """Returns when the server has closed the connection."""
        async with asyncio.timeout(within):
            with suppress(ConnectionError, ssl.SSLError):
                while await self._reader.read(65536):
                    pass

    @property
    def open(self) -> bool:
        """Whether the connection is still open, as far as this end has seen."""
        return not self._reader.at_eof() and self._reader.exception() is None

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def connected(port: int, host: str = "127.0.0.1", source: str | None = None) -> AsyncIterator[Client]:
    """Opens a connection and sends nothing."""
    local = (source, 0) if source else None
    client = Client(*await asyncio.open_connection(host, port, local_addr=local))
    try:
        yield client
    finally:
        client.close()


@asynccontextmanager
async def many(port: int, count: int, **where: str) -> AsyncIterator[list[Client]]:
    """Opens several connections, one after the other."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(port, **where)) for _ in range(count)]
