"""Connections: malformed HTTP, slow and stalling clients, too many of them, and shutting down."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import random
import resource
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_network

import aiohttp
import pytest

from gateway.app import fit_connections
from pomelo.gen.v1 import speech_pb2
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.certificates import make_certificate
from tests.gateway.door import KEY, SOUND, Door, words

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
    async with opened(head_timeout=0.2, untrusted_timeout=0.2, idle_timeout=60) as door:
        for pieces in ([], [b"GET / HT"], [bytes([b]) for b in b"GET /openapi.json HTTP/1.1\r\nA: b"]):
            assert 0.15 < await closed_after(door, *pieces) < 2
        second = request(json.dumps(HI).encode(), close=False)
        assert 0.15 < await closed_after(door, second, b"POST /api") < 2


async def test_an_idle_connection_is_closed_later_than_an_unfinished_head(opened: OpenDoor) -> None:
    async with opened(head_timeout=0.1, idle_timeout=0.5, idle_slack=0) as door:
        assert 0.4 < await closed_after(door, request(json.dumps(HI).encode(), close=False)) < 3


async def test_an_idle_connection_stays_a_little_longer_so_that_a_client_with_the_same_timeout_closes_first(
    opened: OpenDoor,
) -> None:
    async with opened(idle_timeout=0.5, idle_slack=1.0) as door, client(door) as (reader, writer):
        for _ in range(2):
            writer.write(ACCOUNT)
            assert (await answer(reader))[0] == 200
            await asyncio.sleep(0.7)
        begin = asyncio.get_running_loop().time()
        assert await gone(reader) == b""
        assert 0.5 < asyncio.get_running_loop().time() - begin < 3


@pytest.mark.parametrize(
    ("networks", "kept"), [(["10.0.0.0/8", "127.0.0.0/8"], True), (["10.0.0.0/8"], False)]
)
async def test_an_idle_connection_from_a_trusted_proxy_stays_longer(
    opened: OpenDoor, networks: list[str], kept: bool
) -> None:
    times = {"idle_timeout": 0.3, "proxy_idle_timeout": 1.5, "idle_slack": 0, "untrusted_timeout": 0.2}
    async with opened(trusted_proxies=tuple(map(ip_network, networks)), **times) as door:
        good = request(json.dumps(HI).encode(), close=False)
        took = await closed_after(door, good)
        assert (1.3 if kept else 0.25) < took < (4 if kept else 1.3)
        assert await closed_after(door, BAD) < 1.3  # without a good key it is closed soon, also here


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


ACCOUNT = f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
BAD = request(b"{}", close=False, Authorization="Bearer bad")
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def client(door: Door) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Opens a connection and aborts it at the end."""
    reader, writer = await asyncio.open_connection(door.host, door.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Reads the next response: status, headers by lower-case name, body."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def gone(reader: asyncio.StreamReader) -> bytes:
    """Reads until the server closes the connection."""
    got = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):  # a reset also means closed
            while piece := await reader.read(65_536):
                got += piece
    return got


def is_overloaded(status: int, headers: dict[str, str], body: bytes) -> bool:
    """Whether a response is the `overloaded` error of the error table."""
    assert (headers["content-type"], headers["retry-after"]) == ("application/json", "1")
    assert headers["x-request-id"].startswith("req_")
    return (status, json.loads(body)["error"]["code"]) == (503, "overloaded")


async def test_connections_without_a_key_are_evicted_before_callers(opened: OpenDoor) -> None:
    async with (
        opened(max_connections=2) as door,
        client(door) as (caller, calls),
        client(door) as (stranger, _),
    ):
        calls.write(ACCOUNT)
        assert (await answer(caller))[0] == 200
        async with client(door) as (new, news):
            assert is_overloaded(*await answer(stranger))
            assert await gone(stranger) == b""
            for reader, writer in ((new, news), (caller, calls)):
                writer.write(ACCOUNT)
                assert (await answer(reader))[0] == 200


async def test_an_idle_connection_is_evicted_and_a_busy_one_is_not(opened: OpenDoor) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        begun.set()
        await asyncio.Event().wait()
        yield words("late")[0]

    async with opened(max_connections=2) as door, client(door) as (_, calls), client(door) as (idle, others):
        door.player.script = script
        calls.write(request(json.dumps(HI).encode(), close=False))
        await asyncio.wait_for(begun.wait(), 5)
        others.write(ACCOUNT)
        assert (await answer(idle))[0] == 200
        async with client(door) as (new, news):
            news.write(ACCOUNT)
            assert (await answer(new))[0] == 200
            assert await gone(idle) == b""
        assert not door.player.closed.is_set()


async def test_when_all_connections_are_busy_a_new_one_gets_overloaded_and_health_is_answered(
    opened: OpenDoor,
) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        begun.set()
        await asyncio.Event().wait()
        yield words("late")[0]

    async with opened(max_connections=1, linger_timeout=5.0) as door, client(door) as (_, calls):
        door.player.script = script
        calls.write(request(json.dumps(HI).encode(), close=False))
        await asyncio.wait_for(begun.wait(), 5)
        for asked in (GOOD, ACCOUNT, BAD, request(b"x", Content_Length="1000000"), b"GET / HTTP/1.1\r\n\r\n"):
            async with client(door) as (reader, writer):
                writer.write(asked)
                assert is_overloaded(*await answer(reader))
                writer.write(b"x" * 100_000)  # later bytes do not discard the response
        for _ in range(3):
            async with client(door) as (reader, writer):
                writer.write(HEALTH)
                status, _, body = await answer(reader)
                assert (status, body) == (200, b'{"status":"ok"}')


async def test_health_needs_no_key_and_reports_draining(opened: OpenDoor) -> None:
    healthy = True
    async with opened(healthy=lambda: healthy) as door:
        async with door.http.get(f"{door.url}/healthz") as answered:
            assert (answered.status, await answered.json()) == (200, {"status": "ok"})
        async with door.http.head(f"{door.url}/healthz") as answered:
            assert answered.status == 200
        healthy = False
        async with door.http.get(f"{door.url}/healthz") as answered:
            assert (answered.status, (await answered.json())["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    "pieces",
    [[], [b"GET / HT"], [BAD], [GOOD[:-1].replace(KEY.encode(), b"bad")], [ACCOUNT.replace(b"GET", b"PUT")]],
    ids=["silent", "in a head", "idle", "in a body", "another method"],
)
async def test_a_connection_without_a_good_key_ends_soon_whatever_it_does(
    opened: OpenDoor, pieces: list[bytes]
) -> None:
    async with opened(untrusted_timeout=0.5, idle_timeout=60, head_timeout=60, linger_timeout=60) as door:
        assert 0.4 < await closed_after(door, *pieces) < 4


async def test_a_valid_key_keeps_a_connection_and_an_invalid_one_closes_it(opened: OpenDoor) -> None:
    async with opened(untrusted_timeout=0.5) as door, client(door) as (reader, writer):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while loop.time() - begin < 1.2:
            writer.write(ACCOUNT)
            assert (await answer(reader))[0] == 200
            await asyncio.sleep(0.2)  # an idle caller
        writer.write(BAD)
        assert (await answer(reader))[0] == 401
        assert await gone(reader) == b""


async def test_a_link_keeps_a_connection_while_it_is_downloaded(opened: OpenDoor) -> None:
    async with opened(untrusted_timeout=0.5) as door:
        async with door.ask({**TTS, "response_format": "url"}) as answered:
            url = (await answered.json())["audio"]["url"]
        path = url.removeprefix(door.url).encode()
        async with client(door) as (reader, writer):
            loop = asyncio.get_running_loop()
            begin = loop.time()
            while loop.time() - begin < 1.2:
                writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await answer(reader))[2] == SOUND
                await asyncio.sleep(0.2)  # an idle downloader


async def test_downloads_by_links_are_bounded(opened: OpenDoor) -> None:
    async with opened(max_links=2) as door:
        async with door.ask({**TTS, "response_format": "url"}) as answered:
            url = (await answered.json())["audio"]["url"]
        name = url.rpartition("/")[2].partition("?")[0]
        (file,) = door.media.folder.glob(f"*{name.partition('.')[0]}*")
        file.write_bytes(bytes(20_000_000))
        reader, writer = await asyncio.open_connection(door.host, door.port, limit=4096)
        try:
            writer.write(f"GET {url.removeprefix(door.url)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            async with door.http.get(url) as answered:
                assert answered.status == 503
                assert (await answered.json())["error"]["code"] == "overloaded"
            async with door.http.get(url.partition("?")[0], headers=door.headers) as own:
                assert own.status == 200
                own.close()
        finally:
            writer.transport.abort()
        async with asyncio.timeout(5):
            while (await door.http.head(url)).status != 200:
                pass


async def test_an_unauthenticated_caller_gets_few_responses_on_a_connection(door: Door) -> None:
    for asked, status in ((BAD, 401), (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404)):
        async with client(door) as (reader, writer):
            writer.write(asked * 50)
            got = await gone(reader)
            assert got.count(b"HTTP/1.1 %d " % status) == got.count(b"HTTP/1.1 ") == 4
            assert got.count(b"Connection: close") == 1


async def test_a_head_is_bounded_in_all_its_lines(door: Door) -> None:
    async with client(door) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for i in range(40):
            writer.write(b"A%d: " % i + b"x" * 1000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        status, _, body = await answer(reader)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_body")
        assert await gone(reader) == b""


async def test_a_head_beyond_its_bound_does_not_break_into_an_answer(door: Door) -> None:
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        yield words("one")[0]
        begun.set()
        await asyncio.Event().wait()

    door.player.script = script
    async with client(door) as (reader, writer):
        writer.write(request(json.dumps({**HI, "stream": True}).encode(), close=False))
        await asyncio.wait_for(begun.wait(), 5)
        with contextlib.suppress(ConnectionError):
            for i in range(40):
                writer.write(b"GET / HTTP/1.1\r\n" * (i == 0) + b"A%d: " % i + b"x" * 1000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        assert b"400 Bad Request" not in await gone(reader)
        await asyncio.wait_for(door.player.closed.wait(), 5)


async def test_slow_heads_of_one_address_are_few_and_callers_from_there_are_served(opened: OpenDoor) -> None:
    async with opened(max_untrusted=3, untrusted_grace=0.2) as door, contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(client(door)) for _ in range(8)]
        for _, writer in slow:
            writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x")
        for reader, _ in slow[:5]:
            assert is_overloaded(*await answer(reader))
        caller, calls = await stack.enter_async_context(client(door))
        calls.write(ACCOUNT)
        assert (await answer(caller))[0] == 200
        for reader, writer in slow[5:]:
            writer.write(b"\r\n\r\n")
            assert (await answer(reader))[0] == 404


async def test_concurrent_connections_of_one_address_are_all_answered(opened: OpenDoor) -> None:
    async with opened(max_untrusted=5, untrusted_grace=0.1) as door:

        async def ask() -> int:
            async with client(door) as (reader, writer):
                await asyncio.sleep(0.5)  # the client is slow to send its request
                writer.write(ACCOUNT)
                return (await answer(reader))[0]

        assert set(await asyncio.gather(*[ask() for _ in range(300)])) == {200}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A TLS server context for loopback."""
    made = tmp_path_factory.mktemp("certificate")
    make_certificate(made, "cert", "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "cert.pem", made / "cert.key")
    return context


async def test_a_handshake_that_does_not_end_is_ended(opened: OpenDoor, certificate: ssl.SSLContext) -> None:
    async with opened(tls=certificate, untrusted_timeout=0.5) as door:
        for pieces in ([], [b"\x16\x03\x01\x02\x00\x01"], [b"GET / HTTP/1.1\r\n\r\n"]):
            assert await closed_after(door, *pieces) < 4
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        url = f"https://{door.host}:{door.port}/api/v1/account"
        async with door.http.get(url, headers=door.headers, ssl=trusting) as answered:
            assert answered.status == 200
        reader, writer = await asyncio.open_connection(door.host, door.port, ssl=trusting)
        assert await gone(reader) == b""
        writer.transport.abort()


async def test_connections_in_a_handshake_count_and_make_room(
    opened: OpenDoor, certificate: ssl.SSLContext
) -> None:
    async with (
        opened(tls=certificate, max_connections=3) as door,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(client(door)) for _ in range(4)]
        assert await gone(silent[0][0]) == b""
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        url = f"https://{door.host}:{door.port}/api/v1/account"
        async with door.http.get(url, headers=door.headers, ssl=trusting) as answered:
            assert answered.status == 200
        assert await gone(silent[1][0]) == b""


async def test_the_number_of_connections_fits_the_files_that_may_be_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert fit_connections(files // 2) == files // 2
    assert not caplog.records
    assert fit_connections(files) == files // 2
    assert "POMELO_MAX_CONNECTIONS" in caplog.text


async def test_without_descriptors_an_unauthenticated_connection_is_evicted_and_accepting_continues(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(door) as (stranger, _):
        while not await answers(door, HEALTH):
            pass
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.create_connection((door.host, door.port))
        taken: list[socket.socket] = []
        try:
            number = waiting.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, before[1]))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(socket.socket())
            async with asyncio.timeout(5):
                while "Raise the limit of open files" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert is_overloaded(*await answer(stranger))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in taken:
                each.close()
            waiting.close()
    assert await answers(door, HEALTH)


async def answers(door: Door, asked: bytes) -> bool:
    """Whether a request on a new connection is answered with 200."""
    async with client(door) as (reader, writer):
        writer.write(asked)
        return (await answer(reader))[0] == 200


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


@pytest.mark.parametrize("start", [b"1;", b"1\r\na\r\n0\r\nX: ", b'1\r\na\r\n1;a="'])
async def test_chunk_extensions_and_trailers_are_bounded(door: Door, start: bytes) -> None:
    reader, writer = await asyncio.open_connection(door.host, door.port)
    try:
        writer.write(
            b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + start
        )
        sent = 0
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionError):
                while sent < 512 * 2**20:
                    writer.write(b"a" * 65_536)
                    sent += 65_536
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                assert (await reader.readline()).split()[1] == b"400"
        assert sent < 128 * 2**20
    finally:
        writer.close()
