"""POST /api/v1/task: its JSON responses, the order of checks, and the headers of requests."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

import aiohttp
import pytest

from gateway.types.base import LARGE_FILE
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from tests.gateway.gateway_app import AUDIO, PNG, GatewayApp, OpenApp
from tests.gateway.requests import (
    FLUX,
    FORM,
    HAIKU_ONLY,
    HI,
    JSON,
    KEY,
    STS,
    TTS,
    code_of,
    raw_task,
)
from tests.gateway.scripts import audio, play

B64 = {"response_format": "b64_json"}

# --- responses


async def test_a_text_task_returns_a_completion_with_security_headers(gateway: GatewayApp) -> None:
    async with gateway.post_task(HI, headers={"X-Request-Id": "mine-1"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-Id"] == "mine-1"
        assert response.headers["X-Pomelo-Mode"] == "test"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
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
        assert link.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert await link.read() == base64.b64decode(image["b64_json"]) == PNG


@pytest.mark.parametrize("size", [LARGE_FILE, LARGE_FILE + 1])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/task", FLUX | B64),
        ("/api/v1/task", FLUX | B64 | {"stream": True}),
        ("/api/v1/task", TTS | B64),
        ("/v1/images/generations", FLUX | B64),
        ("/v1/images/generations", FLUX | {"stream": True}),
    ],
    ids=["image", "image at the end of a stream", "speech", "OpenAI's image", "OpenAI's stream"],
)
async def test_a_large_file_is_rendered_in_a_thread(
    gateway: GatewayApp, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], size: int
) -> None:
    data = (PNG * (size // len(PNG) + 1))[:size]
    result = TaskResult()
    result.image.images.add(data=data, content_type="image/png")
    event = Event(completed=result) if body["model"] == FLUX["model"] else audio(data)
    gateway.provider.script = play(event)
    functions: list[str] = []
    to_thread = asyncio.to_thread

    def record(function: Any, *arguments: Any) -> Any:
        functions.append(getattr(function, "__name__", ""))
        return to_thread(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", record)
    async with gateway.http.post(gateway.url + path, headers=gateway.headers, json=body) as response:
        text = await response.text()
    (encoded,) = re.findall('"b64_json":"(.*?)"', text)
    assert base64.b64decode(encoded, validate=True) == data
    rendered = {"render_result", "render_last", "_render", "<lambda>"}
    assert len(rendered.intersection(functions)) == (size > LARGE_FILE)


@pytest.mark.parametrize("response_format", ["url", "b64_json"])
async def test_response_format_selects_link_or_base64(gateway: GatewayApp, response_format: str) -> None:
    async with gateway.post_task({**TTS, "response_format": response_format}) as response:
        assert set((await response.json())["audio"]) == {response_format}


async def test_large_audio_in_json_is_uploaded_to_the_media_store(open_gateway: OpenApp) -> None:
    async with open_gateway(inline_limit=1000) as gateway:
        encoded = base64.b64encode(AUDIO).decode()
        async with gateway.post_task({**STS, "audio": f"data:audio/mpeg;base64,{encoded}"}) as response:
            assert response.status == 200
        audio = gateway.provider.audio
        assert audio.path is not None
        assert (gateway.provider.received_audio[-1], audio.content_type) == (AUDIO, "audio/mpeg")
        async with gateway.post_task({**STS, "audio": base64.b64encode(AUDIO[:500]).decode()}) as response:
            assert response.status == 200
        assert gateway.provider.audio.data == AUDIO[:500]


async def test_media_links_use_the_public_url(open_gateway: OpenApp) -> None:
    async with (
        open_gateway(public_url="https://pomelo.example/base/") as gateway,
        gateway.post_task(FLUX) as response,
    ):
        url = (await response.json())["data"][0]["url"]
        assert url.startswith("https://pomelo.example/base/media/media_")


async def test_the_session_is_reused_after_refusals(gateway: GatewayApp) -> None:
    url = f"{gateway.url}/api/v1/task"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as one:
        for _ in range(3):
            async with one.post(url, headers=gateway.headers, json={**HI, "x": 1}) as no:
                assert no.status == 400
                assert "Connection" not in no.headers
            async with one.post(url, headers=gateway.headers, json=HI) as yes:
                assert yes.status == 200


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
    headers = {"Authorization": f"Bearer {key}", "Content-Type": JSON}
    assert await code_of(gateway.post_task(data=body, headers=headers)) == refusal


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/jsonx"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json; charset=utf-8; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_an_unsupported_content_type_or_encoding_is_a_415_after_the_key_check(
    gateway: GatewayApp, headers: dict[str, str]
) -> None:
    assert await code_of(gateway.post_task(data=b"{}", headers=headers)) == (415, "unsupported_media_type")
    unauthenticated = {**headers, "Authorization": "Bearer x"}
    assert await code_of(gateway.post_task(data=b"{}", headers=unauthenticated)) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("audio", "expected"),
    [
        ("https://host.example/a.mp3", "base64 or a data: URI; other URLs are not fetched"),
        (" BLOB:http://localhost/1", "base64 or a data: URI; other URLs are not fetched"),
        ({"type": "Buffer", "data": [1]}, "base64 or a data: URI, as text"),
    ],
)
async def test_audio_that_is_a_link_or_an_object_is_refused_with_what_it_must_be(
    gateway: GatewayApp, audio: Any, expected: str
) -> None:
    async with gateway.post_task({**STS, "audio": audio}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == f"Invalid audio: must be {expected}"


@pytest.mark.parametrize("audio", ["", "data:audio/mpeg;base64,"])
async def test_audio_of_no_bytes_is_refused(gateway: GatewayApp, audio: str) -> None:
    async with gateway.post_task({**STS, "audio": audio}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "invalid_parameter")
    assert error["message"] == "Invalid audio: must be base64 of at least one byte"


async def test_a_wrong_header_is_refused_with_the_limits_of_the_call(gateway: GatewayApp) -> None:
    async with gateway.post_task(HI, headers={"X-Request-Timeout": "soon"}) as response:
        assert response.status == 400
        assert "X-Credits-Remaining" in response.headers


async def test_an_error_has_the_headers_of_the_call(gateway: GatewayApp) -> None:
    async with gateway.post_task({**HI, "x": 1}) as response:
        assert response.status == 400
        assert response.headers["X-Pomelo-Mode"] == "test"


# --- headers of requests


@pytest.mark.parametrize(
    ("key", "refusal"), [(f"Bearer {KEY}", (400, "invalid_parameter")), ("x", (401, "invalid_api_key"))]
)
async def test_an_invalid_header_is_reported_only_with_a_valid_key(
    gateway: GatewayApp, key: str, refusal: tuple[int, str]
) -> None:
    headers = {"X-Request-Timeout": "soon", "Authorization": key}
    assert await code_of(gateway.post_task(HI, headers=headers)) == refusal


@pytest.mark.parametrize("length", [1, 60_000, 50_000_000, 10**12])
@pytest.mark.parametrize("more", [(), ("Expect: 100-continue",)], ids=["", "expect"])
@pytest.mark.parametrize("content_type", [JSON, FORM, None])
async def test_unauthenticated_requests_are_refused_before_their_body_is_read(
    gateway: GatewayApp, content_type: str | None, more: tuple[str, ...], length: int
) -> None:
    sent = raw_task(b"", *more, key="bad", content_type=content_type, framing=f"Content-Length: {length}")
    async with gateway.connect(sent) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"


async def test_an_invalid_header_is_refused_before_the_body_is_read(gateway: GatewayApp) -> None:
    sent = raw_task(b"", "X-Request-Timeout: soon", framing="Content-Length: 10")
    async with gateway.connect(sent) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"


@pytest.mark.parametrize(
    "name",
    [
        *("Idempotency-Key", "X-Request-Id", "X-Request-Timeout", "traceparent", "Prefer", "Accept"),
        "content-type",
    ],
)
@pytest.mark.parametrize("other", ["5", "x"])
async def test_a_repeated_header_is_refused_and_named(gateway: GatewayApp, name: str, other: str) -> None:
    content_type = None if name == "content-type" else JSON
    twice = (f"{name}: 5", f"{name.upper()}: {other}")
    received = await gateway.exchange(raw_task(HI, *twice, content_type=content_type))
    first, _, rest = received.partition(b"\r\n")
    assert first.endswith(b" 400 Bad Request")
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "invalid_parameter"
    assert name.lower() in error["message"].lower()
    if content_type is not None:  # otherwise aiohttp refuses it before the key is checked
        assert await gateway.status_of(raw_task(HI, *twice, key="bad")) == 401


@pytest.mark.parametrize(("first", "second"), [(KEY, "bad"), ("bad", KEY), (KEY, KEY)])
async def test_two_authorization_headers_are_refused(gateway: GatewayApp, first: str, second: str) -> None:
    assert await gateway.status_of(raw_task(HI, f"authorization: Bearer {second}", key=first)) == 401
