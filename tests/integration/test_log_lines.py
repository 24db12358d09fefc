"""Unauthenticated callers can make the server log only a few lines of each sort, and a count of the others."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

from tests.serving import serve

MALFORMED = b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"
JUNK = [MALFORMED, b"\x16\x03\x01" + b"\0" * 40, b"\0" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"x" * 50]


async def send(port: int, data: bytes) -> None:
    """Sends bytes to a port, reads the answer, and resets the connection."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    try:
        writer.write(data)
        async with asyncio.timeout(0.5):
            await reader.read(4096)
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


async def test_a_flood_of_malformed_requests_logs_a_few_lines_and_a_count(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        before = len(served.log().splitlines())
        for _ in range(8):
            await asyncio.gather(
                *[
                    send(port, data)
                    for data in JUNK
                    for port in (served.port, served.grpc_port)
                    for _ in range(8)
                ]
            )
    lines = served.log().splitlines()[before:]
    malformed = [line for line in lines if "a malformed request was refused" in line]
    assert len(malformed) == 11, lines
    suppressed = re.search(r"([\d,]+) similar lines suppressed", malformed[-1])
    assert suppressed is not None
    assert int(suppressed[1].replace(",", "")) >= 100
    assert len(lines) < 40, lines
