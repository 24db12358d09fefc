"""Request bodies as they arrive: exactly at the size limit, late, stalled, and after 100 Continue."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.in_flight import InFlightLimits
from pomelo.providers.base import Job
from tests.gateway.gateway_app import AUDIO, KEY, GatewayApp, OpenApp

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
STT = {"model": "eleven-labs-stt"}
BODY = json.dumps(HI).encode()
JSON = {"Content-Type": "application/json"}


def head(length: int, *more: str) -> bytes:
    """The request line and headers of a task request with a JSON body of `length` bytes."""
    lines = [
        "POST /api/v1/task HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "Connection: close",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    """A body without a Content-Length."""
    yield data


async def code_of(request: Any) -> tuple[int, str]:
    """The status and the error code of a response; the code is empty on success."""
    async with request as response:
        value = await response.json()
        return response.status, value.get("error", {}).get("code", "")


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize(("extra", "outcome"), [(0, (200, "")), (1, (413, "payload_too_large"))])
async def test_a_body_of_exactly_the_limit_is_accepted(
    open_gateway: OpenApp, chunked: bool, extra: int, outcome: tuple[int, str]
) -> None:
    async with open_gateway(json_limit=1000) as gateway:
        data = BODY.ljust(1000 + extra)
        sent = in_pieces(data) if chunked else data
        assert await code_of(gateway.post_task(data=sent, headers=JSON)) == outcome


async def test_the_deadline_of_a_request_ends_the_wait_for_its_body(gateway: GatewayApp) -> None:
    late = head(100, "X-Request-Timeout: 0.1") + b"{"
    async with asyncio.timeout(5), gateway.connect(late) as (reader, _):
        got = await reader.readuntil(b"}}")
    assert got.startswith(b"HTTP/1.1 504 ")
    assert b'"code":"deadline_exceeded"' in got


async def test_bytes_sent_fast_do_not_allow_a_long_stall(open_gateway: OpenApp) -> None:
    times = {"read_rate": 1, "read_grace": 0.3, "read_timeout": 0.3, "linger_timeout": 0.1}
    async with (
        asyncio.timeout(5),
        open_gateway(**times) as gateway,
        gateway.connect(head(100_000)) as (reader, writer),
    ):
        async with gateway.http.get(f"{gateway.url}/healthz") as response:  # by then the body is waited for
            assert response.status == 200
        writer.write(b"{" + b" " * 5_000)
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


async def test_tiny_chunks_in_bursts_are_counted(gateway: GatewayApp) -> None:
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    async with gateway.connect(start) as (reader, writer):
        for _ in range(8):  # of 1,000 chunks each; about 4,000 are allowed
            async with gateway.http.get(f"{gateway.url}/healthz") as response:  # by then more is waited for
                assert response.status == 200
            writer.write(b"1\r\n \r\n" * 1000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert b"too small chunks" in await reader.readuntil(b"}}")


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_a_body_that_is_refused_after_100_continue_gets_a_response(gateway: GatewayApp) -> None:
    async with gateway.connect(head(3, "Expect: 100-continue")) as (reader, writer):
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        writer.write(b"[1]")
        response = await reader.read()
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_body"' in response


async def test_100_continue_is_sent_once_per_body(gateway: GatewayApp) -> None:
    async with gateway.connect(head(len(BODY), "Expect: 100-continue")) as (reader, writer):
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        for byte in BODY:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


async def test_a_body_with_identity_encoding_is_accepted(gateway: GatewayApp) -> None:
    headers = {**JSON, "Content-Encoding": "Identity"}
    assert await code_of(gateway.post_task(data=BODY, headers=headers)) == (200, "")


async def test_the_bytes_of_a_small_body_are_counted(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_bytes=len(BODY))) as gateway:
        assert await code_of(gateway.post_task(data=BODY, headers=JSON)) == (200, "")
        assert await code_of(gateway.post_task(data=BODY + b" ", headers=JSON)) == (503, "overloaded")


async def test_decoded_audio_is_counted_in_addition_to_its_base64(open_gateway: OpenApp) -> None:
    body = json.dumps({**STT, "audio": base64.b64encode(AUDIO[:3000]).decode()}).encode()
    for spare, outcome in ((0, (200, "")), (-1, (503, "overloaded"))):
        async with open_gateway(in_flight=InFlightLimits(account_bytes=len(body) + 3000 + spare)) as gateway:
            assert await code_of(gateway.post_task(data=body, headers=JSON)) == outcome


@pytest.mark.parametrize(("size", "stored"), [(3000, False), (3003, True)])
async def test_audio_of_exactly_the_inline_limit_is_not_stored(
    open_gateway: OpenApp, size: int, stored: bool
) -> None:
    async with open_gateway(inline_limit=3000) as gateway:
        audio = base64.b64encode(AUDIO[:size]).decode()
        assert await code_of(gateway.post_task({**STT, "audio": audio})) == (200, "")
        job = gateway.provider.jobs[-1]
        assert job.audio is not None
        assert (job.audio.path is not None) == stored


@pytest.mark.parametrize("limit", [0, 3000], ids=["stored", "inline"])
async def test_the_media_type_of_a_data_uri_is_used_for_audio_without_a_signature(
    open_gateway: OpenApp, limit: int
) -> None:
    async with open_gateway(inline_limit=limit) as gateway:
        audio = f"data:audio/basic;base64,{base64.b64encode(bytes(1000)).decode()}"
        assert await code_of(gateway.post_task({**STT, "audio": audio})) == (200, "")
        job = gateway.provider.jobs[-1]
        assert job.audio is not None
        assert job.audio.content_type == "audio/basic"


async def free(call: Call) -> Principal:
    """Accepts every key, with a plan that has limits."""
    return Principal("default", "key", live=False, plan="free")


async def test_a_large_body_that_validation_refuses_counts_as_a_request(open_gateway: OpenApp) -> None:
    async with open_gateway(authenticate=free) as gateway:
        left: list[int] = []
        for size in (10, 100_000, 10):
            messages = [{"role": "user", "content": "x" * size}]
            async with gateway.post_task(
                {"model": "gpt-4", "messages": messages, "temperature": 9}
            ) as response:
                assert response.status == 400
                left.append(int(response.headers["X-RateLimit-Remaining"]))
        assert left == [20, 19, 19]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_large_task_that_its_provider_refuses_counts_once(
    open_gateway: OpenApp, stream: bool
) -> None:
    async def refuse(job: Job) -> AsyncIterator[Event]:
        raise PomeloError("content_policy_violation")
        yield Event()

    async with open_gateway(authenticate=free) as gateway:
        gateway.provider.script = refuse
        messages = [{"role": "user", "content": "x" * 100_000}]
        async with gateway.post_task({"model": "gpt-4", "messages": messages, "stream": stream}) as response:
            assert (response.status, response.headers["X-RateLimit-Remaining"]) == (400, "19")
        async with gateway.post_task({"model": "gpt-4", "x": 1}) as response:
            assert response.headers["X-RateLimit-Remaining"] == "19"
