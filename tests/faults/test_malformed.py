"""Five thousand malformed requests: each gets a clear refusal, and the server is as it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest

from tests.faults import corpus
from tests.serving import Served, serve

AT_ONCE = 16
MOST_GROWTH = 8 * 1024 * 1024
"""Bytes in 5,000 requests: room for what an allocator keeps, not for what a request leaves."""


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """`pomelo serve`, as a process of its own."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def ask(host: str, port: int, request: bytes) -> bytes:
    """Sends bytes as they are, says that no more will come, and reads until the server closes."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            await writer.drain()
            writer.write_eof()
            async with asyncio.timeout(20):
                return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask_all(served: Served, requests: list[bytes]) -> list[bytes]:
    """Sends many, a few at once."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(request: bytes) -> bytes:
        async with turn:
            return await ask(served.host, served.port, request)

    return await asyncio.gather(*[one(request) for request in requests])


def status(answer: bytes) -> int:
    """The status of an answer; 0 when the server just closed."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


async def test_five_thousand_malformed_requests_do_no_harm(served: Served) -> None:
    greeting = len(served.log())
    requests = corpus.everything(served.key)
    assert len(requests) >= 5000
    process = psutil.Process(served.pid)
    answers = await ask_all(served, requests)
    before = process.memory_info().rss  # now what is loaded once is loaded
    files = process.num_fds()
    await ask_all(served, requests)
    grown = process.memory_info().rss - before
    wrong = [(status(a), r[:300]) for r, a in zip(requests, answers, strict=True) if status(a) >= 500]
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    for request, answer in zip(requests, answers, strict=True):
        if status(answer) >= 400 and not request.startswith(b"HEAD"):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"application/json" in head, (request[:200], answer[:300])
            assert set(json.loads(body)["error"]) == {"message", "type", "code"}, request[:200]
    assert grown < MOST_GROWTH
    assert process.num_fds() <= files + 5
    logged = served.log()[greeting:]
    assert "Traceback" not in logged
    assert served.key not in logged
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{served.url}/api/v1/models", headers=served.headers) as answer,
    ):
        assert answer.status == 200
