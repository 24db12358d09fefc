"""Sound that is longer than its model takes, over every protocol, with live and test keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import AudioInput, SpeechToSpeechInput
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing.elevenlabs_wire import error_reply
from tests.app import RunningApp, run_app
from tests.calls import bearer, reason_of
from tests.driver import PROTOCOLS
from tests.unit.media import corpus

MOST = 300
"""Seconds that eleven-labs-sts takes."""

MESSAGE = f"Invalid audio: must be audio of at most {MOST} seconds"

PLAIN = "pcm_8000"
"""What answers are in, as the sandbox need not encode five minutes of it."""


def padded(wav: bytes) -> bytes:
    """A WAV file with 4 MB of padding ahead of its first chunk."""
    return wav[:12] + b"JUNK" + (4_000_000).to_bytes(4, "little") + bytes(4_000_000) + wav[12:]


# The files are made when a test first needs one, because encoding all of them takes long.
TOO_LONG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp3": ("audio/mpeg", lambda: corpus.mp3(301)),
    "mp3 without a label": ("", lambda: corpus.mp3(301)),
    "mp3 labelled as samples": ("audio/pcm;rate=48000", lambda: corpus.mp3(301)),
    "flv labelled as samples": ("audio/pcm;rate=48000", lambda: corpus.make("flv", 302)),
    "mpeg-ts labelled as samples": ("audio/basic", lambda: corpus.make("mpeg-ts", 302)),
    "mp3 labelled as big-endian samples": ("audio/L16;rate=48000", lambda: corpus.mp3(301)),
    "wav": ("audio/wav", lambda: corpus.wav(301, rate=6_000)),
    "wav that claims an instant": ("audio/wav", lambda: corpus.wav(301, rate=6_000, per_second=0xFFFFFFFF)),
    "wav that claims no samples": ("audio/wav", lambda: corpus.wav(301, rate=6_000, data=0)),
    "flac from a pipe": ("audio/flac", lambda: corpus.make("flac", 301)),
    "ogg opus": ("audio/ogg", lambda: corpus.make("ogg opus", 301)),
    "ogg of two codecs": ("audio/ogg", lambda: corpus.make("ogg opus", 151) + corpus.make("ogg vorbis", 151)),
    "adts of two rates": (
        "audio/aac",
        lambda: corpus.make("adts", 1, 96_000) + corpus.make("adts", 301, 8_000),
    ),
    "samples": ("audio/pcm;rate=8000", lambda: bytes(301 * 16_000)),
    "samples of one byte": ("audio/basic", lambda: bytes(301 * 8_000)),
}

FITS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp3": ("audio/mpeg", lambda: corpus.mp3(299)),
    "mp3 of the limit, with the encoder's padding": ("audio/mpeg", lambda: corpus.make("mp3", MOST)),
    "m4a of the limit": ("audio/mp4", lambda: corpus.make("m4a", MOST)),
    "ogg opus of the limit": ("audio/ogg", lambda: corpus.make("ogg opus", MOST)),
    "samples of one byte": ("audio/basic", lambda: bytes(299 * 8_000)),
    "wav with padding": ("audio/wav", lambda: padded(corpus.wav(50, rate=6_000))),
    "bytes that can't be measured": ("", lambda: b"some sound " * 60_000),
}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("audio")) as opened:
        yield opened


async def ask(house: RunningApp, way: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    """The code and message of an error; ok and nothing for an answer."""
    if way != "grpc":
        form = aiohttp.FormData(default_to_multipart=True)
        fields = {
            "model": "eleven-labs-sts",
            "voice": "adam",
            "response_format": "url",
            "output_format": PLAIN,
        }
        for name, value in fields.items():
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
    task = Task(
        model="eleven-labs-sts",
        speech_to_speech=SpeechToSpeechInput(audio=audio, voice="adam", output_format=PLAIN),
    )
    try:
        await TaskServiceStub(house.channel).RunTask(RunTaskRequest(task=task), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return reason_of(error), error.details() or ""
    return "ok", ""


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("name", TOO_LONG)
async def test_sound_above_the_limit_is_refused_before_the_vendor_is_asked(
    house: RunningApp, way: str, name: str
) -> None:
    caller = await house.account()
    asked = len(house.upstream.requests)
    label, make = TOO_LONG[name]
    data = make()
    for key in (caller.live, caller.test):
        assert await ask(house, way, key, label, data) == ("invalid_parameter", MESSAGE)
    assert len(house.upstream.requests) == asked
    assert await house.records(caller) == []


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("name", FITS)
async def test_sound_that_may_be_within_the_limit_reaches_the_vendor(
    house: RunningApp, way: str, name: str
) -> None:
    caller = await house.account()
    asked = len(house.upstream.requests)
    label, make = FITS[name]
    data = make()
    for key in (caller.live, caller.test) if "measured" not in name else (caller.live,):
        assert await ask(house, way, key, label, data) == ("ok", "")
    assert len(house.upstream.requests) == asked + 1
    assert len(await house.records(caller)) >= 1


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_sound_that_only_the_vendor_finds_too_long_costs_nothing(house: RunningApp, way: str) -> None:
    caller = await house.account()
    house.upstream.script(error_reply(400, "audio_too_long", param="audio"))
    code, message = await ask(house, way, caller.live, "", b"some sound " * 60_000)
    assert code == "invalid_parameter"
    assert "audio" in message
    assert await house.records(caller) == []
    balance = await house.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)
