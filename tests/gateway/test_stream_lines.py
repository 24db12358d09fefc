"""The lines of a stream, which every client can read: unbroken and not too long."""

from __future__ import annotations

import base64
import json

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1 import speech_pb2
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from tests.gateway.gateway_app import AUDIO, PNG, GatewayApp
from tests.gateway.requests import FLUX, HI, STT, TTS, events_of
from tests.gateway.scripts import audio, play, text_events, word

SEPARATORS = "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei\r\nj\u2027k\u00a0l😀"
"""All characters at which some client ends a line, and similar ones."""


@pytest.mark.parametrize("last", [False, True], ids=["chunks", "with the last chunk"])
async def test_text_with_line_separators_is_one_line_for_every_client(
    gateway: GatewayApp, last: bool
) -> None:
    *deltas, end = text_events("one", SEPARATORS)
    if last:
        end.completed.text.message.content.add(text=SEPARATORS)
    gateway.provider.script = play(*deltas, end)
    async with gateway.post_task({**HI, "stream": True}) as response:
        body = await response.read()
    for lines in (body.decode().splitlines(), [line.decode() for line in body.splitlines()]):
        *chunks, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        deltas_read = [json.loads(line[6:])["choices"][0]["delta"] for line in chunks]
        text = "".join(delta.get("content", "") for delta in deltas_read)
        assert text == "one" + SEPARATORS * (1 + last)


async def test_transcripts_and_errors_in_streams_are_one_line_for_every_client(gateway: GatewayApp) -> None:
    transcript = speech_pb2.Transcription(text=SEPARATORS, language_code="en", audio_seconds=1)
    transcript.words.add(text=SEPARATORS)
    gateway.provider.script = play(Event(completed=TaskResult(transcription=transcript)))
    body = {**STT, "audio": base64.b64encode(AUDIO).decode(), "stream": True}
    async with gateway.post_task(body) as response:
        final, done = [line for line in (await response.read()).decode().splitlines() if line]
    assert done == "data: [DONE]"
    parsed = json.loads(final.removeprefix("data: "))
    assert (parsed["text"], parsed["words"][0]["text"]) == (SEPARATORS, SEPARATORS)

    error = PomeloError("invalid_parameter", f"Invalid messages: {SEPARATORS}")
    gateway.provider.script = play(word(), error)
    async with gateway.post_task({**HI, "stream": True}) as response:
        _, name, data = [line for line in (await response.read()).decode().splitlines() if line]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"].endswith(SEPARATORS)


async def test_large_audio_chunks_are_split_into_lines_that_every_client_can_read(
    gateway: GatewayApp,
) -> None:
    data = bytes(range(256)) * 1000
    gateway.provider.script = play(audio(data), audio(b"end"))
    sent = b""
    async with gateway.post_task({**TTS, "stream": True}) as response:
        async for line in response.content:  # aiohttp's own reader of lines
            assert len(line) < 64 * 1024
            if b"b64_json" in line:
                piece = base64.b64decode(json.loads(line[6:])["audio"]["b64_json"])
                assert len(piece) in (45 * 1024, len(data) % (45 * 1024), 3)  # no padding within a chunk
                sent += piece
    assert sent == data + b"end"


@pytest.mark.parametrize("size", [45 * 1024, 45 * 1024 + 1, 3_000_000])
async def test_a_large_image_in_a_stream_is_a_link_unless_base64_is_requested(
    gateway: GatewayApp, size: int
) -> None:
    image = PNG[:8] + bytes(size - 8)
    result = TaskResult()
    result.image.images.add(data=image, content_type="image/png")
    gateway.provider.script = play(Event(completed=result))
    async with gateway.post_task({**FLUX, "stream": True}) as response:
        lines = [line async for line in response.content]  # aiohttp's own reader of lines
    assert max(map(len, lines)) < 64 * 1024
    (media,) = json.loads(lines[0][6:])["data"]
    assert set(media) == ({"url", "b64_json"} if size <= 45 * 1024 else {"url"})
    async with gateway.http.get(media["url"]) as link:
        assert await link.read() == image
    asked = {**FLUX, "stream": True, "response_format": "b64_json"}
    ((_, final), _) = await events_of(gateway.post_task(asked))
    assert set(final["data"][0]) == {"b64_json"}
    assert base64.b64decode(final["data"][0]["b64_json"]) == image
    async with gateway.post_task(FLUX) as response:
        assert set((await response.json())["data"][0]) == {"url", "b64_json"}
