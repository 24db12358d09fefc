"""Attacks on REST, as a separate process.

    python -m tests.load.rest_attacks HOST PORT COUNT [KEY]

Makes every attack over COUNT connections concurrently. Prints, as JSON, the longest lifetime in seconds of a
connection of each attack, until the server closed it, and the received statuses. Without a key the attacks
are unauthenticated; with a key they end with the first response.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MAX_SECONDS = 25.0
"""Seconds after which an attack stops, because the server has not closed its connection."""


def head(key: str, length: int | None, content_type: str = "application/json", **more: str) -> bytes:
    """The head of a request that runs a task; its body is chunked if `length` is None."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"{name}: {value}\r\n" for name, value in more.items()]
    return (
        f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: {content_type}\r\n"
        f"{framing}\r\n{''.join(lines)}\r\n"
    ).encode()


@dataclass(frozen=True)
class Attack:
    """Sends the parts that `parts` makes with a key, and then the last one again every `interval` seconds."""

    interval: float
    parts: Callable[[str], tuple[bytes, ...]]
    reads: bool = True

    async def send(self, transport: asyncio.Transport, writer: asyncio.StreamWriter, key: str) -> None:
        """Sends until it is cancelled or the connection is closed."""
        if not self.reads:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            transport.pause_reading()
        parts = self.parts(key)
        for part in parts:
            writer.write(part)
            await writer.drain()
        while True:
            await asyncio.sleep(self.interval)
            writer.write(parts[-1])
            await writer.drain()


def empty_lists(key: str) -> tuple[bytes]:
    body = b'{"model":"gpt-4","messages":[' + b"[]," * 2_600_000 + b"[]]}"
    return (head(key, len(body)) + body,)


NEVER = 60.0
WEBSOCKET = b"GET /api/v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
FORM = "multipart/form-data; boundary=B"

ATTACKS = {
    "silence": Attack(NEVER, lambda key: (b"",)),
    "slow_head": Attack(0.5, lambda key: (b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nA: b", b"b")),
    "long_head": Attack(0.0, lambda key: (b"POST / HTTP/1.1\r\n", b"A: " + b"x" * 8000 + b"\r\n")),
    "slow_body": Attack(1.0, lambda key: (head(key, 1_000_000), b"{")),
    "tiny_chunks": Attack(0.0, lambda key: (head(key, None), b"1\r\n{\r\n" * 500)),
    "expecting": Attack(NEVER, lambda key: (head(key, 1_000_000, Expect="100-continue"),)),
    "preamble": Attack(0.1, lambda key: (head(key, 7_800_000, FORM), b"\r\n" * 16_384)),
    "values": Attack(NEVER, empty_lists),
    "unread_answers": Attack(
        0.2, lambda key: (b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20,), reads=False
    ),
    "pipeline": Attack(0.0, lambda key: (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,)),
    "refused_then_idle": Attack(NEVER, lambda key: (head("bad", 2) + b"{}",)),
    "refused_again": Attack(0.7, lambda key: (head("bad", 2) + b"{}",)),
    "upgrade": Attack(0.05, lambda key: (WEBSOCKET, b"\0" * 1000)),
}
"""All attacks; without a key all of them are made."""

WITH_KEY = ("tiny_chunks", "preamble", "values")
SLOW_WITH_KEY = ("slow_body", "expecting")
"""Attacks with a key that take longer, made only at full size."""


async def run(attack: Attack, host: str, port: int, key: str) -> tuple[float, list[str]]:
    """The lifetime of an attack's connection in seconds, and the statuses of its responses."""
    received = bytearray()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    assert isinstance(writer.transport, asyncio.Transport)
    sending = asyncio.ensure_future(attack.send(writer.transport, writer, key or "bad"))
    try:
        async with asyncio.timeout(MAX_SECONDS):
            if not attack.reads:
                await sending
            while data := await reader.read(65_536):
                received += data[:2000]
                if key and b"\r\n\r\n" in received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""):
                    break
    except (OSError, TimeoutError):
        pass
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()
    responses = bytes(received).split(b"HTTP/1.1 ")[1:]
    return time.monotonic() - began, [response[:3].decode() for response in responses]


async def main(host: str, port: str, count: str, key: str = "") -> None:
    """Makes all attacks concurrently and prints the report."""
    slow = SLOW_WITH_KEY if int(count) >= 20 else ()
    report = {}

    async def make(name: str) -> None:
        runs = [run(ATTACKS[name], host, int(port), key) for _ in range(int(count))]
        results = await asyncio.gather(*runs)
        report[name] = {
            "longest": max(seconds for seconds, _ in results),
            "statuses": Counter(status for _, statuses in results for status in statuses),
        }

    await asyncio.gather(*[make(name) for name in ((*WITH_KEY, *slow) if key else ATTACKS)])
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
