"""Request bodies as they arrive: their size, their rate, their chunks, and 100 Continue."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import pytest

from gateway.parsing.json import LARGE_BODY
from pomelo.media.duration import MAX_WORKERS
from pomelo.runtime.in_flight import InFlightLimits
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp
from tests.gateway.requests import (
    CHUNKED,
    EXPECT,
    FORM,
    HI,
    JSON,
    STT,
    code_of,
    incomplete,
    long,
    raw_task,
    read_response,
    read_status,
)

BODY = json.dumps(HI).encode()
HEADERS = {"Content-Type": JSON}
LATE = (504, "deadline_exceeded")
TINY = b"1\r\n \r\n" * 1000


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    """A body without a Content-Length."""
    yield data


# --- size


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize(
    ("size", "outcome"),
    [(1000, (200, "")), (1001, (413, "payload_too_large")), (200_000, (413, "payload_too_large"))],
)
async def test_a_body_of_exactly_the_limit_is_accepted(
    open_gateway: OpenApp, chunked: bool, size: int, outcome: tuple[int, str]
) -> None:
    async with open_gateway(json_limit=1000) as gateway:
        data = BODY.ljust(size)
        sent = in_pieces(data) if chunked else data
        assert await code_of(gateway.post_task(data=sent, headers=HEADERS)) == outcome
        assert await code_of(gateway.post_task(data=BODY[:50] + b'"}', headers=HEADERS)) == (
            400,
            "invalid_body",
        )


async def test_zeros_before_a_content_length_do_not_count(open_gateway: OpenApp) -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nnone\r\n--B--'
    async with open_gateway(json_limit=1000, upload_limit=1000) as gateway:
        for size, code in ((len(form), b"unsupported_model"), (2001, b"payload_too_large")):
            request = raw_task(form, content_type=FORM, framing=f"Content-Length: {'0' * 5000}{size}")
            assert b'"code":"%b"' % code in await gateway.exchange(request)


async def test_a_call_counts_as_in_flight_while_its_body_is_read(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_calls=1)) as gateway:
        async with gateway.connect(raw_task(HI)[: 5 - len(BODY)]) as (reader, writer):
            async with asyncio.timeout(20):
                while await code_of(gateway.post_task(HI)) != (503, "overloaded"):
                    pass
            writer.write(BODY[5:])
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            await reader.read()
        assert await code_of(gateway.post_task(HI)) == (200, "")


async def test_the_bytes_of_buffered_bodies_are_limited(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_bytes=100_000)) as gateway:
        assert await code_of(gateway.post_task(long(120_000))) == (503, "overloaded")
        form = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n%b\r\n--B--' % (b"x" * 120_000)
        assert b'"code":"overloaded"' in await gateway.exchange(raw_task(form, content_type=FORM))
        assert await code_of(gateway.post_task(HI)) == (200, "")


async def test_the_bytes_of_a_small_body_are_counted(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_bytes=len(BODY))) as gateway:
        assert await code_of(gateway.post_task(data=BODY, headers=HEADERS)) == (200, "")
        assert await code_of(gateway.post_task(data=BODY + b" ", headers=HEADERS)) == (503, "overloaded")


async def test_decoded_audio_is_counted_in_addition_to_its_base64(open_gateway: OpenApp) -> None:
    body = json.dumps({**STT, "audio": base64.b64encode(AUDIO[:3000]).decode()}).encode()
    for spare, outcome in ((0, (200, "")), (-1, (503, "overloaded"))):
        async with open_gateway(in_flight=InFlightLimits(account_bytes=len(body) + 3000 + spare)) as gateway:
            assert await code_of(gateway.post_task(data=body, headers=HEADERS)) == outcome


@pytest.mark.parametrize(("size", "stored"), [(3000, False), (3003, True)])
async def test_audio_of_exactly_the_inline_limit_is_not_stored(
    open_gateway: OpenApp, size: int, stored: bool
) -> None:
    async with open_gateway(inline_limit=3000) as gateway:
        audio = base64.b64encode(AUDIO[:size]).decode()
        assert await code_of(gateway.post_task({**STT, "audio": audio})) == (200, "")
        assert (gateway.provider.audio.path is not None) == stored


@pytest.mark.parametrize("limit", [0, 3000], ids=["stored", "inline"])
async def test_the_media_type_of_a_data_uri_is_used_for_audio_without_a_signature(
    open_gateway: OpenApp, limit: int
) -> None:
    async with open_gateway(inline_limit=limit) as gateway:
        audio = f"data:audio/basic;base64,{base64.b64encode(bytes(1000)).decode()}"
        assert await code_of(gateway.post_task({**STT, "audio": audio})) == (200, "")
        assert gateway.provider.audio.content_type == "audio/basic"


@pytest.mark.parametrize(
    ("content_type", "start", "end"),
    [
        (JSON, b'{"model":"gpt-4","messages":[', b"[]]}"),
        (FORM, b'--B\r\nContent-Disposition: form-data; name="messages"\r\n\r\n[', b"[]]\r\n--B--\r\n"),
    ],
)
async def test_json_with_too_many_values_is_refused_and_the_same_bytes_in_a_string_accepted(
    gateway: GatewayApp, content_type: str, start: bytes, end: bytes
) -> None:
    lists = b"[]," * 100_000
    received = await gateway.exchange(raw_task(start + lists + end, content_type=content_type))
    assert b'"code":"invalid_body"' in received
    assert b"65,536 values" in received
    messages = [{"role": "user", "content": lists.decode()}]
    assert await code_of(gateway.post_task({"model": "gpt-4", "messages": messages})) == (200, "")


async def test_the_values_at_the_beginning_of_a_large_body_are_counted(gateway: GatewayApp) -> None:
    many = b'{"model":"gpt-4","stop":[' + b'"",' * 21_000 + b'""],"messages":[' + b'"",' * 45_000 + b'""]}'
    assert len(many) > LARGE_BODY
    sent = raw_task(many)
    async with gateway.connect(sent[:60_000]) as (reader, writer):
        assert await gateway.is_healthy()  # by then they have been read
        writer.write(sent[60_000:])
        assert b"65,536 values" in (await read_response(reader))[2]


async def test_the_values_of_all_fields_of_a_form_are_counted(gateway: GatewayApp) -> None:
    part = b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    values = b"[" + b'"",' * 40_000 + b'""]'
    parts = part % (b"model", b"gpt-4") + part % (b"stop", values)
    assert b"65,536 values" not in await gateway.exchange(raw_task(parts + b"--B--", content_type=FORM))
    parts += part % (b"messages", values)
    assert b"65,536 values" in await gateway.exchange(raw_task(parts + b"--B--", content_type=FORM))


async def test_a_form_that_begins_with_empty_lines_is_refused_early(gateway: GatewayApp) -> None:
    async with gateway.connect(incomplete(content_type=FORM) + b"\r\n" * 1000) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


# --- rate


async def test_the_deadline_of_a_request_ends_the_wait_for_its_body(open_gateway: OpenApp) -> None:
    sent = incomplete("X-Request-Timeout: 0.1") + b"{"
    async with (
        open_gateway(read_grace=60.0, read_timeout=60.0) as gateway,
        gateway.connect(sent) as (reader, _),
    ):
        status, _, body = await asyncio.wait_for(read_response(reader), 20)
    assert (status, b'"code":"deadline_exceeded"' in body) == (504, True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_deadline_of_a_request_ends_the_wait_for_the_length_of_its_audio(
    gateway: GatewayApp, stream: bool
) -> None:
    body = {**STT, "audio": base64.b64encode(AUDIO).decode(), "stream": stream}
    headers = {"X-Request-Timeout": "0.2"}
    workers = gateway.services.tasks._acceptance._measurer._free_workers  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        for _ in range(MAX_WORKERS):
            await workers.acquire()
        try:
            async with gateway.post_task(body, headers=headers) as response:
                assert (response.status, (await response.json())["error"]["code"]) == LATE
                assert "X-Credits-Remaining" in response.headers
        finally:
            for _ in range(MAX_WORKERS):
                workers.release()
        assert not gateway.provider.jobs
        async with gateway.post_task(body) as response:
            assert response.status == 200


async def test_a_stalled_body_times_out(open_gateway: OpenApp) -> None:
    async with open_gateway(read_timeout=0.05, linger_timeout=0.05) as gateway:
        assert b'"code":"invalid_body"' in await gateway.exchange(incomplete() + b"{")


async def test_a_body_below_the_minimum_rate_is_refused_and_one_at_the_rate_accepted(
    open_gateway: OpenApp,
) -> None:
    sent = raw_task({**HI, "user": "x" * 200})
    head, body = sent[: sent.index(b"{")], sent[sent.index(b"{") :]
    async with open_gateway(read_rate=200, read_grace=0.2, linger_timeout=0.1) as gateway:

        async def send(step: int) -> bytes:
            async with gateway.connect(head) as (reader, writer):
                line = asyncio.create_task(reader.readline())
                for at in range(0, len(body), step):
                    writer.write(body[at : at + step])
                    await asyncio.wait([line], timeout=0.02)
                return await asyncio.wait_for(line, 20)

        slow, steady = await asyncio.gather(send(1), send(20))
        assert slow == b"HTTP/1.1 400 Bad Request\r\n"
        assert steady == b"HTTP/1.1 200 OK\r\n"
        received = await gateway.exchange(sent[:-1])
        assert b'"code":"invalid_body"' in received
        assert b"200 bytes a second" in received


async def test_what_came_with_the_head_counts_as_sent(open_gateway: OpenApp) -> None:
    sent = raw_task({**HI, "user": "x" * 200})
    async with (
        open_gateway(read_rate=10, read_grace=0.1) as gateway,
        gateway.connect(sent[:-1]) as (reader, writer),
    ):
        line = asyncio.create_task(reader.readline())
        await asyncio.wait([line], timeout=0.4)
        writer.write(sent[-1:])
        assert await asyncio.wait_for(line, 20) == b"HTTP/1.1 200 OK\r\n"


async def test_bytes_sent_fast_do_not_allow_a_long_stall(open_gateway: OpenApp) -> None:
    times = {"read_rate": 1, "read_grace": 0.3, "read_timeout": 0.3, "linger_timeout": 0.1}
    async with (
        asyncio.timeout(20),
        open_gateway(**times) as gateway,
        gateway.connect(incomplete()) as (reader, writer),
    ):
        async with gateway.http.get(f"{gateway.url}/healthz") as response:  # by then the body is waited for
            assert response.status == 200
        writer.write(b"{" + b" " * 5_000)
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


# --- chunks


async def test_tiny_chunks_are_refused_and_small_chunks_accepted(gateway: GatewayApp) -> None:
    start = raw_task(b"", framing=CHUNKED)
    body = json.dumps({**HI, "user": "x" * 200}).encode()
    small = b"".join(b"3\r\n%b\r\n" % body[at : at + 3].ljust(3) for at in range(0, len(body), 3))
    assert (await gateway.exchange(start + small + b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    async with gateway.connect(start) as (reader, writer):
        answered = asyncio.create_task(reader.readline())
        sent = 0
        while not answered.done() and sent < 8 * 1024 * 1024:
            writer.write(TINY)
            sent += 1000
            await writer.drain()
            await asyncio.sleep(0)
        assert await answered == b"HTTP/1.1 400 Bad Request\r\n"
        assert sent < 2_000_000
        assert b"too small chunks" in await asyncio.wait_for(reader.readuntil(b"}}"), 20)


async def test_tiny_chunks_in_bursts_are_counted(gateway: GatewayApp) -> None:
    async with gateway.connect(raw_task(b"", framing=CHUNKED)) as (reader, writer):
        for _ in range(8):  # of 1,000 chunks each; about 4,000 are allowed
            async with gateway.http.get(f"{gateway.url}/healthz") as response:  # by then more is waited for
                assert response.status == 200
            writer.write(TINY)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert b"too small chunks" in await reader.readuntil(b"}}")


@pytest.mark.parametrize(
    ("count", "size", "said"), [(10_000, 1, b"too small chunks"), (8_000, 100, b"body is empty")]
)
async def test_tiny_chunks_that_arrive_together_are_counted_and_many_larger_ones_accepted(
    gateway: GatewayApp, count: int, size: int, said: bytes
) -> None:
    chunk = b"%x\r\n%b\r\n" % (size, b" " * size)
    sent = raw_task(b"", framing=CHUNKED) + chunk * count + b"0\r\n\r\n"
    async with gateway.connect(sent) as (reader, _):
        assert said in (await read_response(reader))[2]


async def test_every_piece_of_a_body_is_counted(open_gateway: OpenApp) -> None:
    sent = raw_task({**HI, "user": "x" * 150_000})
    start = sent.index(b"{")
    for spare, status in ((0, 400), (-1, 503)):  # such a user is too long
        limits = InFlightLimits(account_bytes=len(sent) - start + spare)
        async with (
            open_gateway(in_flight=limits) as gateway,
            gateway.connect(sent[:start]) as (reader, writer),
        ):
            for at in range(start, len(sent), 40_000):
                writer.write(sent[at : at + 40_000])
                await writer.drain()
                assert await gateway.is_healthy()  # by then the piece was read
            assert await read_status(reader) == status


async def test_every_piece_of_a_json_text_is_scanned(gateway: GatewayApp) -> None:
    lists = b"[]," * 13_000
    async with gateway.connect(incomplete(framing="Content-Length: 1000000")) as (reader, writer):
        writer.write(b'{"model":"gpt-4","messages":[')
        for _ in range(6):
            writer.write(lists)
            await writer.drain()
            assert await gateway.is_healthy()  # by then the piece was read
        assert b"65,536 values" in (await read_response(reader))[2]


# --- 100 Continue


@pytest.mark.parametrize("expectation", [EXPECT, "Expect: 100-Continue"])
async def test_100_continue_is_sent_when_the_body_is_read_and_once(
    gateway: GatewayApp, expectation: str
) -> None:
    async with gateway.connect(raw_task(HI, expectation)[: -len(BODY)]) as (reader, writer):
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert await reader.readline() == b"\r\n"
        for byte in BODY:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    async with gateway.connect(incomplete(expectation, key="bad")) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"


async def test_a_body_that_is_refused_after_100_continue_gets_a_response(gateway: GatewayApp) -> None:
    async with gateway.connect(raw_task(b"[1]", EXPECT)[:-3]) as (reader, writer):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"[1]")
        status, _, body = await read_response(reader)
    assert (status, b'"code":"invalid_body"' in body) == (400, True)


@pytest.mark.parametrize("encoding", ["Identity", "identity", ""])
async def test_a_body_with_identity_or_no_encoding_is_accepted(gateway: GatewayApp, encoding: str) -> None:
    headers = {**HEADERS, "Content-Encoding": encoding}
    assert await code_of(gateway.post_task(data=BODY, headers=headers)) == (200, "")


async def test_every_content_encoding_of_a_body_is_checked(gateway: GatewayApp) -> None:
    request = raw_task(HI, "Content-Encoding: identity", "Content-Encoding: gzip")
    async with gateway.connect(request) as (reader, _):
        status, _, body = await read_response(reader)
    assert (status, b'"code":"unsupported_media_type"' in body) == (415, True)


@pytest.mark.parametrize("encoding", ["gzip, chunked", "gzip,chunked", "deflate, chunked"])
async def test_a_transfer_encoding_other_than_chunked_is_refused(gateway: GatewayApp, encoding: str) -> None:
    body = json.dumps(HI).encode()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    for given, expected in ((encoding, 415), ("Chunked", 200)):
        async with gateway.connect(raw_task(body, framing=f"Transfer-Encoding: {given}")) as (reader, _):
            assert (await read_response(reader))[0] == expected
