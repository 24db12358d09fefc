"""Forms: read part by part, their audio stored as it arrives."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.call import Call
from pomelo.gen.v1.media_pb2 import Media
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp
from tests.gateway.requests import FORM, HAIKU_ONLY, KEY, code_of, raw_task

Part = tuple[str, bytes]
"""Headers after `Content-Disposition: form-data; `, and content."""


def form(*parts: Part, end: bytes = b"--B--\r\n") -> bytes:
    return (
        b"".join(
            b"--B\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
            for head, content in parts
        )
        + end
    )


async def send(gateway: GatewayApp, body: Any, content_type: str = FORM) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of the response to a form."""
    async with gateway.post_task(data=body, headers={"Content-Type": content_type}) as response:
        return response.status, await response.json()


async def refusal(gateway: GatewayApp, body: Any, content_type: str = FORM) -> tuple[int, str]:
    """The status and the code of the refusal of a form."""
    return await code_of(gateway.post_task(data=body, headers={"Content-Type": content_type}))


def model(name: str) -> Part:
    return 'name="model"', name.encode()


VOICE = ('name="voice"', b"adam")
FILE = ('name="audio"; filename="in.mp3"\r\nContent-Type: audio/mpeg', AUDIO)


async def test_a_file_is_stored_unchanged_and_passed_to_the_task(gateway: GatewayApp) -> None:
    settings = ('name="voice_settings"', b'{"stability": 0.5, "similarity_boost": 0.5}')
    for parts in (
        (model("eleven-labs-sts"), FILE, VOICE, settings),
        (FILE, settings, VOICE, model("eleven-labs-sts")),
    ):
        status, value = await send(gateway, form(*parts))
        assert (status, value["object"]) == (200, "speech.generation")
        audio = gateway.provider.audio
        assert audio.path is not None
        assert (gateway.provider.received_audio[-1], audio.content_type) == (AUDIO, "audio/mpeg")
        assert gateway.provider.jobs[-1].input.voice_settings.stability == 0.5


async def test_a_file_that_the_model_ignores_is_read_and_dropped(gateway: GatewayApp) -> None:
    before = set(gateway.media.folder.iterdir())
    text = ('name="text"', b"Hello world")
    url = ('name="response_format"', b"b64_json")
    status, value = await send(gateway, form(model("eleven-labs-tts"), text, VOICE, FILE, url))
    assert (status, value["object"]) == (200, "speech.generation")
    assert set(gateway.media.folder.iterdir()) == before


async def test_an_empty_file_is_ignored_by_text_to_speech_and_refused_by_models_that_take_audio(
    gateway: GatewayApp,
) -> None:
    text, empty = ('name="text"', b"Hello world"), ('name="audio"; filename="a.mp3"', b"")
    for parts in (
        (empty, model("eleven-labs-tts"), text, VOICE),
        (model("eleven-labs-tts"), text, VOICE, empty),
    ):
        assert (await send(gateway, form(*parts)))[0] == 200
    for taken in ((empty, model("eleven-labs-stt")), (model("eleven-labs-stt"), empty)):
        assert await refusal(gateway, form(*taken)) == (400, "invalid_parameter")


async def test_a_form_has_numbers_booleans_and_objects_as_text(gateway: GatewayApp) -> None:
    messages = json.dumps([{"role": "user", "content": "Hi"}]).encode()
    parts = [
        model("gpt-4"),
        ('name="messages"', messages),
        ('name="max_tokens"', b"100"),
        ('name="temperature"', b"0.7"),
        ('name="stream"', b"false"),
    ]
    status, value = await send(gateway, form(*parts))
    assert (status, value["object"]) == (200, "task.completion")
    given = gateway.provider.jobs[-1].input
    assert (given.max_tokens, given.temperature) == (100, 0.7)


@pytest.mark.parametrize("more", ["", "\r\nContent-Type: text/plain; charset=utf-8"])
@pytest.mark.parametrize("audio", [b"SUQzAA==", b"data:audio/mpeg;base64,SUQzAA", b"SUQz\r\nAA"])
async def test_a_form_may_have_audio_as_base64_text(gateway: GatewayApp, more: str, audio: bytes) -> None:
    status, value = await send(gateway, form(model("eleven-labs-stt"), (f'name="audio"{more}', audio)))
    assert (status, value["text"]) == (200, "hi there")
    assert gateway.provider.audio.data == b"ID3\0"


@pytest.mark.parametrize(
    ("content_type", "text", "expected"),
    [
        ("text/plain; charset=utf-8", "Löwe".encode(), "Löwe"),
        ("text/plain; charset=UTF8", b"\xef\xbb\xbfLion", "Lion"),
        ("text/plain; charset=ISO-8859-1", b"Lion", "Lion"),
        ('text/plain;charset="us-ascii"', b"Lion", "Lion"),
        ("text/plain; charset=ISO-8859-1", "Löwe".encode("latin-1"), None),
        ("text/plain; charset=ISO-8859-1", "Löwe".encode(), None),
        ("text/plain; charset=utf-16le", "Lion".encode("utf-16-le"), None),
        ("text/plain", "Löwe".encode("latin-1"), None),
    ],
)
async def test_the_texts_of_a_form_must_be_utf_8(
    gateway: GatewayApp, content_type: str, text: bytes, expected: str | None
) -> None:
    part = (f'name="prompt"\r\nContent-Type: {content_type}', text)
    status, value = await send(gateway, form(model("flux-1-pro"), part))
    if expected is None:
        assert (status, value["error"]["code"]) == (400, "invalid_parameter")
        assert "prompt" in value["error"]["message"]
        assert "UTF-8" in value["error"]["message"]
    else:
        assert (status, gateway.provider.jobs[-1].input.prompt) == (200, expected)


async def test_a_form_in_another_charset_is_a_415(gateway: GatewayApp) -> None:
    body = form(model("flux-1-pro"), ('name="prompt"', b"Lion"))
    assert await refusal(gateway, body, f"{FORM}; charset=utf-16") == (415, "unsupported_media_type")


async def test_a_file_part_of_a_text_field_is_its_text(gateway: GatewayApp) -> None:
    part = ('name="prompt"; filename="p.txt"\r\nContent-Type: text/plain', "ein Löwe".encode())
    status, _ = await send(gateway, form(model("flux-1-pro"), part))
    assert (status, gateway.provider.jobs[-1].input.prompt) == (200, "ein Löwe")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b"--B--\r\n", "invalid_body"),
        (b"nothing like a form", "invalid_body"),
        (b"\r\n" * 1000, "invalid_body"),
        (form(model("gpt-4"), end=b""), "invalid_body"),
        (form(model("gpt-4"))[:40], "invalid_body"),
        (form(model("gpt-4"), end=b"--B"), "invalid_body"),
        (form(FILE, end=b""), "invalid_body"),
        (b"--B\r\n\r\nx\r\n--B--\r\n", "invalid_body"),
        (b"--B\r\nContent-Disposition: attachment; name=model\r\n\r\nx\r\n--B--\r\n", "invalid_body"),
        (b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n", "invalid_body"),
        (form(('name="model"; name="user"', b"gpt-4")), "invalid_body"),
        (form(('name="user"; Name="model"', b"gpt-4")), "invalid_body"),
        (b"--B\r\nno colon here\r\n\r\nx\r\n--B--\r\n", "invalid_body"),
        (b"--B\r\nA: " + b"x" * 20_000 + b"\r\n\r\nx\r\n--B--\r\n", "invalid_body"),
        (b"--B\r\n" + b"A: b\r\n" * 40 + b"\r\nx\r\n--B--\r\n", "invalid_body"),
        (b"--B\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C--\r\n--B--\r\n", "invalid_body"),
        (form(('name="model"\r\nContent-Transfer-Encoding: base64', b"Z3B0LTQ=")), "invalid_body"),
        (form(('name="_charset_"', b"utf-16"), model("gpt-4")), "invalid_parameter"),
        (form(model("gpt-4"), model("gpt-4")), "invalid_parameter"),
        (form(model("eleven-labs-sts"), FILE, FILE), "invalid_parameter"),
        (form(('name="model"', b"\xff\xfe")), "invalid_parameter"),
        (form(model("gpt-4"), ('name="wrong"', b"x")), "invalid_parameter"),
        (
            form(('name="\udcff"'.encode("utf-8", "surrogateescape").decode("latin-1"), b"x")),
            "invalid_parameter",
        ),
        (form(model("gpt-4"), ('name="messages"', b"Hi")), "invalid_parameter"),
        (form(model("nope"), ('name="wrong"', b"x")), "unsupported_model"),
        (form(model("nope"), FILE), "unsupported_model"),
        (form(model("eleven-labs-stt"), ('name="audio"; filename="a"', b"")), "invalid_parameter"),
        (form(*[VOICE] * 40), "invalid_parameter"),
        (form(VOICE), "missing_parameter"),
        (form(FILE), "missing_parameter"),
        (form(FILE, model("flux-1-pro")), "invalid_parameter"),
        (form(model("eleven-labs-stt")), "missing_parameter"),
    ],
)
async def test_a_malformed_form_is_refused(gateway: GatewayApp, body: bytes, code: str) -> None:
    assert await refusal(gateway, body) == (400, code)


async def test_a_file_above_the_limit_is_a_413_and_leaves_nothing(open_gateway: OpenApp) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield form(model("eleven-labs-stt"), end=b'--B\r\nContent-Disposition: form-data; name="prompt"')
        yield b"\r\n\r\n"
        for _ in range(20):
            yield b"x" * 1000

    large = ('name="audio"; filename="a.mp3"', b"x" * 100_001)
    larger = ('name="audio"; filename="b"', b"x" * 200_000)
    async with open_gateway(upload_limit=100_000, json_limit=10_000, linger_timeout=1) as gateway:
        for body in (
            form(large, model("eleven-labs-stt")),
            form(model("eleven-labs-tts"), large),
            pieces(),
            form(model("eleven-labs-stt"), larger),
        ):
            assert await refusal(gateway, body) == (413, "payload_too_large")
        assert list(gateway.media.folder.iterdir()) == []


async def test_a_file_and_texts_of_exactly_their_limits_are_accepted(open_gateway: OpenApp) -> None:
    prompt = ('name="prompt"', b"x" * (1000 - len("flux-1-pro")))
    async with open_gateway(upload_limit=100_000, json_limit=1000) as gateway:
        file = ('name="audio"; filename="a.mp3"', b"x" * 100_000)
        assert (await send(gateway, form(file, model("eleven-labs-stt"))))[0] == 200
        assert (await send(gateway, form(model("flux-1-pro"), prompt)))[0] == 200
        longer = form(model("flux-1-pro"), (prompt[0], prompt[1] + b"x"))
        assert await refusal(gateway, longer) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("key", "name", "status", "code"),
    [
        (KEY, "gpt-4", 400, "invalid_parameter"),
        (KEY, "nope", 400, "unsupported_model"),
        (HAIKU_ONLY, "eleven-labs-stt", 403, "model_not_allowed"),
    ],
)
async def test_an_unusable_file_is_refused_before_it_is_read(
    gateway: GatewayApp, key: str, name: str, status: int, code: str
) -> None:
    known, _ = await send(gateway, form(model("eleven-labs-stt"), FILE))
    assert known == 200  # the model is known from here on
    refused = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield form(
            model(name), end=b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        )
        await refused.wait()
        yield AUDIO

    headers = {"Content-Type": FORM, "Authorization": f"Bearer {key}"}
    async with asyncio.timeout(20), gateway.post_task(data=pieces(), headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (status, code)
        refused.set()


@pytest.mark.parametrize("part", [b'name="audio"; filename="a.mp3"', b'name="prompt"'])
async def test_an_unauthenticated_upload_is_refused_before_it_is_read(
    gateway: GatewayApp, part: bytes
) -> None:
    read = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal read
        yield form(end=b"--B\r\nContent-Disposition: form-data; " + part + b"\r\n\r\n")
        await refused.wait()
        read += 1
        yield AUDIO

    refused = asyncio.Event()
    headers = {"Content-Type": FORM, "Authorization": "Bearer x"}
    async with gateway.post_task(data=pieces(), headers=headers) as response:
        assert response.status == 401
        assert read == 0
        refused.set()


async def test_an_upload_is_never_buffered_completely(open_gateway: OpenApp) -> None:
    async with open_gateway() as gateway:
        size = 32 * 1024 * 1024

        async def pieces() -> AsyncIterator[bytes]:
            yield form(model("eleven-labs-stt"), end=b"--B\r\n")
            yield b'Content-Disposition: form-data; name="audio"; filename="a.mp3"\r\n\r\n'
            for _ in range(size // 65536):
                yield b"\0" * 65536
            yield b"\r\n--B--\r\n"

        tracemalloc.start()
        try:
            status, _ = await send(gateway, pieces())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert status == 200
        assert gateway.provider.audio.size == size
        assert peak < 8 * 1024 * 1024


async def wait_for_files(gateway: GatewayApp, *, some: bool) -> None:
    """Waits until the media folder has files, or is empty; there is no event to wait for."""
    while any(gateway.media.folder.iterdir()) is not some:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_a_disconnect_during_an_upload_leaves_no_file(open_gateway: OpenApp) -> None:
    long = ('name="audio"; filename="a.mp3"', AUDIO * 20)
    sent = raw_task(b"", content_type=FORM, framing="Content-Length: 1000000", close=False)
    async with open_gateway() as gateway, asyncio.timeout(20):
        async with gateway.connect(sent + form(long, end=b"")):
            await wait_for_files(gateway, some=True)
        await wait_for_files(gateway, some=False)


async def test_malformed_part_headers_cause_no_warnings(gateway: GatewayApp) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for head in (
            "name=model; filename",
            "name=model;;",
            'name="model',
            "name*=x",
            "=; name==",
            "name=a=b;c",
        ):
            assert (await refusal(gateway, form((head, b"x"))))[0] == 400


async def test_the_media_type_of_a_file_is_passed_on_as_ascii(gateway: GatewayApp) -> None:
    received: list[str] = []

    class RecordingMedia:
        async def upload_media(self, content_type: str, data: AsyncIterator[bytes], call: Call) -> Media:
            received.append(content_type)
            return Media()

    file = ('name="audio"; filename="a"\r\nContent-Type: audio/ü', AUDIO)
    async with gateway.over(media=RecordingMedia()) as other:
        assert (await refusal(other, form(model("eleven-labs-stt"), file)))[0] == 400
    assert received == ["audio/?"]


async def test_speech_to_speech_stores_the_file_that_text_to_speech_drops(gateway: GatewayApp) -> None:
    status, _ = await send(gateway, form(FILE, model("eleven-labs-sts"), VOICE))
    assert (status, gateway.provider.audio.size) == (200, len(AUDIO))
