"""Sound that is longer than its model takes, over every protocol, with live and test keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import AudioInput, SpeechToSpeechInput
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.integration.asking import bearer, reason_of
from tests.integration.house import WAYS, House, open_house
from tests.unit.media import corpus

MOST = 300
"""Seconds that eleven-labs-sts takes."""

MESSAGE = f"Invalid audio: must be audio of at most {MOST} seconds"

TOO_LONG: dict[str, tuple[str, bytes]] = {
    "mp3": ("audio/mpeg", corpus.mp3(301)),
    "mp3 without a label": ("", corpus.mp3(301)),
    "mp3 labelled as samples": ("audio/pcm;rate=48000", corpus.mp3(301)),
    "flv labelled as samples": ("audio/pcm;rate=48000", corpus.make("flv", 302)),
    "mpeg-ts labelled as samples": ("audio/basic", corpus.make("mpeg-ts", 302)),
    "mp3 labelled as big-endian samples": ("audio/L16;rate=48000", corpus.mp3(301)),
    "wav": ("audio/wav", corpus.wav(301, rate=6_000)),
    "wav that claims an instant": ("audio/wav", corpus.wav(301, rate=6_000, per_second=0xFFFFFFFF)),
    "wav that claims no samples": ("audio/wav", corpus.wav(301, rate=6_000, data=0)),
    "flac from a pipe": ("audio/flac", corpus.make("flac", 301)),
    "ogg opus": ("audio/ogg", corpus.make("ogg opus", 301)),
    "ogg of two codecs": ("audio/ogg", corpus.make("ogg opus", 151) + corpus.make("ogg vorbis", 151)),
    "adts of two rates": ("audio/aac", corpus.make("adts", 1, 96_000) + corpus.make("adts", 301, 8_000)),
    "samples": ("audio/pcm;rate=8000", bytes(301 * 16_000)),
    "samples of one byte": ("audio/basic", bytes(301 * 8_000)),
}

FITS: dict[str, tuple[str, bytes]] = {
    "mp3": ("audio/mpeg", corpus.mp3(299)),
    "mp3 of the limit, with the encoder's padding": ("audio/mpeg", corpus.make("mp3", MOST)),
    "m4a of the limit": ("audio/mp4", corpus.make("m4a", MOST)),
    "ogg opus of the limit": ("audio/ogg", corpus.make("ogg opus", MOST)),
    "samples of one byte": ("audio/basic", bytes(299 * 8_000)),
    "wav with padding": (
        "audio/wav",
        (wav := corpus.wav(50, rate=6_000))[:12]
        + b"JUNK"
        + (4_000_000).to_bytes(4, "little")
        + bytes(4_000_000)
        + wav[12:],
    ),
    "bytes that can't be measured": ("", b"some sound " * 60_000),
}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("audio")) as opened:
        yield opened


async def ask(house: House, way: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    """The code and message of an error; ok and nothing for an answer."""
    if way != "grpc":
        form = aiohttp.FormData(default_to_multipart=True)
        for name, value in {"model": "eleven-labs-sts", "voice": "adam", "response_format": "url"}.items():
            form.add_field(name, value)
        form.add_field("audio", data, filename="a", content_type=label or "application/octet-stream")
        headers = {"Authorization": f"Bearer {key}"}
        async with house.session.post(f"{house.urls[way]}/api/v1/task", data=form, headers=headers) as answer:
            body = await answer.json()
            assert answer.status == (400 if "error" in body else 200), body
            return (body["error"]["code"], body["error"]["message"]) if "error" in body else ("ok", "")
    audio = AudioInput(data=data, content_type=label)
    if len(data) > 2**22:
        pieces = [UploadMediaRequest(chunk=data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
        begin = [UploadMediaRequest(content_type=label)] if label else []
        call = MediaServiceStub(house.channel).UploadMedia(iter(begin + pieces), metadata=bearer(key))
        audio = AudioInput(media_id=(await call).media.media_id)
    task = Task(model="eleven-labs-sts", speech_to_speech=SpeechToSpeechInput(audio=audio, voice="adam"))
    try:
        await TaskServiceStub(house.channel).RunTask(RunTaskRequest(task=task), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return reason_of(error), error.details() or ""
    return "ok", ""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TOO_LONG)
async def test_sound_above_the_limit_is_refused_before_the_vendor_is_asked(
    house: House, way: str, name: str
) -> None:
    caller = await house.caller()
    asked = len(house.upstream.requests)
    for key in (caller.live, caller.test):
        assert await ask(house, way, key, *TOO_LONG[name]) == ("invalid_parameter", MESSAGE)
    assert len(house.upstream.requests) == asked
    assert await house.records(caller) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FITS)
async def test_sound_that_may_be_within_the_limit_reaches_the_vendor(
    house: House, way: str, name: str
) -> None:
    caller = await house.caller()
    asked = len(house.upstream.requests)
    for key in (caller.live, caller.test) if "measured" not in name else (caller.live,):
        assert await ask(house, way, key, *FITS[name]) == ("ok", "")
    assert len(house.upstream.requests) == asked + 1
    assert len(await house.records(caller)) >= 1


@pytest.mark.parametrize("way", WAYS)
async def test_sound_that_only_the_vendor_finds_too_long_costs_nothing(house: House, way: str) -> None:
    caller = await house.caller()
    house.upstream.script(error_reply(400, "audio_too_long", param="audio"))
    code, message = await ask(house, way, caller.live, "", b"some sound " * 60_000)
    assert code == "invalid_parameter"
    assert "audio" in message
    assert await house.records(caller) == []
    balance = await house.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)
