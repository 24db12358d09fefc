"""A server in place of Redis that answers what a test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest


class FakeServer:
    """Answers with what `answer` makes of each chunk that arrives; None closes the connection."""

    def __init__(self) -> None:
        self.answer: Callable[[bytes], bytes | None] = lambda chunk: b"+OK\r\n" * chunk.count(b"GET")
        self.chunks: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.ended = 0
        """How many connections have ended."""
        self.port = 0

    @property
    def connections(self) -> int:
        return len(self.writers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                self.chunks.append(chunk)
                answer = self.answer(chunk)
                if answer is None:
                    break
                writer.write(answer)
        self.ended += 1
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield fake
