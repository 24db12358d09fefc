"""Connections: malformed HTTP, slow and stalling clients, the size of a head, and shutting down."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from ipaddress import ip_network
from itertools import pairwise
from typing import Any

import pytest

from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp
from tests.gateway.requests import (
    ACCOUNT,
    BAD,
    CHUNKED,
    FORM,
    GOOD,
    HI,
    KEY,
    TTS,
    raw_get,
    raw_task,
    read_response,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import audio, play, word
from tests.waiting import soon, until

KEPT = raw_task(HI, close=False)
RAW_AUDIO = raw_task({**TTS, "response_format": "b64_json"}, "Accept: audio/*")


MALFORMED = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    b"GET / HTTP/0.9\r\nHost: x\r\n\r\n",
    b"GET /\r\nHost: x\r\n\r\n",
    b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA:" + b"x" * 10_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(300)) + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
    b"GET / HTTP/1.1\r\n: c\r\n\r\n",
    b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999999999999\r\n\r\n",
    b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer pml_test_open\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_http_gets_an_error_body_and_one_log_line(
    gateway: GatewayApp, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head, _, body = (await gateway.exchange(data)).partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == b"400"
    assert b"Server: pomelo" in head
    assert b"X-Request-Id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_body"
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.rstrip("\n")


class TracebackCounter(logging.Filter):
    """Hides the log from pytest, which would keep it in memory, and counts tracebacks and errors."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.exc_info is not None or record.levelno >= logging.ERROR
        return False


@pytest.fixture
def traces() -> Iterator[TracebackCounter]:
    gc.collect()  # asyncio logs an error of a task of an earlier test when the task is collected
    found = TracebackCounter()
    loggers = [logging.getLogger(name) for name in ("pomelo.gateway", "aiohttp.server", "asyncio")]
    for logger in loggers:
        logger.addFilter(found)
    yield found
    for logger in loggers:
        logger.removeFilter(found)


async def test_thousands_of_malformed_requests_cause_no_5xx_no_traceback_and_no_memory_growth(
    gateway: GatewayApp, traces: TracebackCounter
) -> None:
    rng = random.Random(20261122)
    form = raw_task(
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt\r\n--B\r\n'
        b'Content-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        + AUDIO[:300]
        + b"\r\n--B--\r\n",
        content_type=FORM,
    )
    seeds = [
        GOOD,
        form,
        b"GET /api/v1/models/%ff?\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        *MALFORMED,
    ]

    def broken() -> bytes:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[at] = rng.randrange(256)
            elif change == 1:
                del data[at : at + rng.randint(1, 20)]
            elif change == 2:
                data[at:at] = rng.choice([b"\r\n", b"\0", b'"', b"[" * 300, b"\xff\xfe", b"{", b"--B", b": "])
            else:
                data[at:at] = data[at : at + 50]
            data = data or bytearray(b"x")
        return bytes(data)

    async def send() -> bytes:
        received = b""
        async with gateway.connect(broken()) as (reader, writer):
            writer.write_eof()
            with suppress(ConnectionError):
                received = await reader.read()
        return received

    async def send_many(count: int) -> None:
        for _ in range(count // 20):
            for received in await asyncio.gather(*(send() for _ in range(20))):
                assert not received.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), received

    await send_many(1000)
    tracemalloc.start()
    try:
        await send_many(1000)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await send_many(3000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert traces.count == 0
    assert after - before < 256 * 1024


async def closed_after(gateway: GatewayApp, *pieces: bytes) -> float:
    """Returns the seconds until the server closes a connection on which the pieces are sent slowly."""
    loop = asyncio.get_running_loop()
    async with gateway.connect() as (reader, writer):
        start = loop.time()

        async def feed() -> None:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                for _ in range(100):
                    await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        async with asyncio.timeout(30):
            await read_until_closed(reader)
        feeding.cancel()
        return loop.time() - start


async def test_an_incomplete_request_head_times_out(open_gateway: OpenApp) -> None:
    async with open_gateway(head_timeout=0.2, untrusted_timeout=0.2, idle_timeout=60) as gateway:
        for pieces in ([], [b"GET / HT"], [bytes([b]) for b in b"GET /openapi.json HTTP/1.1\r\nA: b"]):
            assert 0.15 < await closed_after(gateway, *pieces) < 20
        assert 0.15 < await closed_after(gateway, KEPT, b"POST /api") < 20


async def test_an_idle_connection_is_closed_later_than_an_unfinished_head(open_gateway: OpenApp) -> None:
    async with open_gateway(head_timeout=0.1, idle_timeout=0.5, idle_slack=0) as gateway:
        assert 0.4 < await closed_after(gateway, KEPT) < 20


async def test_an_idle_connection_stays_a_little_longer_so_that_a_client_with_the_same_timeout_closes_first(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(idle_timeout=0.5, idle_slack=2.5) as gateway,
        gateway.connect() as (reader, writer),
    ):
        for _ in range(2):
            writer.write(ACCOUNT)
            assert await read_status(reader) == 200
            await asyncio.sleep(0.7)
        begin = asyncio.get_running_loop().time()
        assert await read_until_closed(reader) == b""
        assert 1.5 < asyncio.get_running_loop().time() - begin < 20


@pytest.mark.parametrize(
    ("networks", "kept"), [(["10.0.0.0/8", "127.0.0.0/8"], True), (["10.0.0.0/8"], False)]
)
async def test_an_idle_connection_from_a_trusted_proxy_stays_longer(
    open_gateway: OpenApp, networks: list[str], kept: bool
) -> None:
    times: dict[str, Any] = {"idle_timeout": 0.1, "proxy_idle_timeout": 3.0, "idle_slack": 0.3}
    times |= {"untrusted_timeout": 0.2, "trusted_proxies": tuple(map(ip_network, networks))}
    async with open_gateway(**times) as gateway:

        async def closed(_: int) -> float:
            took = await closed_after(gateway, KEPT)
            assert took > (3.1 if kept else 0.25)
            return took

        await soon(closed, 20.0 if kept else 3.0)
        # Without a valid key it is closed soon, from a proxy too.
        await soon(lambda _: closed_after(gateway, BAD), 3.0)


@pytest.mark.parametrize(
    "pieces",
    [[], [b"GET / HT"], [BAD], [GOOD[:-1].replace(KEY.encode(), b"bad")], [raw_get("/nowhere")]],
    ids=["silent", "in a head", "idle", "in a body", "an unknown path"],
)
async def test_a_connection_without_a_valid_key_is_closed_soon(
    open_gateway: OpenApp, pieces: list[bytes]
) -> None:
    async with open_gateway(
        untrusted_timeout=0.5, idle_timeout=60, head_timeout=60, linger_timeout=60
    ) as gateway:
        assert 0.4 < await closed_after(gateway, *pieces) < 20


async def test_a_valid_key_keeps_a_connection_open_and_an_invalid_one_closes_it(
    open_gateway: OpenApp,
) -> None:
    async with open_gateway(untrusted_timeout=1.0) as gateway, gateway.connect() as (reader, writer):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while loop.time() - begin < 1.6:
            writer.write(ACCOUNT)
            assert await read_status(reader) == 200
            await asyncio.sleep(0.2)  # an idle caller
        writer.write(BAD)
        assert await read_status(reader) == 401
        assert await read_until_closed(reader) == b""


async def test_a_client_that_reads_nothing_is_disconnected_and_its_task_closed(open_gateway: OpenApp) -> None:
    started = asyncio.Event()

    async def script(job: Job[Any]) -> AsyncIterator[Event]:
        started.set()
        while True:
            yield audio(AUDIO)

    async with open_gateway(write_timeout=0.3) as gateway, asyncio.timeout(20):
        gateway.provider.script = script
        with socket.create_connection((gateway.host, gateway.port)) as quiet:
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            quiet.sendall(RAW_AUDIO)
            await started.wait()
            await gateway.provider.closed.wait()
            # Otherwise the kernel would keep megabytes, and a client of HTTP/1.0 would take them for complete.
            await until(lambda: quiet.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)


async def test_a_client_that_reads_slowly_receives_everything(open_gateway: OpenApp) -> None:
    # In every period, the client must read enough to make room in the kernel's buffers, about 1 MB.
    count = 1200
    async with open_gateway(write_timeout=1.0) as gateway:
        gateway.provider.script = play(*[audio(AUDIO)] * count)
        async with gateway.connect(RAW_AUDIO, limit=4096) as (reader, _):
            size = 0
            while piece := await reader.read(64 * 1024):
                size += len(piece)
                await asyncio.sleep(0.005)  # the client is slow on purpose
        assert size > count * len(AUDIO)


async def test_an_unauthenticated_caller_gets_few_responses_on_a_connection(gateway: GatewayApp) -> None:
    for data, status in ((BAD, 401), (raw_get("/nowhere"), 404)):
        async with gateway.connect() as (reader, writer):
            writer.write(data * 50)
            received = await read_until_closed(reader)
            assert received.count(b"HTTP/1.1 %d " % status) == received.count(b"HTTP/1.1 ") == 4
            assert received.count(b"Connection: close") == 1


async def send_long_head(writer: asyncio.StreamWriter, start: bytes = b"GET / HTTP/1.1\r\n") -> None:
    """Sends a request head of 40 KB, piece by piece."""
    for number in range(40):
        writer.write(start * (number == 0) + b"A%d: " % number + b"x" * 1000 + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0)


async def test_the_total_size_of_a_request_head_is_limited(gateway: GatewayApp) -> None:
    async with gateway.connect() as (reader, writer):
        await send_long_head(writer)
        status, _, body = await read_response(reader)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_body")
        assert await read_until_closed(reader) == b""


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("count", "status"), [(30, 200), (40, 400)])
async def test_a_head_is_limited_however_it_arrives(
    gateway: GatewayApp, count: int, status: int, parts: int
) -> None:
    more = [f"X-{number}: {'x' * 1000}" for number in range(count)]
    body = {**HI, "messages": [{"role": "user", "content": "x" * 50_000}]}
    asked = raw_task(body, *more, close=False)
    ends = [asked.index(b"X-20: "), asked.index(b"\r\n\r\n") + 4][: parts - 1]
    async with gateway.connect() as (reader, writer):
        for begin, end in pairwise([0, *ends, len(asked)]):
            assert await gateway.is_healthy()  # the part before it has arrived
            writer.write(asked[begin:end])
        assert await read_status(reader) == status


async def test_an_oversized_head_does_not_corrupt_a_running_response(gateway: GatewayApp) -> None:
    started = asyncio.Event()
    gateway.provider.script = play(word(), started.set, asyncio.Event().wait)
    async with gateway.connect(raw_task({**HI, "stream": True}, close=False)) as (reader, writer):
        await asyncio.wait_for(started.wait(), 20)
        with suppress(ConnectionError):
            await send_long_head(writer)
        assert b"400 Bad Request" not in await read_until_closed(reader)
        await asyncio.wait_for(gateway.provider.closed.wait(), 20)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"malformed\r\n\r\n"])
async def test_every_refused_client_gets_time_to_read_its_response(
    open_gateway: OpenApp, start: bytes, times: int
) -> None:
    async with open_gateway(max_connections=8) as gateway:  # one of them may wait for its client to read
        for _ in range(times):
            async with gateway.connect() as (reader, writer):
                await send_long_head(writer, start)
                assert await read_status(reader) == 400
                ended = asyncio.ensure_future(reader.read())
                assert await gateway.is_healthy()
                assert not ended.done()
                ended.cancel()
            assert await gateway.is_healthy()


@pytest.mark.parametrize("start", [b"1;", b"1\r\na\r\n0\r\nX: ", b'1\r\na\r\n1;a="'])
async def test_chunk_extensions_and_trailers_are_limited(gateway: GatewayApp, start: bytes) -> None:
    async with gateway.connect(raw_task(b"", framing=CHUNKED, close=False) + start) as (reader, writer):
        sent = 0
        with suppress(ConnectionError):
            while sent < 512 * 2**20:
                writer.write(b"a" * 65_536)
                sent += 65_536
                await writer.drain()
        with suppress(ConnectionError):
            assert (await reader.readline()).split()[1] == b"400"
        assert sent < 128 * 2**20


@pytest.mark.parametrize(("framing", "ends"), [(CHUNKED, True), ("Content-Length: 100000", False)])
async def test_a_refused_body_of_unknown_length_ends_its_connection(
    gateway: GatewayApp, framing: str, ends: bool
) -> None:
    sent = raw_task(b"", content_type="text/plain", framing=framing, close=False)
    async with gateway.connect(sent) as (reader, _):
        status, headers, _ = await read_response(reader)
    assert (status, headers.get("connection") == "close") == (415, ends)


async def test_the_rest_of_a_refused_body_is_discarded_up_to_a_limit(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(linger_timeout=60.0, untrusted_timeout=60.0) as gateway,
        gateway.connect(raw_task(b"", key="bad", framing="Content-Length: 900000000")) as (reader, writer),
    ):
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 - the test counts what was sent
            while sent < 256 * 2**20:
                writer.write(bytes(2**20))
                sent += 2**20
                await writer.drain()
                if sent == 32 * 2**20:  # more than the kernel buffers
                    assert await read_status(reader) == 401
        assert sent > 60 * 2**20
