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
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network

import aiohttp
import pytest

from gateway.app import fit_connections
from pomelo.gen.v1 import speech_pb2
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.certificates import make_certificate
from tests.gateway.gateway_app import AUDIO, KEY, GatewayApp, OpenApp, text_events

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}


def request(body: bytes, *, close: bool = True, **headers: str) -> bytes:
    """A task request, as bytes; `_` in a header's name stands for `-`."""
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


async def test_pipelined_requests_are_handled_in_order(gateway: GatewayApp) -> None:
    ahead = request(json.dumps(HI).encode(), close=False)
    received = await gateway.exchange(ahead * 3 + GOOD)
    assert received.count(b"HTTP/1.1 200 OK") == 4


class TracebackCounter(logging.Filter):
    """Hides the log from pytest, which would keep it in memory, and counts tracebacks and errors."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.exc_info is not None or record.levelno >= logging.ERROR
        return False


@pytest.fixture
def traces() -> Iterator[TracebackCounter]:
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
    form = request(
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt\r\n--B\r\n'
        b'Content-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        + AUDIO[:300]
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
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
        writer.write(broken())
        writer.write_eof()
        received = b""
        try:
            async with asyncio.timeout(20):
                received = await reader.read()
        except ConnectionError:
            pass
        writer.close()
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
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
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


async def test_an_incomplete_request_head_times_out(open_gateway: OpenApp) -> None:
    async with open_gateway(head_timeout=0.2, untrusted_timeout=0.2, idle_timeout=60) as gateway:
        for pieces in ([], [b"GET / HT"], [bytes([b]) for b in b"GET /openapi.json HTTP/1.1\r\nA: b"]):
            assert 0.15 < await closed_after(gateway, *pieces) < 2
        second = request(json.dumps(HI).encode(), close=False)
        assert 0.15 < await closed_after(gateway, second, b"POST /api") < 2


async def test_an_idle_connection_is_closed_later_than_an_unfinished_head(open_gateway: OpenApp) -> None:
    async with open_gateway(head_timeout=0.1, idle_timeout=0.5, idle_slack=0) as gateway:
        assert 0.4 < await closed_after(gateway, request(json.dumps(HI).encode(), close=False)) < 3


async def test_an_idle_connection_stays_a_little_longer_so_that_a_client_with_the_same_timeout_closes_first(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(idle_timeout=0.5, idle_slack=1.0) as gateway,
        connection(gateway) as (reader, writer),
    ):
        for _ in range(2):
            writer.write(ACCOUNT)
            assert (await read_response(reader))[0] == 200
            await asyncio.sleep(0.7)
        begin = asyncio.get_running_loop().time()
        assert await read_until_closed(reader) == b""
        assert 0.5 < asyncio.get_running_loop().time() - begin < 3


@pytest.mark.parametrize(
    ("networks", "kept"), [(["10.0.0.0/8", "127.0.0.0/8"], True), (["10.0.0.0/8"], False)]
)
async def test_an_idle_connection_from_a_trusted_proxy_stays_longer(
    open_gateway: OpenApp, networks: list[str], kept: bool
) -> None:
    times = {"idle_timeout": 0.3, "proxy_idle_timeout": 1.5, "idle_slack": 0, "untrusted_timeout": 0.2}
    async with open_gateway(trusted_proxies=tuple(map(ip_network, networks)), **times) as gateway:
        good = request(json.dumps(HI).encode(), close=False)
        took = await closed_after(gateway, good)
        assert (1.3 if kept else 0.25) < took < (4 if kept else 1.3)
        # Without a valid key it is closed soon, from a proxy too.
        assert await closed_after(gateway, BAD) < 1.3


async def test_a_client_that_reads_nothing_is_disconnected_and_its_task_closed(open_gateway: OpenApp) -> None:
    async with open_gateway(write_timeout=0.3) as gateway:
        started = asyncio.Event()

        async def script(job: Job) -> AsyncIterator[Event]:
            started.set()
            while True:
                chunk = speech_pb2.AudioChunk(data=AUDIO, content_type="audio/mpeg")
                yield Event(audio_chunk=chunk)

        gateway.provider.script = script
        quiet = socket.create_connection((gateway.host, gateway.port))
        quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            quiet.sendall(
                request(json.dumps({**TTS, "response_format": "b64_json"}).encode(), Accept="audio/*")
            )
            async with asyncio.timeout(10):
                await started.wait()
                await gateway.provider.closed.wait()
        finally:
            quiet.close()


async def test_a_client_that_reads_slowly_receives_everything(open_gateway: OpenApp) -> None:
    async with open_gateway(write_timeout=0.2) as gateway:
        count = 300

        async def script(job: Job) -> AsyncIterator[Event]:
            for _ in range(count):
                yield Event(audio_chunk=speech_pb2.AudioChunk(data=AUDIO, content_type="audio/mpeg"))

        gateway.provider.script = script
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port, limit=4096)
        writer.write(request(json.dumps({**TTS, "response_format": "b64_json"}).encode(), Accept="audio/*"))
        size = 0
        while piece := await reader.read(64 * 1024):
            size += len(piece)
            await asyncio.sleep(0.005)  # the client is slow on purpose
        writer.close()
        assert size > count * len(AUDIO)


ACCOUNT = f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
BAD = request(b"{}", close=False, Authorization="Bearer bad")
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def connection(gateway: GatewayApp) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Opens a connection and aborts it at the end."""
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Reads the next response: status, headers by lower-case name, body."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Reads until the server closes the connection."""
    received = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):  # a reset also means closed
            while piece := await reader.read(65_536):
                received += piece
    return received


def is_overloaded(status: int, headers: dict[str, str], body: bytes) -> bool:
    """Whether a response is the `overloaded` error of the error table."""
    assert (headers["content-type"], headers["retry-after"]) == ("application/json", "1")
    assert headers["x-request-id"].startswith("req_")
    return (status, json.loads(body)["error"]["code"]) == (503, "overloaded")


async def test_untrusted_connections_are_evicted_before_trusted_ones(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(max_connections=2) as gateway,
        connection(gateway) as (caller, calls),
        connection(gateway) as (untrusted, _),
    ):
        calls.write(ACCOUNT)
        assert (await read_response(caller))[0] == 200
        async with connection(gateway) as (new, news):
            assert is_overloaded(*await read_response(untrusted))
            assert await read_until_closed(untrusted) == b""
            for reader, writer in ((new, news), (caller, calls)):
                writer.write(ACCOUNT)
                assert (await read_response(reader))[0] == 200


async def test_an_idle_connection_is_evicted_and_a_busy_one_is_not(open_gateway: OpenApp) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        started.set()
        await asyncio.Event().wait()
        yield text_events("late")[0]

    async with (
        open_gateway(max_connections=2) as gateway,
        connection(gateway) as (_, calls),
        connection(gateway) as (idle, others),
    ):
        gateway.provider.script = script
        calls.write(request(json.dumps(HI).encode(), close=False))
        await asyncio.wait_for(started.wait(), 5)
        others.write(ACCOUNT)
        assert (await read_response(idle))[0] == 200
        async with connection(gateway) as (new, news):
            news.write(ACCOUNT)
            assert (await read_response(new))[0] == 200
            assert await read_until_closed(idle) == b""
        assert not gateway.provider.closed.is_set()


async def test_when_all_connections_are_busy_a_new_one_gets_overloaded_and_health_checks_are_served(
    open_gateway: OpenApp,
) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        started.set()
        await asyncio.Event().wait()
        yield text_events("late")[0]

    async with (
        open_gateway(max_connections=1, linger_timeout=5.0) as gateway,
        connection(gateway) as (_, calls),
    ):
        gateway.provider.script = script
        calls.write(request(json.dumps(HI).encode(), close=False))
        await asyncio.wait_for(started.wait(), 5)
        for data in (GOOD, ACCOUNT, BAD, request(b"x", Content_Length="1000000"), b"GET / HTTP/1.1\r\n\r\n"):
            async with connection(gateway) as (reader, writer):
                writer.write(data)
                assert is_overloaded(*await read_response(reader))
                writer.write(b"x" * 100_000)  # later bytes do not discard the response
        for _ in range(3):
            async with connection(gateway) as (reader, writer):
                writer.write(HEALTH)
                status, _, body = await read_response(reader)
                assert (status, body) == (200, b'{"status":"ok"}')


async def test_health_needs_no_key_and_reports_draining(open_gateway: OpenApp) -> None:
    healthy = True
    async with open_gateway(healthy=lambda: healthy) as gateway:
        async with gateway.http.get(f"{gateway.url}/healthz") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        async with gateway.http.head(f"{gateway.url}/healthz") as response:
            assert response.status == 200
        healthy = False
        async with gateway.http.get(f"{gateway.url}/healthz") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    "pieces",
    [[], [b"GET / HT"], [BAD], [GOOD[:-1].replace(KEY.encode(), b"bad")], [ACCOUNT.replace(b"GET", b"PUT")]],
    ids=["silent", "in a head", "idle", "in a body", "another method"],
)
async def test_a_connection_without_a_valid_key_is_closed_soon(
    open_gateway: OpenApp, pieces: list[bytes]
) -> None:
    async with open_gateway(
        untrusted_timeout=0.5, idle_timeout=60, head_timeout=60, linger_timeout=60
    ) as gateway:
        assert 0.4 < await closed_after(gateway, *pieces) < 4


async def test_a_valid_key_keeps_a_connection_open_and_an_invalid_one_closes_it(
    open_gateway: OpenApp,
) -> None:
    async with open_gateway(untrusted_timeout=0.5) as gateway, connection(gateway) as (reader, writer):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while loop.time() - begin < 1.2:
            writer.write(ACCOUNT)
            assert (await read_response(reader))[0] == 200
            await asyncio.sleep(0.2)  # an idle caller
        writer.write(BAD)
        assert (await read_response(reader))[0] == 401
        assert await read_until_closed(reader) == b""


async def test_a_connection_stays_open_while_a_signed_link_is_downloaded(open_gateway: OpenApp) -> None:
    async with open_gateway(untrusted_timeout=0.5) as gateway:
        async with gateway.post_task({**TTS, "response_format": "url"}) as response:
            url = (await response.json())["audio"]["url"]
        path = url.removeprefix(gateway.url).encode()
        async with connection(gateway) as (reader, writer):
            loop = asyncio.get_running_loop()
            begin = loop.time()
            while loop.time() - begin < 1.2:
                writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await read_response(reader))[2] == AUDIO
                await asyncio.sleep(0.2)  # an idle downloader


async def test_concurrent_downloads_by_links_are_limited(open_gateway: OpenApp) -> None:
    async with open_gateway(max_downloads=2) as gateway:
        async with gateway.post_task({**TTS, "response_format": "url"}) as response:
            url = (await response.json())["audio"]["url"]
        name = url.rpartition("/")[2].partition("?")[0]
        (file,) = gateway.media.folder.glob(f"*{name.partition('.')[0]}*")
        file.write_bytes(bytes(20_000_000))
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port, limit=4096)
        try:
            writer.write(f"GET {url.removeprefix(gateway.url)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            async with gateway.http.get(url) as response:
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "overloaded"
            async with gateway.http.get(url.partition("?")[0], headers=gateway.headers) as own:
                assert own.status == 200
                own.close()
        finally:
            writer.transport.abort()
        async with asyncio.timeout(5):
            while (await gateway.http.head(url)).status != 200:
                pass


async def test_an_unauthenticated_caller_gets_few_responses_on_a_connection(gateway: GatewayApp) -> None:
    for data, status in ((BAD, 401), (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404)):
        async with connection(gateway) as (reader, writer):
            writer.write(data * 50)
            received = await read_until_closed(reader)
            assert received.count(b"HTTP/1.1 %d " % status) == received.count(b"HTTP/1.1 ") == 4
            assert received.count(b"Connection: close") == 1


async def test_the_total_size_of_a_request_head_is_limited(gateway: GatewayApp) -> None:
    async with connection(gateway) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for i in range(40):
            writer.write(b"A%d: " % i + b"x" * 1000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        status, _, body = await read_response(reader)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_body")
        assert await read_until_closed(reader) == b""


async def test_an_oversized_head_does_not_corrupt_a_running_response(gateway: GatewayApp) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        yield text_events("one")[0]
        started.set()
        await asyncio.Event().wait()

    gateway.provider.script = script
    async with connection(gateway) as (reader, writer):
        writer.write(request(json.dumps({**HI, "stream": True}).encode(), close=False))
        await asyncio.wait_for(started.wait(), 5)
        with contextlib.suppress(ConnectionError):
            for i in range(40):
                writer.write(b"GET / HTTP/1.1\r\n" * (i == 0) + b"A%d: " % i + b"x" * 1000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        assert b"400 Bad Request" not in await read_until_closed(reader)
        await asyncio.wait_for(gateway.provider.closed.wait(), 5)


async def test_slow_heads_of_one_address_are_limited_and_its_authenticated_callers_served(
    open_gateway: OpenApp,
) -> None:
    async with (
        open_gateway(max_untrusted=3, untrusted_grace=0.2) as gateway,
        contextlib.AsyncExitStack() as stack,
    ):
        slow = [await stack.enter_async_context(connection(gateway)) for _ in range(8)]
        for _, writer in slow:
            writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x")
        for reader, _ in slow[:5]:
            assert is_overloaded(*await read_response(reader))
        caller, calls = await stack.enter_async_context(connection(gateway))
        calls.write(ACCOUNT)
        assert (await read_response(caller))[0] == 200
        for reader, writer in slow[5:]:
            writer.write(b"\r\n\r\n")
            assert (await read_response(reader))[0] == 404


async def test_concurrent_connections_of_one_address_are_all_served(open_gateway: OpenApp) -> None:
    async with open_gateway(max_untrusted=5, untrusted_grace=0.1) as gateway:

        async def send_request() -> int:
            async with connection(gateway) as (reader, writer):
                await asyncio.sleep(0.5)  # the client is slow to send its request
                writer.write(ACCOUNT)
                return (await read_response(reader))[0]

        assert set(await asyncio.gather(*[send_request() for _ in range(300)])) == {200}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A TLS server context for loopback."""
    made = tmp_path_factory.mktemp("certificate")
    make_certificate(made, "cert", "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "cert.pem", made / "cert.key")
    return context


async def test_an_unfinished_tls_handshake_times_out(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    async with open_gateway(tls=certificate, untrusted_timeout=0.5) as gateway:
        for pieces in ([], [b"\x16\x03\x01\x02\x00\x01"], [b"GET / HTTP/1.1\r\n\r\n"]):
            assert await closed_after(gateway, *pieces) < 4
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        url = f"https://{gateway.host}:{gateway.port}/api/v1/account"
        async with gateway.http.get(url, headers=gateway.headers, ssl=trusting) as response:
            assert response.status == 200
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port, ssl=trusting)
        assert await read_until_closed(reader) == b""
        writer.transport.abort()


async def test_connections_in_a_tls_handshake_count_and_can_be_evicted(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    async with (
        open_gateway(tls=certificate, max_connections=3) as gateway,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(connection(gateway)) for _ in range(4)]
        assert await read_until_closed(silent[0][0]) == b""
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        url = f"https://{gateway.host}:{gateway.port}/api/v1/account"
        async with gateway.http.get(url, headers=gateway.headers, ssl=trusting) as response:
            assert response.status == 200
        assert await read_until_closed(silent[1][0]) == b""


async def test_the_connection_limit_fits_the_file_descriptor_limit(caplog: pytest.LogCaptureFixture) -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert fit_connections(files // 2) == files // 2
    assert not caplog.records
    assert fit_connections(files) == files // 2
    assert "POMELO_MAX_CONNECTIONS" in caplog.text


async def test_without_descriptors_an_unauthenticated_connection_is_evicted_and_accepting_continues(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with connection(gateway) as (untrusted, _):
        while not await is_served(gateway, HEALTH):
            pass
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.create_connection((gateway.host, gateway.port))
        sockets: list[socket.socket] = []
        try:
            number = waiting.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, before[1]))
            with contextlib.suppress(OSError):
                while True:
                    sockets.append(socket.socket())
            async with asyncio.timeout(5):
                while "Raise the limit of open files" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert is_overloaded(*await read_response(untrusted))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in sockets:
                each.close()
            waiting.close()
    assert await is_served(gateway, HEALTH)


async def is_served(gateway: GatewayApp, data: bytes) -> bool:
    """Whether a request on a new connection gets a 200."""
    async with connection(gateway) as (reader, writer):
        writer.write(data)
        return (await read_response(reader))[0] == 200


async def test_closing_the_gateway_ends_running_requests_and_frees_the_port(open_gateway: OpenApp) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        yield text_events("one")[0]
        started.set()
        await asyncio.Event().wait()

    async with open_gateway(drain_timeout=0.1) as gateway:
        gateway.provider.script = script
        response = await gateway.post_task({**HI, "stream": True})
        await asyncio.wait_for(started.wait(), 5)
    assert gateway.provider.closed.is_set()
    response.close()
    async with aiohttp.ClientSession() as late:
        with pytest.raises(aiohttp.ClientConnectorError):
            await late.get(gateway.url)


@pytest.mark.parametrize("start", [b"1;", b"1\r\na\r\n0\r\nX: ", b'1\r\na\r\n1;a="'])
async def test_chunk_extensions_and_trailers_are_limited(gateway: GatewayApp, start: bytes) -> None:
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
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
