"""Java's own HTTP client, which asks for HTTP/2 in its requests on a connection without TLS."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import HI, KEY

PROGRAM = Path(__file__).parents[1] / "java" / "HttpClientCalls.java"


async def test_requests_of_javas_client_share_a_connection(gateway: GatewayApp) -> None:
    if shutil.which("javac") is None:
        pytest.skip("no Java compiler is on this machine")
    heads: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with gateway.connect() as (there, back):
            first = await reader.read(65_536)
            heads.append(first)
            back.write(first)

            async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                with suppress(ConnectionError):
                    while data := await source.read(65_536):
                        target.write(data)
                target.close()

            await asyncio.gather(copy(reader, back), copy(there, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        java = await asyncio.create_subprocess_exec(
            *("java", PROGRAM, f"http://{host}:{port}", KEY, json.dumps(HI)), stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await java.communicate()
    assert printed.decode().splitlines() == ["200 HTTP_1_1"] * 3
    (head,) = heads
    assert b"\r\nUpgrade: h2c\r\n" in head
