"""Five thousand malformed requests: each is refused with an error body, and the server keeps no resources."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import aiohttp

from tests.faults import corpus
from tests.load.process_usage import MIB, open_files, resident
from tests.serving import Served

CONCURRENCY = 16
MAX_GROWTH = 8 * MIB
"""Bytes in 5,000 requests: enough for the allocator's overhead, too little for a leak in each request."""


async def send_all(served: Served, requests: list[bytes]) -> list[bytes]:
    """Sends all requests, CONCURRENCY at a time; returns the responses in the same order."""
    semaphore = asyncio.Semaphore(CONCURRENCY)

    async def send(request: bytes) -> bytes:
        """Sends bytes, half-closes the connection, and reads until the server closes it."""
        async with semaphore:
            reader, writer = await asyncio.open_connection(served.host, served.port)
            response = b""
            with suppress(ConnectionError):
                writer.write(request)
                await writer.drain()
                writer.write_eof()
                async with asyncio.timeout(20):
                    response = await reader.read()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            return response

    return await asyncio.gather(*[send(request) for request in requests])


def status(response: bytes) -> int:
    """The status of a response; 0 if the server closed the connection without one."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.") else 0


async def test_five_thousand_malformed_requests_do_no_harm(served: Served) -> None:
    log_start = len(served.log())
    requests = corpus.all_requests(served.key)
    assert len(requests) >= 5000
    responses = await send_all(served, requests)
    before = resident(served.pid)  # one-time allocations were made by now
    files = open_files(served.pid)
    await send_all(served, requests)
    grown = resident(served.pid) - before
    pairs = list(zip(requests, responses, strict=True))
    failed = [(status(response), request[:300]) for request, response in pairs if status(response) >= 500]
    assert not failed, f"{len(failed)}: {failed[:5]}"
    for request, response in pairs:
        if status(response) >= 400 and not request.startswith(b"HEAD"):
            head, _, body = response.partition(b"\r\n\r\n")
            assert b"application/json" in head, (request[:200], response[:300])
            assert set(json.loads(body)["error"]) == {"message", "type", "code"}, request[:200]
    assert grown < MAX_GROWTH
    assert open_files(served.pid) <= files + 5
    logged = served.log()[log_start:]
    assert "Traceback" not in logged
    assert served.key not in logged
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{served.url}/api/v1/models", headers=served.headers) as answer,
    ):
        assert answer.status == 200
