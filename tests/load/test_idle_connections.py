"""Idle connections, until their time limit; `make load` opens many more of them."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from pomelo.runtime import process
from tests.certificates import make_certificate
from tests.faults import frames
from tests.faults.other_callers import other_callers
from tests.integration.commands import start_interpreter
from tests.load.process_usage import silent_connections, wait_closed
from tests.ports import free_port
from tests.serving import Served, serve_interpreter

COUNT = 1_500 if "LOAD_CALLS" in os.environ else 300
"""Connections of each type."""

SENT = {"silent": b"", "preface": frames.hello(), "half": frames.PREFACE[:5]}
"""The bytes that the connections of each type send."""


async def test_connections_without_a_key_and_unfinished_tls_handshakes_are_closed_within_ten_seconds(
    folder: Path,
) -> None:
    assert process.raise_descriptor_limit() > (len(SENT) + 1) * COUNT

    async def idle(name: str) -> None:
        (folder / name).mkdir()
        async with serve_interpreter(folder / name) as served, AsyncExitStack() as stack:
            async with other_callers(served, "rest", "grpc", "new_grpc") as callers:
                await stack.enter_async_context(silent_connections(served.grpc_port, COUNT, SENT[name]))
                await wait_closed(served.pid, served.grpc_port, 3, 12)  # the other callers have three
            callers.check()

    async def shake_hands() -> None:
        await asyncio.to_thread(make_certificate, folder, "cert", "localhost")
        port = free_port()
        variables = {"POMELO_TLS_CERT": str(folder / "cert.pem"), "POMELO_TLS_KEY": str(folder / "cert.key")}
        variables |= {"POMELO_REST": "", "POMELO_GRPC": f"127.0.0.1:{port}"}
        async with start_interpreter(folder, "serve", **variables) as running:
            await running.read_until("gRPC")
            async with silent_connections(port, COUNT, b"", b"\x16\x03\x01\x02\x00\x01"):
                await wait_closed(running.process.pid, port, 0, 12)

    # Concurrently, each on its own server, to wait only once.
    await asyncio.gather(*[idle(name) for name in SENT], shake_hands())


@pytest.mark.skipif("LOAD_CALLS" not in os.environ, reason="takes a minute and a half; make load")
@pytest.mark.timeout(240)
async def test_a_rest_connection_is_closed_soon_after_its_idle_timeout(tmp_path: Path) -> None:
    async def idle(served: Served, pause: float, max_wait: float) -> float:
        """Uses a connection again after an idle pause; returns the seconds until it is closed, or
        `max_wait`."""
        reader, writer = await asyncio.open_connection(served.host, served.port)
        key = served.headers["Authorization"]
        request = f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n".encode()
        for seconds in (0, pause):
            await asyncio.sleep(seconds)
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(max_wait):
                assert await reader.read() == b""
        writer.close()
        return time.monotonic() - began

    for name in ("default", "proxy", "set"):
        (tmp_path / name).mkdir()
    proxy = {"POMELO_TRUSTED_PROXIES": "127.0.0.0/8"}
    async with (
        serve_interpreter(tmp_path / "default") as default,
        serve_interpreter(tmp_path / "proxy", **proxy) as trusted,
        serve_interpreter(tmp_path / "set", **proxy, POMELO_IDLE_TIMEOUT="1") as explicit,
    ):
        _, default_wait, proxy_wait, set_wait = await asyncio.gather(
            idle(default, 75.5, 1), idle(default, 0, 90), idle(trusted, 90, 10), idle(explicit, 1.5, 20)
        )
    assert 75 < default_wait < 86
    assert proxy_wait >= 10
    assert 1 < set_wait < 12
