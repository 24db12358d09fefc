"""Bodies as they arrive: exactly at the size limit, late, silent, and asked for with 100 Continue."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.in_flight import InFlightLimits
from pomelo.providers.base import Job
from tests.gateway.door import KEY, SOUND, Door

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
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


async def code_of(response: Any) -> tuple[int, str]:
    """The status and the error code of an answer; the code is empty on success."""
    async with response as answer:
        value = await answer.json()
        return answer.status, value.get("error", {}).get("code", "")


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize(("extra", "outcome"), [(0, (200, "")), (1, (413, "payload_too_large"))])
async def test_a_body_of_exactly_the_limit_is_accepted(
    opened: OpenDoor, chunked: bool, extra: int, outcome: tuple[int, str]
) -> None:
    async with opened(json_limit=1000) as door:
        data = BODY.ljust(1000 + extra)
        sent = in_pieces(data) if chunked else data
        assert await code_of(door.ask(data=sent, headers=JSON)) == outcome


async def test_the_deadline_of_a_request_ends_the_wait_for_its_body(door: Door) -> None:
    late = head(100, "X-Request-Timeout: 0.1") + b"{"
    async with asyncio.timeout(5), door.talk(late) as (reader, _):
        got = await reader.readuntil(b"}}")
    assert got.startswith(b"HTTP/1.1 504 ")
    assert b'"code":"deadline_exceeded"' in got


async def test_bytes_that_came_fast_do_not_allow_a_long_silence(opened: OpenDoor) -> None:
    times = {"read_rate": 1, "read_grace": 0.3, "read_timeout": 0.3, "linger_timeout": 0.1}
    async with asyncio.timeout(5), opened(**times) as door, door.talk(head(100_000)) as (reader, writer):
        async with door.http.get(f"{door.url}/healthz") as answer:  # by then the body is waited for
            assert answer.status == 200
        writer.write(b"{" + b" " * 5_000)
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


async def test_tiny_chunks_are_counted_when_they_come_in_bursts(door: Door) -> None:
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    async with door.talk(start) as (reader, writer):
        for _ in range(8):  # of 1,000 chunks each; about 4,000 are allowed
            async with door.http.get(f"{door.url}/healthz") as answer:  # by then more is waited for
                assert answer.status == 200
            writer.write(b"1\r\n \r\n" * 1000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert b"too small chunks" in await reader.readuntil(b"}}")


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_a_body_that_is_refused_after_it_was_asked_for_gets_an_answer(door: Door) -> None:
    async with door.talk(head(3, "Expect: 100-continue")) as (reader, writer):
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        writer.write(b"[1]")
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_body"' in answer


async def test_a_body_is_asked_for_once_however_many_pieces_it_comes_in(door: Door) -> None:
    async with door.talk(head(len(BODY), "Expect: 100-continue")) as (reader, writer):
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        for byte in BODY:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


async def test_a_body_in_the_identity_coding_is_accepted(door: Door) -> None:
    headers = {**JSON, "Content-Encoding": "Identity"}
    assert await code_of(door.ask(data=BODY, headers=headers)) == (200, "")


async def test_the_bytes_of_a_small_body_are_counted(opened: OpenDoor) -> None:
    async with opened(in_flight=InFlightLimits(account_bytes=len(BODY))) as door:
        assert await code_of(door.ask(data=BODY, headers=JSON)) == (200, "")
        assert await code_of(door.ask(data=BODY + b" ", headers=JSON)) == (503, "overloaded")


async def test_decoded_audio_counts_beside_its_base64(opened: OpenDoor) -> None:
    body = json.dumps({**STT, "audio": base64.b64encode(SOUND[:3000]).decode()}).encode()
    for spare, outcome in ((0, (200, "")), (-1, (503, "overloaded"))):
        async with opened(in_flight=InFlightLimits(account_bytes=len(body) + 3000 + spare)) as door:
            assert await code_of(door.ask(data=body, headers=JSON)) == outcome


@pytest.mark.parametrize(("size", "stored"), [(3000, False), (3003, True)])
async def test_audio_of_exactly_the_inline_limit_is_not_stored(
    opened: OpenDoor, size: int, stored: bool
) -> None:
    async with opened(inline_limit=3000) as door:
        audio = base64.b64encode(SOUND[:size]).decode()
        assert await code_of(door.ask({**STT, "audio": audio})) == (200, "")
        job = door.player.jobs[-1]
        assert job.audio is not None
        assert (job.audio.path is not None) == stored


@pytest.mark.parametrize("limit", [0, 3000], ids=["stored", "inline"])
async def test_the_media_type_of_a_data_uri_counts_for_samples_that_have_no_signature(
    opened: OpenDoor, limit: int
) -> None:
    async with opened(inline_limit=limit) as door:
        audio = f"data:audio/basic;base64,{base64.b64encode(bytes(1000)).decode()}"
        assert await code_of(door.ask({**STT, "audio": audio})) == (200, "")
        job = door.player.jobs[-1]
        assert job.audio is not None
        assert job.audio.content_type == "audio/basic"


async def free(call: Call) -> Principal:
    """Every key is one of a plan with limits."""
    return Principal("default", "key", live=False, plan="free")


async def test_a_large_body_that_the_task_s_checks_refuse_counts_as_a_request(opened: OpenDoor) -> None:
    async with opened(authenticate=free) as door:
        left: list[int] = []
        for size in (10, 100_000, 10):
            messages = [{"role": "user", "content": "x" * size}]
            async with door.ask({"model": "gpt-4", "messages": messages, "temperature": 9}) as answer:
                assert answer.status == 400
                left.append(int(answer.headers["X-RateLimit-Remaining"]))
        assert left == [20, 19, 19]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_large_task_that_its_provider_refuses_counts_once(opened: OpenDoor, stream: bool) -> None:
    async def refuse(job: Job) -> AsyncIterator[Event]:
        raise PomeloError("content_policy_violation")
        yield Event()

    async with opened(authenticate=free) as door:
        door.player.script = refuse
        messages = [{"role": "user", "content": "x" * 100_000}]
        async with door.ask({"model": "gpt-4", "messages": messages, "stream": stream}) as answer:
            assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (400, "19")
        async with door.ask({"model": "gpt-4", "x": 1}) as answer:
            assert answer.headers["X-RateLimit-Remaining"] == "19"
