"""Attacks on REST, as a separate process.

    python -m tests.load.rest_attacks HOST PORT COUNT [KEY]

Makes every attack over COUNT connections concurrently. Prints, as JSON, the longest lifetime in seconds of a
connection of each attack, until the server closed it, and the received statuses. Without a key the attacks
are unauthenticated; with a key they end with the first response.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

MAX_SECONDS = 25.0
"""Seconds after which an attack stops, because the server has not closed its connection."""

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Attack = Callable[[Writer, str], Awaitable[None]]
"""Sends requests with a key until it is cancelled or the connection is closed."""


def head(key: str, length: int | None, content_type: str = "application/json", **more: str) -> bytes:
    """The head of a request that runs a task; its body is chunked if `length` is None."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"{name}: {value}\r\n" for name, value in more.items()]
    return (
        f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: {content_type}\r\n"
        f"{framing}\r\n{''.join(lines)}\r\n"
    ).encode()


async def send(writer: Writer, interval: float, *parts: bytes) -> None:
    """Sends the parts, and then the last one again every `interval` seconds."""
    for part in parts:
        writer.write(part)
        await writer.drain()
    while True:
        await asyncio.sleep(interval)
        writer.write(parts[-1])
        await writer.drain()


async def silence(writer: Writer, key: str) -> None:
    """Sends nothing."""


async def slow_head(writer: Writer, key: str) -> None:
    """An endless request head, one byte at a time."""
    await send(writer, 0.5, b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nA: b", b"b")


async def long_head(writer: Writer, key: str) -> None:
    """An endless request head, at full speed."""
    await send(writer, 0.0, b"POST / HTTP/1.1\r\n", b"A: " + b"x" * 8000 + b"\r\n")


async def slow_body(writer: Writer, key: str) -> None:
    """A body sent one byte at a time, with pauses."""
    await send(writer, 1.0, head(key, 1_000_000), b"{")


async def tiny_chunks(writer: Writer, key: str) -> None:
    """A body of chunks of one byte."""
    await send(writer, 0.0, head(key, None), b"1\r\n{\r\n" * 500)


async def expecting(writer: Writer, key: str) -> None:
    """A body that waits for 100 Continue and is never sent."""
    await send(writer, 60.0, head(key, 1_000_000, Expect="100-continue"))


async def preamble(writer: Writer, key: str) -> None:
    """A form that begins with empty lines."""
    await send(writer, 0.1, head(key, 7_800_000, "multipart/form-data; boundary=B"), b"\r\n" * 16_384)


async def values(writer: Writer, key: str) -> None:
    """A large body of empty lists."""
    body = b'{"model":"gpt-4","messages":[' + b"[]," * 2_600_000 + b"[]]}"
    writer.write(head(key, len(body)) + body)
    await writer.drain()


async def unread_answers(writer: Writer, key: str) -> None:
    """Requests whose answers are never read."""
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.transport.pause_reading()
    await send(writer, 0.2, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)


async def pipeline(writer: Writer, key: str) -> None:
    """Endless pipelined requests."""
    await send(writer, 0.0, b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)


async def refused_then_idle(writer: Writer, key: str) -> None:
    """One refused request, and then nothing."""
    await send(writer, 60.0, head("bad", 2) + b"{}")


async def refused_again(writer: Writer, key: str) -> None:
    """A refused request every 0.7 s."""
    await send(writer, 0.7, head("bad", 2) + b"{}")


async def upgrade(writer: Writer, key: str) -> None:
    """An upgrade to WebSocket, and bytes of that protocol."""
    start = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    await send(writer, 0.05, start, b"\0" * 1000)


UNAUTHENTICATED: tuple[Attack, ...] = (
    silence,
    slow_head,
    long_head,
    slow_body,
    tiny_chunks,
    expecting,
    preamble,
    values,
    unread_answers,
    pipeline,
    refused_then_idle,
    refused_again,
    upgrade,
)
WITH_KEY: tuple[Attack, ...] = (tiny_chunks, preamble, values)
SLOW_WITH_KEY: tuple[Attack, ...] = (slow_body, expecting)
"""Attacks with a key that take longer, made only at full size."""


@contextlib.asynccontextmanager
async def connected(host: str, port: int) -> AsyncIterator[tuple[Reader, Writer]]:
    """Opens a connection, and aborts it on exit."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def run(attack: Attack, host: str, port: int, key: str) -> tuple[float, list[str]]:
    """The lifetime of an attack's connection in seconds, and the statuses of its responses."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    began = loop.time()
    async with connected(host, port) as (reader, writer):
        sending = asyncio.ensure_future(attack(writer, key or "bad"))
        try:
            async with asyncio.timeout(MAX_SECONDS):
                if attack is unread_answers:
                    await sending
                while data := await reader.read(65_536):
                    received += data[:2000]
                    if key and b"\r\n\r\n" in received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""):
                        break
        except (OSError, TimeoutError):
            pass
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            if not sending.cancelled():
                sending.exception()
        ended = loop.time()
    responses = bytes(received).split(b"HTTP/1.1 ")[1:]
    return ended - began, [response[:3].decode() for response in responses]


async def main(host: str, port: int, count: int, key: str) -> None:
    """Makes all attacks concurrently and prints the report."""
    attacks = (WITH_KEY if count < 20 else WITH_KEY + SLOW_WITH_KEY) if key else UNAUTHENTICATED
    results = await asyncio.gather(
        *(asyncio.gather(*(run(attack, host, port, key) for _ in range(count))) for attack in attacks)
    )
    report = {
        attack.__name__: {
            "longest": max(seconds for seconds, _ in one),
            "statuses": collections.Counter(status for _, statuses in one for status in statuses),
        }
        for attack, one in zip(attacks, results, strict=True)
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "")
    )
