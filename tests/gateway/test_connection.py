"""Connections: malformed HTTP, slow and stalling clients, too many of them, and shutting down."""

import asyncio
import contextlib
import gc
import json
import logging
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager

import aiohttp
import pytest
from door import KEY, SOUND, Door, words

from pomelo.gen.v1 import speech_pb2
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}


def request(body: bytes, *, close: bool = True, **headers: str) -> bytes:
    """A POST of a task, as bytes; `_` in a header's name stands for `-`."""
    given = {
        "Host": "x",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    if close:
        given["Connection"] = "close"
    lines = [f"{name}: {value}" for name, value in given.items()]
    return "\r\n".join(["POST /api/v1/task HTTP/1.1", *lines, "", ""]).encode() + body


GOOD = request(json.dumps(HI).encode())
MALFORMED = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET / HTTP/9.9\r\n\r\n",
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
async def test_malformed_http_gets_our_error_body_and_one_line_in_the_log(
    door: Door, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head, _, body = (await door.raw(data)).partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == b"400"
    assert b"Server: pomelo" in head
    assert b"X-Request-Id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_body"
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.rstrip("\n")


async def test_requests_sent_ahead_are_answered_in_turn(door: Door) -> None:
    ahead = request(json.dumps(HI).encode(), close=False)
    got = await door.raw(ahead * 3 + GOOD)
    assert got.count(b"HTTP/1.1 200 OK") == 4


class Traces(logging.Filter):
    """Keeps the log away from pytest, which would grow by it, and counts what should not be in it."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.exc_info is not None or record.levelno >= logging.ERROR
        return False


@pytest.fixture
def traces() -> Iterator[Traces]:
    found = Traces()
    loggers = [logging.getLogger(name) for name in ("pomelo.gateway", "aiohttp.server", "asyncio")]
    for logger in loggers:
        logger.addFilter(found)
    yield found
    for logger in loggers:
        logger.removeFilter(found)


async def test_thousands_of_broken_requests_give_no_5xx_no_trace_and_no_growth(
    door: Door, traces: Traces
) -> None:
    chance = random.Random(20261122)
    form = request(
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt\r\n--B\r\n'
        b'Content-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        + SOUND[:300]
        + b"\r\n--B--\r\n",
        Content_Type="multipart/form-data; boundary=B",
    )
    seeds = [
        GOOD,
        form,
        b"GET /api/v1/models/%ff?\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        *MALFORMED,
    ]

    def broken() -> bytes:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            change = chance.randrange(4)
            if change == 0:
                data[at] = chance.randrange(256)
            elif change == 1:
                del data[at : at + chance.randint(1, 20)]
            elif change == 2:
                data[at:at] = chance.choice(
                    [b"\r\n", b"\0", b'"', b"[" * 300, b"\xff\xfe", b"{", b"--B", b": "]
                )
            else:
                data[at:at] = data[at : at + 50]
            data = data or bytearray(b"x")
        return bytes(data)

    async def send() -> bytes:
        reader, writer = await asyncio.open_connection(door.host, door.port)
        writer.write(broken())
        writer.write_eof()
        got = b""
        try:
            async with asyncio.timeout(20):
                got = await reader.read()
        except ConnectionError:
            pass
        writer.close()
        return got

    async def volley(count: int) -> None:
        for _ in range(count // 20):
            for got in await asyncio.gather(*(send() for _ in range(20))):
                assert not got.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), got

    await volley(1000)
    tracemalloc.start()
    try:
        await volley(1000)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await volley(3000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert traces.count == 0
    assert after - before < 256 * 1024


async def closed_after(door: Door, *pieces: bytes) -> float:
    """Seconds until the server closes a connection on which the pieces come slowly."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(door.host, door.port)
    start = loop.time()

    async def feed() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            for _ in range(100):
                await asyncio.sleep(0)

    feeding = asyncio.create_task(feed())
    try:
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    finally:
        feeding.cancel()
        writer.close()
    return loop.time() - start


async def test_a_head_that_does_not_come_to_its_end_is_given_up(opened: OpenDoor) -> None:
    async with opened(head_timeout=0.2, idle_timeout=60) as door:
        for pieces in ([], [b"GET / HT"], [bytes([b]) for b in b"GET /openapi.json HTTP/1.1\r\nA: b"]):
            assert 0.15 < await closed_after(door, *pieces) < 2
        second = request(json.dumps(HI).encode(), close=False)
        assert 0.15 < await closed_after(door, second, b"POST /api") < 2


async def test_an_idle_connection_is_closed_later_than_an_unfinished_head(opened: OpenDoor) -> None:
    async with opened(head_timeout=0.1, idle_timeout=0.5) as door:
        assert 0.4 < await closed_after(door, request(json.dumps(HI).encode(), close=False)) < 3


async def test_a_client_that_takes_nothing_is_cut_and_its_task_closed(opened: OpenDoor) -> None:
    async with opened(write_timeout=0.3) as door:
        begun = asyncio.Event()

        async def script(job: Job) -> AsyncIterator[Event]:
            begun.set()
            while True:
                chunk = speech_pb2.AudioChunk(data=SOUND, content_type="audio/mpeg")
                yield Event(audio_chunk=chunk)

        door.player.script = script
        quiet = socket.create_connection((door.host, door.port))
        quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            quiet.sendall(
                request(json.dumps({**TTS, "response_format": "b64_json"}).encode(), Accept="audio/*")
            )
            async with asyncio.timeout(10):
                await begun.wait()
                await door.player.closed.wait()
        finally:
            quiet.close()


async def test_a_client_that_takes_slowly_gets_everything(opened: OpenDoor) -> None:
    async with opened(write_timeout=0.2) as door:
        count = 300

        async def script(job: Job) -> AsyncIterator[Event]:
            for _ in range(count):
                yield Event(audio_chunk=speech_pb2.AudioChunk(data=SOUND, content_type="audio/mpeg"))

        door.player.script = script
        reader, writer = await asyncio.open_connection(door.host, door.port, limit=4096)
        writer.write(request(json.dumps({**TTS, "response_format": "b64_json"}).encode(), Accept="audio/*"))
        size = 0
        while piece := await reader.read(64 * 1024):
            size += len(piece)
            await asyncio.sleep(0.005)  # The slowness that is being tested.
        writer.close()
        assert size > count * len(SOUND)


async def test_one_connection_too_many_is_closed_and_the_others_stay(opened: OpenDoor) -> None:
    async with opened(max_connections=2) as door:
        first = await asyncio.open_connection(door.host, door.port)
        second = await asyncio.open_connection(door.host, door.port)
        for _, writer in (first, second):
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in (first, second):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        third, writer = await asyncio.open_connection(door.host, door.port)
        with contextlib.suppress(ConnectionError):  # A reset says the same.
            assert await asyncio.wait_for(third.read(), 5) == b""
        for _, each in (first, second):
            each.close()
        writer.close()


async def test_closing_the_gateway_ends_what_runs_and_frees_the_port(opened: OpenDoor) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        yield words("one")[0]
        begun.set()
        await asyncio.Event().wait()

    async with opened(drain_timeout=0.1) as door:
        door.player.script = script
        answer = await door.ask({**HI, "stream": True})
        await asyncio.wait_for(begun.wait(), 5)
    assert door.player.closed.is_set()
    answer.close()
    async with aiohttp.ClientSession() as late:
        with pytest.raises(aiohttp.ClientConnectorError):
            await late.get(door.url)
