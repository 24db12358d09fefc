"""A server that sends raw bytes, and a client to ask it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from yarl import URL

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from pomelo.providers.http.pool import KEEPALIVE

CHAT = ErrorMapping("acme", lambda body: ErrorBody())
PAID = ErrorMapping("acme", lambda body: ErrorBody(), replays=False)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Wire(asyncio.Transport):
    """A transport whose packets the test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False
        self.paused = False

    def write(self, data: Any) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


@dataclass
class Peer:
    """One connection of a client, as the server sees it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes = b""
    body: bytes = b""
    """The head and the body of its last request."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def request(self) -> None:
        """Reads the next request."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        _, _, length = self.head.partition(b"Content-Length: ")
        self.body = await self.reader.readexactly(int(length.split(b"\r\n")[0] or 0))

    async def left(self) -> bool:
        """Waits until the answer has ended, as it does when the client closes the connection: sooner than
        an idle one is closed."""
        async with asyncio.timeout(KEEPALIVE * 0.8):
            return await self.ended.wait()


@dataclass
class RawServer:
    """A listening server: its URL, and the connections that it got."""

    url: URL
    peers: list[Peer] = field(default_factory=list)


@asynccontextmanager
async def raw_server(
    answer: Callable[[Peer], Awaitable[None]], *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawServer]:
    """Runs `answer` for each connection, and closes the connection afterwards."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        server.peers.append(peer := Peer(reader, writer))
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await answer(peer)
        finally:
            peer.ended.set()
            writer.close()

    listener = await asyncio.start_server(serve, host, 0, ssl=tls)
    name = f"[{host}]" if ":" in host else host
    port = listener.sockets[0].getsockname()[1]
    server = RawServer(URL(f"{'https' if tls else 'http'}://{name}:{port}/"))
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            if task is not None:
                task.cancel()


def sends(*responses: bytes, close: bool = True) -> Callable[[Peer], Awaitable[None]]:
    """Answers one request after the other with these bytes, then closes the connection or stays silent."""

    async def answer(peer: Peer) -> None:
        for response in responses:
            await peer.request()
            peer.writer.write(response)
            await peer.writer.drain()
        if not close:
            await peer.reader.read()

    return answer


async def outcome(http: Http, url: URL, body: bytes = b"{}", *, max_bytes: int = 100_000) -> bytes | str:
    """The body of a response, or the code of the error."""
    try:
        return (await http.fetch(url, {}, body, PAID, max_bytes=max_bytes))[0]
    except UpstreamError as error:
        return error.code


async def streamed(http: Http, url: URL) -> bytes | str:
    """The body of a response that is read as a stream, or the code of the error."""
    try:
        async with http.stream_bytes(url, {}, b"{}", PAID) as body:
            data = b""
            while chunk := await body.read():
                data += chunk
            return data
    except UpstreamError as error:
        return error.code
