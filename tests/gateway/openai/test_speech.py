"""`POST /v1/audio/speech`: its parameters, raw audio and its events."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import aiohttp
import pytest

from pomelo.errors import PomeloError
from tests.gateway.gateway_app import AUDIO, GatewayApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.requests import events, events_of
from tests.gateway.scripts import audio, play

HI = {"model": "eleven-labs-tts", "input": "Hi there", "voice": "adam"}
PATH = "audio/speech"


async def test_parameters_become_the_fields_of_a_task(gateway: GatewayApp) -> None:
    given = {
        **{"speed": 1.1, "voice": {"id": "voice_1"}, "seed": 3, "voice_settings": {"stability": 0.25}},
        **{"instructions": "", "stream_format": "audio", "stream": False},
    }
    async with post(gateway, PATH, HI | given, headers=STRICT) as response:
        assert response.status == 200
        assert "X-Pomelo-Adjusted" not in response.headers
    spoken = gateway.provider.jobs[-1].input
    assert (spoken.text, spoken.voice, spoken.seed) == ("Hi there", "voice_1", 3)
    assert (spoken.voice_settings.speed, spoken.voice_settings.stability) == (1.1, 0.25)


@pytest.mark.parametrize(
    ("response_format", "used"),
    [
        (None, ""),
        ("mp3", "mp3_44100_128"),
        ("opus", "opus_48000_64"),
        ("wav", "wav_24000"),
        ("pcm", "pcm_24000"),
        ("mp3_44100_192", "mp3_44100_192"),
    ],
)
async def test_the_response_format_selects_the_audio(
    gateway: GatewayApp, response_format: str | None, used: str
) -> None:
    async with post(gateway, PATH, HI | {"response_format": response_format}) as response:
        assert (response.status, await response.read()) == (200, AUDIO)
        assert response.headers["Content-Type"] == "audio/mpeg"
    assert gateway.provider.jobs[-1].input.output_format == used


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"voice": None}, "voice"),
        ({"voice": {}}, "voice"),
        ({"voice": {"id": "adam", "style": "calm"}}, "voice.style"),
        ({"voice": "\n"}, "voice"),
        ({"speed": 5}, "speed"),
        ({"speed": "fast"}, "speed"),
        ({"voice_settings": {"speed": 5}}, "voice_settings.speed"),
        ({"speed": 1, "voice_settings": {"speed": 1.1}}, "speed"),
        ({"speed": True, "voice_settings": {"speed": 1}}, "speed"),
        ({"speed": 1, "voice_settings": [1]}, "voice_settings"),
        ({"speed": 1, "voice_settings": []}, "voice_settings"),
        ({"response_format": "flac"}, "response_format"),
        ({"response_format": "aac"}, "response_format"),
        ({"response_format": "mp3_1"}, "response_format"),
        ({"response_format": 7}, "response_format"),
        ({"stream_format": "chunks"}, "stream_format"),
        ({"stream": True}, "stream"),
        ({"stream": ""}, "stream"),
        ({"stream": 0}, "stream"),
        ({"text": "Hi"}, "input"),
        ({"model": "eleven-labs-stt"}, "model"),
    ],
)
async def test_a_wrong_parameter_is_named(gateway: GatewayApp, given: dict[str, Any], parameter: str) -> None:
    status, _, param = await error_of(post(gateway, PATH, HI | given))
    assert (status, param) == (400, parameter)
    assert not gateway.provider.jobs


async def test_a_speed_that_is_given_twice_has_to_be_the_same(gateway: GatewayApp) -> None:
    same = HI | {"speed": 1.1, "voice_settings": {"speed": 1.1, "stability": 0.5}}
    async with post(gateway, PATH, same) as response:
        assert response.status == 200
    settings = gateway.provider.jobs[-1].input.voice_settings
    assert (settings.speed, settings.stability) == (1.1, 0.5)
    for given in ({"speed": 1.0}, {"speed": 1, "voice_settings": {"speed": True}}):
        async with post(gateway, PATH, same | given) as response:
            message = (await response.json())["error"]["message"]
        assert message == "Invalid speed: must be left out, or the same as voice_settings.speed"


async def test_an_adjusted_speed_has_the_name_that_the_caller_used(gateway: GatewayApp) -> None:
    for given, name in (({"speed": 4}, "speed"), ({"voice_settings": {"speed": 4}}, "voice_settings.speed")):
        async with post(gateway, PATH, HI | given) as response:
            assert response.headers["X-Pomelo-Adjusted"] == f"{name}=1.2"


async def test_a_text_that_is_too_long_is_named_input(gateway: GatewayApp) -> None:
    refusal = await error_of(post(gateway, PATH, HI | {"input": "a" * 10_001}))
    assert refusal == (400, "context_length_exceeded", "input")


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
async def test_what_is_adjusted_is_reported_by_the_names_of_the_parameters(
    gateway: GatewayApp, stream_format: str
) -> None:
    given = HI | {"speed": 4, "language_code": "en", "instructions": "sadly", "stream_format": stream_format}
    async with post(gateway, PATH, given) as response:
        assert response.headers["X-Pomelo-Adjusted"] == "language_code; speed=1.2; instructions"
    for name, value in {"speed": 4, "instructions": "sadly"}.items():
        refusal = await error_of(post(gateway, PATH, HI | {name: value}, headers=STRICT))
        assert refusal == (400, "invalid_parameter", name)


async def test_audio_is_sent_as_it_arrives_and_not_stored(gateway: GatewayApp) -> None:
    before = set(gateway.media.folder.iterdir())
    go_on = asyncio.Event()
    gateway.provider.script = play(audio(b"ID3 first"), go_on.wait, audio(b"second"))
    async with asyncio.timeout(20), post(gateway, PATH, HI) as response:
        assert await response.content.readexactly(9) == b"ID3 first"
        go_on.set()
        assert await response.read() == b"second"
    assert set(gateway.media.folder.iterdir()) == before


async def test_audio_that_breaks_off_does_not_look_complete(gateway: GatewayApp) -> None:
    gateway.provider.script = play(audio(b"ID3 first"), PomeloError("provider_unavailable"))
    async with post(gateway, PATH, HI) as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    gateway.provider.script = play(PomeloError("provider_unavailable"))
    assert await error_of(post(gateway, PATH, HI)) == (503, "provider_unavailable", None)


async def test_events_have_all_the_audio_in_short_lines(gateway: GatewayApp) -> None:
    before = set(gateway.media.folder.iterdir())
    gateway.provider.script = play(audio(AUDIO * 2), audio(AUDIO))
    async with post(gateway, PATH, HI | {"stream_format": "sse"}) as response:
        body = await response.read()
    assert max(map(len, body.splitlines())) < 64 * 1024
    *deltas, (_, done), end = events(body)
    assert {event["type"] for _, event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"]) for _, event in deltas) == AUDIO * 3
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    }
    assert end == ("message", "[DONE]")
    assert set(gateway.media.folder.iterdir()) == before


async def test_events_that_break_off_end_with_the_error(gateway: GatewayApp) -> None:
    gateway.provider.script = play(audio(b"ID3 first"), PomeloError("provider_unavailable"))
    first, last = await events_of(post(gateway, PATH, HI | {"stream_format": "sse"}))
    assert first[1]["type"] == "speech.audio.delta"
    assert last[0] == "message"
    assert last[1]["error"]["code"] == "provider_unavailable"
