"""POST /api/v1/task: input, the order of checks, and the three forms of a response."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1 import image_pb2, speech_pb2
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.in_flight import InFlightLimits
from pomelo.providers.base import Job
from tests.gateway.gateway_app import AUDIO, HAIKU_ONLY, KEY, PNG, GatewayApp, OpenApp, text_events

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
FLUX = {"model": "flux-1-pro", "prompt": "a lake"}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
STS = {"model": "eleven-labs-sts", "voice": "adam"}


def events(body: bytes) -> list[tuple[str, Any]]:
    """The events of a stream: (name, data as JSON or text); comments are left out."""
    parsed = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            data = fields["data"]
            parsed.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return parsed


async def code_of(request: Any) -> tuple[int, str]:
    """Status and code of a refusal, whose headers are checked."""
    async with request as response:
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-Id"]
        value = await response.json()
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "code"}
        return response.status, value["error"]["code"]


# --- responses


async def test_a_text_task_returns_a_completion_with_security_headers(gateway: GatewayApp) -> None:
    async with gateway.post_task(HI, headers={"X-Request-Id": "mine-1"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-Id"] == "mine-1"
        assert response.headers["X-Pomelo-Mode"] == "test"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Server"] == "pomelo"
        value = await response.json()
    assert value["object"] == "task.completion"
    assert value["choices"][0]["message"]["content"] == 'Hello "wörld"\n'
    assert value["usage"]["total_tokens"] == 5


async def test_the_link_and_the_base64_of_an_image_have_the_same_bytes(gateway: GatewayApp) -> None:
    async with gateway.post_task(FLUX) as response:
        (image,) = (await response.json())["data"]
    assert image["url"].startswith(f"{gateway.url}/media/")
    async with gateway.http.get(image["url"]) as link:
        assert (link.status, link.headers["Content-Type"]) == (200, "image/png")
        assert link.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        assert await link.read() == base64.b64decode(image["b64_json"]) == PNG


async def test_response_format_selects_link_or_base64(gateway: GatewayApp) -> None:
    async with gateway.post_task({**TTS, "response_format": "url"}) as response:
        assert set((await response.json())["audio"]) == {"url"}
    async with gateway.post_task({**TTS, "response_format": "b64_json"}) as response:
        assert set((await response.json())["audio"]) == {"b64_json"}


async def test_accept_selects_raw_media(gateway: GatewayApp) -> None:
    async with gateway.post_task(FLUX, headers={"Accept": "image/*"}) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert await response.read() == PNG
    async with gateway.post_task(TTS, headers={"Accept": "audio/mpeg"}) as response:
        assert response.headers["Content-Type"] == "audio/mpeg"
        assert response.headers["X-Pomelo-Mode"] == "test"
        assert await response.read() == AUDIO
    async with gateway.post_task(HI, headers={"Accept": "audio/*"}) as response:
        assert response.headers["Content-Type"] == "application/json"


async def test_raw_audio_is_sent_while_it_is_generated(gateway: GatewayApp) -> None:
    received_audio = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        yield Event(audio_chunk=speech_pb2.AudioChunk(data=b"one", content_type="audio/mpeg"))
        await received_audio.wait()
        yield Event(audio_chunk=speech_pb2.AudioChunk(data=b"two"))

    gateway.provider.script = script
    async with gateway.post_task(TTS, headers={"Accept": "audio/*"}) as response:
        assert await response.content.readany() == b"one"
        received_audio.set()
        assert await response.content.read() == b"two"


async def test_raw_audio_that_fails_before_its_first_byte_is_an_ordinary_error(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        raise PomeloError("provider_unavailable", retry_after=7)
        yield Event()

    gateway.provider.script = script
    async with gateway.post_task(TTS, headers={"Accept": "audio/*"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "7")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_truncated_raw_audio_can_not_look_complete(gateway: GatewayApp, version: str) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        yield Event(audio_chunk=speech_pb2.AudioChunk(data=b"one", content_type="audio/mpeg"))
        raise PomeloError("provider_failed")

    gateway.provider.script = script
    body = json.dumps(TTS).encode()
    head = (
        f"POST /api/v1/task HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nAccept: audio/*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    received = b""
    with pytest.raises(ConnectionResetError):
        received = await gateway.exchange(head.encode() + body)
    assert not received.endswith(b"0\r\n\r\n")


# --- streams


async def test_a_text_stream_is_chunks_then_usage_then_done(gateway: GatewayApp) -> None:
    async with gateway.post_task({**HI, "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["X-Pomelo-Mode"] == "test"
        received = events(await response.read())
    *chunks, last = [data for _, data in received]
    assert last == "[DONE]"
    assert len({c["id"] for c in chunks}) == 1
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == 'Hello "wörld"\n'
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert all("usage" not in c for c in chunks[:-1])


async def test_a_text_stream_is_sent_word_by_word(gateway: GatewayApp) -> None:
    received_audio = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        first, *rest = text_events("one", "two")
        yield first
        await received_audio.wait()
        for event in rest:
            yield event

    gateway.provider.script = script
    async with gateway.post_task({**HI, "stream": True}) as response:
        assert b'"content":"one"' in await response.content.readuntil(b"\n\n")
        received_audio.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_an_audio_stream_is_chunks_then_the_object_without_base64(gateway: GatewayApp) -> None:
    async with gateway.post_task({**TTS, "stream": True}) as response:
        *chunks, final, done = [data for _, data in events(await response.read())]
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"speech.generation.chunk"}
    audio = b"".join(base64.b64decode(c["audio"]["b64_json"]) for c in chunks)
    assert final["object"] == "speech.generation"
    assert set(final["audio"]) == {"url"}
    async with gateway.http.get(final["audio"]["url"]) as link:
        assert await link.read() == audio == AUDIO


async def test_an_image_stream_is_progress_then_the_image(gateway: GatewayApp) -> None:
    async with gateway.post_task({**FLUX, "stream": True}) as response:
        *progress, final, done = [data for _, data in events(await response.read())]
    assert done == "[DONE]"
    assert [(p["object"], p["progress"]) for p in progress] == [
        ("image.progress", 0.25),
        ("image.progress", 1.0),
    ]
    assert final["object"] == "image.generation"
    assert base64.b64decode(final["data"][0]["b64_json"]) == PNG


SEPARATORS = "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei\r\nj\u2027k\u00a0l😀"
"""All characters at which some client ends a line, and similar ones."""


@pytest.mark.parametrize("last", [False, True], ids=["chunks", "with the last chunk"])
async def test_text_with_line_separators_is_one_line_for_every_client(
    gateway: GatewayApp, last: bool
) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        *deltas, end = text_events("one", SEPARATORS)
        for event in deltas:
            yield event
        if last:
            end.text_delta.content = SEPARATORS
        yield end

    gateway.provider.script = script
    async with gateway.post_task({**HI, "stream": True}) as response:
        body = await response.read()
    for lines in (body.decode().splitlines(), [line.decode() for line in body.splitlines()]):
        *chunks, done = [json.loads(line[6:]) if "{" in line else line for line in lines if line]
        assert done == "data: [DONE]"
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == "one" + SEPARATORS * (1 + last)


async def test_transcripts_and_errors_in_streams_are_one_line_for_every_client(gateway: GatewayApp) -> None:
    async def transcript(job: Job) -> AsyncIterator[Event]:
        script = speech_pb2.Transcription(text=SEPARATORS, language="en", audio_seconds=1)
        script.words.add(text=SEPARATORS)
        yield Event(result=TaskResult(transcription=script))

    async def failure(job: Job) -> AsyncIterator[Event]:
        yield text_events("one")[0]
        raise PomeloError("invalid_parameter", f"Invalid messages: {SEPARATORS}")

    gateway.provider.script = transcript
    ask = {"model": "eleven-labs-stt", "audio": base64.b64encode(AUDIO).decode(), "stream": True}
    async with gateway.post_task(ask) as response:
        final, done = [line for line in (await response.read()).decode().splitlines() if line]
    assert done == "data: [DONE]"
    parsed = json.loads(final.removeprefix("data: "))
    assert (parsed["text"], parsed["words"][0]["text"]) == (SEPARATORS, SEPARATORS)

    gateway.provider.script = failure
    async with gateway.post_task({**HI, "stream": True}) as response:
        _, name, data = [line for line in (await response.read()).decode().splitlines() if line]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"].endswith(SEPARATORS)


async def test_large_audio_chunks_are_split_into_lines_that_every_client_can_read(
    gateway: GatewayApp,
) -> None:
    data = bytes(range(256)) * 1000

    async def script(job: Job) -> AsyncIterator[Event]:
        yield Event(audio_chunk=speech_pb2.AudioChunk(data=data, content_type="audio/mpeg"))
        yield Event(audio_chunk=speech_pb2.AudioChunk(data=b"end"))

    gateway.provider.script = script
    audio = b""
    async with gateway.post_task({**TTS, "stream": True}) as response:
        async for line in response.content:  # aiohttp's own reader of lines
            assert len(line) < 64 * 1024
            if b"b64_json" in line:
                audio += base64.b64decode(json.loads(line[6:])["audio"]["b64_json"])
    assert audio == data + b"end"


@pytest.mark.parametrize("size", [45 * 1024, 45 * 1024 + 1, 3_000_000])
async def test_a_large_image_in_a_stream_is_a_link_unless_base64_is_requested(
    gateway: GatewayApp, size: int
) -> None:
    image = PNG[:8] + bytes(size - 8)

    async def script(job: Job) -> AsyncIterator[Event]:
        result = TaskResult()
        result.image.images.add(data=image, content_type="image/png")
        yield Event(result=result)

    gateway.provider.script = script
    async with gateway.post_task({**FLUX, "stream": True}) as response:
        lines = [line async for line in response.content]  # aiohttp's own reader of lines
    assert max(map(len, lines)) < 64 * 1024
    (media,) = json.loads(lines[0][6:])["data"]
    assert set(media) == ({"url", "b64_json"} if size <= 45 * 1024 else {"url"})
    async with gateway.http.get(media["url"]) as link:
        assert await link.read() == image
    async with gateway.post_task({**FLUX, "stream": True, "response_format": "b64_json"}) as response:
        ((_, final), _) = events(await response.read())
    assert set(final["data"][0]) == {"b64_json"}
    assert base64.b64decode(final["data"][0]["b64_json"]) == image
    async with gateway.post_task(FLUX) as response:
        assert set((await response.json())["data"][0]) == {"url", "b64_json"}


async def test_a_transcript_stream_is_the_transcript(gateway: GatewayApp) -> None:
    body = {"model": "eleven-labs-stt", "audio": base64.b64encode(AUDIO).decode(), "stream": True}
    async with gateway.post_task(body) as response:
        final, done = [data for _, data in events(await response.read())]
    assert (final["object"], final["words"], done) == (
        "speech.transcription",
        [{"text": "hi", "start": 0.0, "end": 0.5, "speaker": None}],
        "[DONE]",
    )


async def test_a_stream_that_fails_before_its_first_event_is_an_ordinary_error(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        raise PomeloError("provider_unavailable")
        yield Event()

    gateway.provider.script = script
    assert await code_of(gateway.post_task({**HI, "stream": True})) == (503, "provider_unavailable")


async def test_a_stream_that_fails_later_ends_with_an_error_event_and_no_done(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        yield text_events("one")[0]
        raise PomeloError("provider_failed")

    gateway.provider.script = script
    async with gateway.post_task({**HI, "stream": True}) as response:
        assert response.status == 200
        received = events(await response.read())
    assert received[-1][0] == "error"
    assert received[-1][1]["error"]["code"] == "provider_failed"
    assert "[DONE]" not in [data for _, data in received]


async def test_an_internal_error_in_a_stream_is_an_error_event_and_logged_once(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        yield text_events("one")[0]
        raise ZeroDivisionError

    gateway.provider.script = script
    async with gateway.post_task({**HI, "stream": True}, headers={"X-Request-Id": "req-find-me"}) as response:
        received = events(await response.read())
    assert received[-1][1]["error"]["code"] == "internal_error"
    (record,) = caplog.records
    first, *frames = record.getMessage().splitlines()
    assert (first, frames[-1]) == ("request req-find-me failed unexpectedly", "builtins.ZeroDivisionError")
    caplog.clear()
    assert await code_of(gateway.post_task(HI)) == (500, "internal_error")
    assert len(caplog.records) == 1


async def test_keep_alive_comments_are_sent_during_silence_and_open_the_stream(open_gateway: OpenApp) -> None:
    async with open_gateway(keep_alive=0.05) as gateway:
        go_on = asyncio.Event()

        async def script(job: Job) -> AsyncIterator[Event]:
            await go_on.wait()
            for event in text_events("one"):
                yield event

        gateway.provider.script = script
        async with asyncio.timeout(10), gateway.post_task({**HI, "stream": True}) as response:
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            go_on.set()
            rest = await response.read()
            assert events(rest)[-1] == ("message", "[DONE]")

        async def fails(job: Job) -> AsyncIterator[Event]:
            await go_on.wait()
            raise PomeloError("provider_failed")
            yield Event()

        gateway.provider.script = fails
        go_on.clear()
        async with gateway.post_task({**HI, "stream": True}) as response:
            assert response.status == 200
            await response.content.readuntil(b"\n\n")
            go_on.set()
            assert events(await response.read())[-1][0] == "error"


async def test_a_deadline_before_the_first_event_is_a_504_and_after_it_an_error_event(
    gateway: GatewayApp,
) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        if job.input.user == "talks":
            yield text_events("one")[0]
        await asyncio.Event().wait()

    gateway.provider.script = script
    soon = {"X-Request-Timeout": "0.1"}
    assert await code_of(gateway.post_task({**HI, "stream": True}, headers=soon)) == (
        504,
        "deadline_exceeded",
    )
    assert await code_of(gateway.post_task(HI, headers=soon)) == (504, "deadline_exceeded")
    async with gateway.post_task({**HI, "stream": True, "user": "talks"}, headers=soon) as response:
        received = events(await response.read())
    assert received[-1][1]["error"]["code"] == "deadline_exceeded"
    assert gateway.provider.closed.is_set()


@pytest.mark.parametrize("body", [HI, {**HI, "stream": True}, {**TTS, "stream": True}, FLUX])
@pytest.mark.parametrize("accept", ["application/json", "image/*, audio/*"])
async def test_a_disconnect_closes_the_provider_immediately(
    gateway: GatewayApp, body: dict[str, Any], accept: str
) -> None:
    started = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        if "messages" in body:
            yield text_events("one")[0]
        started.set()
        await asyncio.Event().wait()

    gateway.provider.script = script
    request_task = asyncio.create_task(gateway.post_task(body, headers={"Accept": accept}).__aenter__())
    await asyncio.wait_for(started.wait(), 5)
    if body.get("stream") and "messages" in body:
        (await request_task).close()
    else:
        request_task.cancel()
        await asyncio.wait([request_task])
    left = asyncio.get_running_loop().time()
    await asyncio.wait_for(gateway.provider.closed.wait(), 5)
    assert asyncio.get_running_loop().time() - left < 0.05


# --- refusals


@pytest.mark.parametrize(
    ("key", "body", "refusal"),
    [
        ("bad", b"{", (401, "invalid_api_key")),
        ("bad", b'{"model":"nope","x":1}', (401, "invalid_api_key")),
        (KEY, b"{", (400, "invalid_body")),
        (KEY, b"", (400, "invalid_body")),
        (KEY, b"[]", (400, "invalid_body")),
        (KEY, b"[" * 200 + b"]" * 200, (400, "invalid_body")),
        (KEY, b"{}", (400, "missing_parameter")),
        (KEY, b'{"model":5}', (400, "invalid_parameter")),
        (KEY, b'{"model":"nope","x":1}', (400, "unsupported_model")),
        (KEY, b'{"model":"gpt-4","x":1}', (400, "invalid_parameter")),
        (KEY, b'{"model":"gpt-4","messages":7}', (400, "invalid_parameter")),
        (KEY, b'{"model":"gpt-4"}', (400, "missing_parameter")),
        (HAIKU_ONLY, b'{"model":"gpt-4","x":1}', (403, "model_not_allowed")),
        (HAIKU_ONLY, b'{"model":"gpt-4","messages":[]}', (403, "model_not_allowed")),
        (KEY, b'{"model":"eleven-labs-stt","audio":"!"}', (400, "invalid_parameter")),
        (KEY, b'{"model":"eleven-labs-stt"}', (400, "missing_parameter")),
    ],
)
async def test_the_key_is_checked_first_then_the_body_the_model_and_the_fields(
    gateway: GatewayApp, key: str, body: bytes, refusal: tuple[int, str]
) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    assert await code_of(gateway.post_task(data=body, headers=headers)) == refusal


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/jsonx"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_an_unsupported_content_type_or_encoding_is_a_415_after_the_key_check(
    gateway: GatewayApp, headers: dict[str, str]
) -> None:
    assert await code_of(gateway.post_task(data=b"{}", headers=headers)) == (415, "unsupported_media_type")
    unauthenticated = {**headers, "Authorization": "Bearer x"}
    assert await code_of(gateway.post_task(data=b"{}", headers=unauthenticated)) == (401, "invalid_api_key")


async def test_an_error_has_the_headers_of_the_call(gateway: GatewayApp) -> None:
    async with gateway.post_task({**HI, "x": 1}) as response:
        assert response.status == 400
        assert response.headers["X-Pomelo-Mode"] == "test"


async def test_an_invalid_header_is_reported_only_with_a_valid_key(gateway: GatewayApp) -> None:
    wrong = {"X-Request-Timeout": "soon"}
    assert await code_of(gateway.post_task(HI, headers=wrong)) == (400, "invalid_parameter")
    assert await code_of(gateway.post_task(HI, headers={**wrong, "Authorization": "x"})) == (
        401,
        "invalid_api_key",
    )


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_json_body_above_the_limit_is_a_413(open_gateway: OpenApp, chunked: bool) -> None:
    async with open_gateway(json_limit=100_000) as gateway:
        body = json.dumps({**HI, "user": "x" * 200_000}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            yield body

        data: Any = pieces() if chunked else body
        headers = {"Content-Type": "application/json"}
        assert await code_of(gateway.post_task(data=data, headers=headers)) == (413, "payload_too_large")
        async with gateway.post_task(data=body[:50] + b'"}', headers=headers) as response:
            assert response.status == 400


async def test_a_stalled_body_times_out(open_gateway: OpenApp) -> None:
    async with open_gateway(read_timeout=0.05, linger_timeout=0.05) as gateway:
        head = (
            f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
        )
        assert b'"code":"invalid_body"' in await gateway.exchange(head.encode())


def head(key: str, length: int, *more: str) -> bytes:
    """The request line and headers of a task request."""
    lines = ["POST /api/v1/task HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "Connection: close", "", ""]).encode()


JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=B"


async def test_unauthenticated_requests_are_refused_before_their_body_is_read(gateway: GatewayApp) -> None:
    for more in ((JSON,), (FORM,), (JSON, "Expect: 100-continue"), (FORM, "Expect: 100-continue"), ()):
        for length in (1, 60_000, 50_000_000, 10**12):
            async with gateway.connect(head("bad", length, *more)) as (reader, _):
                assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"


async def test_an_invalid_header_is_refused_before_the_body_is_read(gateway: GatewayApp) -> None:
    async with gateway.connect(head(KEY, 10, JSON, "X-Request-Timeout: soon")) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


@pytest.mark.parametrize(
    "name",
    [
        "Idempotency-Key",
        "X-Request-Id",
        "X-Request-Timeout",
        "traceparent",
        "Prefer",
        "Accept",
        "content-type",
    ],
)
async def test_a_repeated_header_is_refused_and_named(gateway: GatewayApp, name: str) -> None:
    body = json.dumps(HI).encode()
    for one, other in (("5", "5"), ("5", "x")):
        twice = (f"{name}: {one}", f"{name.upper()}: {other}")
        received = await gateway.exchange(
            head(KEY, len(body), *(() if name == "content-type" else (JSON,)), *twice) + body
        )
        first, _, rest = received.partition(b"\r\n")
        assert first.endswith(b" 400 Bad Request")
        error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "invalid_parameter"
        assert name.lower() in error["message"].lower()
        if name != "content-type":  # aiohttp refuses it before the key is checked
            assert (await gateway.exchange(head("bad", len(body), JSON, *twice) + body)).startswith(
                b"HTTP/1.1 401 "
            )


async def test_two_authorization_headers_are_refused(gateway: GatewayApp) -> None:
    body = json.dumps(HI).encode()
    for first, second in ((KEY, "bad"), ("bad", KEY), (KEY, KEY)):
        received = await gateway.exchange(
            head(first, len(body), JSON, f"authorization: Bearer {second}") + body
        )
        assert received.startswith(b"HTTP/1.1 401 ")


async def test_a_body_below_the_minimum_rate_is_refused_and_one_at_the_rate_accepted(
    open_gateway: OpenApp,
) -> None:
    body = json.dumps({**HI, "user": "x" * 200}).encode()
    async with open_gateway(read_rate=200, read_grace=0.2, linger_timeout=0.1) as gateway:

        async def send(step: int) -> bytes:
            async with gateway.connect(head(KEY, len(body), JSON)) as (reader, writer):
                line = asyncio.create_task(reader.readline())
                for at in range(0, len(body), step):
                    writer.write(body[at : at + step])
                    await asyncio.wait([line], timeout=0.02)
                return await asyncio.wait_for(line, 5)

        slow, steady = await asyncio.gather(send(1), send(20))
        assert slow == b"HTTP/1.1 400 Bad Request\r\n"
        assert steady == b"HTTP/1.1 200 OK\r\n"
        received = await gateway.exchange(head(KEY, len(body), JSON) + body[:-1])
        assert b'"code":"invalid_body"' in received
        assert b"200 bytes a second" in received


async def test_tiny_chunks_are_refused_and_small_chunks_accepted(gateway: GatewayApp) -> None:
    start = head(KEY, 0, JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    body = json.dumps({**HI, "user": "x" * 200}).encode()
    small = b"".join(b"3\r\n%b\r\n" % body[at : at + 3].ljust(3) for at in range(0, len(body), 3))
    assert (await gateway.exchange(start + small + b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    async with gateway.connect(start) as (reader, writer):
        answered = asyncio.create_task(reader.readline())
        sent = 0
        while not answered.done() and sent < 8 * 1024 * 1024:
            writer.write(b"1\r\n \r\n" * 1000)
            sent += 1000
            await writer.drain()
            await asyncio.sleep(0)
        assert await answered == b"HTTP/1.1 400 Bad Request\r\n"
        assert sent < 2_000_000
        assert b"too small chunks" in await asyncio.wait_for(reader.readuntil(b"}}"), 5)


async def test_json_with_too_many_values_is_refused_and_the_same_bytes_in_a_string_accepted(
    gateway: GatewayApp,
) -> None:
    lists = b"[]," * 100_000
    for content_type, body in (
        (JSON, b'{"model":"gpt-4","messages":[' + lists + b"[]]}"),
        (
            FORM,
            b'--B\r\nContent-Disposition: form-data; name="messages"\r\n\r\n[' + lists + b"[]]\r\n--B--\r\n",
        ),
    ):
        received = await gateway.exchange(head(KEY, len(body), content_type) + body)
        assert b'"code":"invalid_body"' in received
        assert b"65,536 values" in received
    async with gateway.post_task(
        {"model": "gpt-4", "messages": [{"role": "user", "content": lists.decode()}]}
    ) as response:
        assert response.status == 200


async def test_a_form_that_begins_with_empty_lines_is_refused_early(gateway: GatewayApp) -> None:
    async with gateway.connect(head(KEY, 7_800_000, FORM) + b"\r\n" * 1000) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


async def test_a_call_counts_as_in_flight_while_its_body_is_read(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_calls=1)) as gateway:
        body = json.dumps(HI).encode()
        async with gateway.connect(head(KEY, len(body), JSON) + body[:5]) as (reader, writer):
            async with asyncio.timeout(5):
                while await code_or_ok(gateway.post_task(HI)) != (503, "overloaded"):
                    pass
            writer.write(body[5:])
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            await reader.read()
        assert await code_or_ok(gateway.post_task(HI)) == (200, "")


async def test_the_bytes_of_buffered_bodies_are_limited(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_bytes=100_000)) as gateway:
        large = {"model": "gpt-4", "messages": [{"role": "user", "content": "x" * 120_000}]}
        assert await code_of(gateway.post_task(large)) == (503, "overloaded")
        form = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n%b\r\n--B--' % (b"x" * 120_000)
        assert b'"code":"overloaded"' in await gateway.exchange(head(KEY, len(form), FORM) + form)
        assert await code_or_ok(gateway.post_task(HI)) == (200, "")


async def code_or_ok(request: Any) -> tuple[int, str]:
    """Status and error code of a response; the code is empty on success."""
    async with request as response:
        value = await response.json()
        return response.status, value["error"]["code"] if "error" in value else ""


async def test_unknown_paths_and_methods_are_json_errors(gateway: GatewayApp) -> None:
    for path in ("/", "/api/v2/task", "/api/v1/task/", "/media/", "/%00", "/api/v1/models/a/b"):
        assert await code_of(gateway.http.get(gateway.url + path)) == (404, "not_found")
    async with gateway.http.delete(f"{gateway.url}/api/v1/task") as response:
        assert response.headers["Allow"] == "POST"
    assert await code_of(gateway.http.get(f"{gateway.url}/api/v1/task")) == (405, "method_not_allowed")
    assert await code_of(gateway.http.post(f"{gateway.url}/openapi.json")) == (405, "method_not_allowed")


async def test_large_audio_in_json_is_uploaded_to_the_media_store(open_gateway: OpenApp) -> None:
    async with open_gateway(inline_limit=1000) as gateway:
        encoded = base64.b64encode(AUDIO).decode()
        body = {**STS, "audio": f"data:audio/mpeg;base64,{encoded}"}
        async with gateway.post_task(body) as response:
            assert response.status == 200
        audio = gateway.provider.jobs[-1].audio
        assert audio is not None
        assert audio.path is not None
        assert (gateway.provider.received_audio[-1], audio.content_type) == (AUDIO, "audio/mpeg")
        async with gateway.post_task({**STS, "audio": base64.b64encode(AUDIO[:500]).decode()}) as response:
            assert response.status == 200
        assert gateway.provider.jobs[-1].audio.data == AUDIO[:500]  # type: ignore[union-attr]


async def test_100_continue_is_sent_only_when_the_body_is_read(gateway: GatewayApp) -> None:
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    head = (
        "POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: {}\r\n"
        "Content-Length: {}\r\nExpect: 100-continue\r\n\r\n"
    )
    body = json.dumps(HI).encode()
    writer.write(head.format(KEY, "application/json", len(body)).encode())
    assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
    writer.write(body)
    assert await reader.readline() == b"\r\n"
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    writer.write(head.format("bad", "application/json", 200_000).encode())
    assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    writer.close()


# --- other routes


async def test_models_are_listed_with_limits_and_prices(gateway: GatewayApp) -> None:
    async with gateway.http.get(f"{gateway.url}/api/v1/models", headers=gateway.headers) as response:
        listed = await response.json()
    assert listed["object"] == "list"
    by_name = {m["id"]: m for m in listed["data"]}
    assert len(by_name) == 14
    assert by_name["gpt-3.5-turbo"]["price"] == {
        "million_input_tokens": "0.1",
        "million_cached_input_tokens": "0.01",
        "million_cache_write_input_tokens": "0.125",
        "million_output_tokens": "0.5",
    }
    (tier,) = by_name["gpt-3.5-turbo"]["price_tiers"]
    assert tier["from_input_tokens"] == 272_001
    assert tier["price"]["million_cached_input_tokens"] == "0.02"
    assert "price_tiers" not in by_name["claude-3-opus"]
    assert {m["type"] for m in listed["data"]} == {
        "text",
        "image",
        "text-to-speech",
        "speech-to-speech",
        "speech-to-text",
    }
    async with gateway.http.get(
        f"{gateway.url}/api/v1/models/flux-1-dev", headers=gateway.headers
    ) as response:
        assert await response.json() == by_name["flux-1-dev"]
    assert await code_of(gateway.http.get(f"{gateway.url}/api/v1/models")) == (401, "invalid_api_key")
    unknown = gateway.http.get(f"{gateway.url}/api/v1/models/nope", headers=gateway.headers)
    assert await code_of(unknown) == (400, "unsupported_model")
    wild = gateway.http.get(f"{gateway.url}/api/v1/models/%ff%fe", headers=gateway.headers)
    assert await code_of(wild) == (400, "unsupported_model")


async def test_a_signed_link_supports_ranges_and_head_and_requires_its_signature(gateway: GatewayApp) -> None:
    async with gateway.post_task({**TTS, "response_format": "url"}) as response:
        url = (await response.json())["audio"]["url"]
    async with gateway.http.get(url, headers={"Range": "bytes=10-19"}) as part:
        assert (part.status, await part.read()) == (206, AUDIO[10:20])
        assert part.headers["Content-Range"] == f"bytes 10-19/{len(AUDIO)}"
    async with gateway.http.head(url) as head:
        assert head.headers["Content-Length"] == str(len(AUDIO))
        assert head.headers["Content-Type"] == "audio/mpeg"
    bare, _, query = url.partition("?")
    assert await code_of(gateway.http.get(f"{bare}?{query[:-1]}")) == (404, "not_found")
    assert await code_of(gateway.http.get(bare)) == (401, "invalid_api_key")
    async with gateway.http.get(bare, headers=gateway.headers) as own:
        assert await own.read() == AUDIO
    assert await code_of(gateway.http.get(f"{gateway.url}/media/..%2f..%2fetc?{query}")) == (404, "not_found")


async def test_media_links_use_the_public_url(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(public_url="https://pomelo.example/base/") as gateway,
        gateway.post_task(FLUX) as response,
    ):
        url = (await response.json())["data"][0]["url"]
        assert url.startswith("https://pomelo.example/base/media/media_")


async def test_the_progress_of_a_failed_image_is_followed_by_an_error_event(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        yield Event(image_progress=image_pb2.ImageProgress(progress=0.5))
        raise PomeloError("content_policy_violation")

    gateway.provider.script = script
    async with gateway.post_task({**FLUX, "stream": True}) as response:
        received = events(await response.read())
    assert [name for name, _ in received] == ["message", "error"]
    gateway.provider.script = script
    assert await code_of(gateway.post_task(FLUX, headers={"Accept": "image/*"})) == (
        400,
        "content_policy_violation",
    )


async def test_the_session_is_reused_after_refusals(gateway: GatewayApp) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as one:
        for _ in range(3):
            async with one.post(
                f"{gateway.url}/api/v1/task", headers=gateway.headers, json={**HI, "x": 1}
            ) as no:
                assert no.status == 400
                assert "Connection" not in no.headers
            async with one.post(f"{gateway.url}/api/v1/task", headers=gateway.headers, json=HI) as yes:
                assert yes.status == 200
