"""Audio above the limit of its model is refused on every protocol, with live and test keys."""

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
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import RunningApp, run_app
from tests.calls import bearer, reason_of
from tests.driver import PROTOCOLS
from tests.unit.media import corpus

MAX_SECONDS = 300
"""The limit of eleven-labs-sts in seconds."""

MESSAGE = f"Invalid audio: must be audio of at most {MAX_SECONDS} seconds"

OUTPUT_FORMAT = "pcm_8000"
"""A format that the sandbox need not encode, as it would five minutes of mp3."""


def padded(wav: bytes) -> bytes:
    """A WAV file with 4 MB of padding ahead of its first chunk."""
    return wav[:12] + b"JUNK" + (4_000_000).to_bytes(4, "little") + bytes(4_000_000) + wav[12:]


# The files are made when a test first needs one, because encoding all of them takes long.
TOO_LONG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp3": ("audio/mpeg", lambda: corpus.mp3(301)),
    "mp3 without a label": ("", lambda: corpus.mp3(301)),
    "mp3 declared as samples": ("audio/pcm;rate=48000", lambda: corpus.mp3(301)),
    "flv declared as samples": ("audio/pcm;rate=48000", lambda: corpus.make("flv", 302)),
    "mpeg-ts declared as samples": ("audio/basic", lambda: corpus.make("mpeg-ts", 302)),
    "mp3 declared as big-endian samples": ("audio/L16;rate=48000", lambda: corpus.mp3(301)),
    "wav": ("audio/wav", lambda: corpus.wav(301, rate=6_000)),
    "wav that declares no length": ("audio/wav", lambda: corpus.wav(301, rate=6_000, per_second=0xFFFFFFFF)),
    "wav that declares no samples": ("audio/wav", lambda: corpus.wav(301, rate=6_000, data=0)),
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
    "mp3 of the limit, with the encoder's padding": ("audio/mpeg", lambda: corpus.make("mp3", MAX_SECONDS)),
    "m4a of the limit": ("audio/mp4", lambda: corpus.make("m4a", MAX_SECONDS)),
    "ogg opus of the limit": ("audio/ogg", lambda: corpus.make("ogg opus", MAX_SECONDS)),
    "samples of one byte": ("audio/basic", lambda: bytes(299 * 8_000)),
    "wav with padding": ("audio/wav", lambda: padded(corpus.wav(50, rate=6_000))),
    "bytes that can't be measured": ("", lambda: b"some audio " * 60_000),
}


@pytest.fixture(scope="module", name="app")
async def _app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("audio")) as app:
        yield app


async def ask(app: RunningApp, protocol: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    """Runs a task; returns the code and message of an error, or "ok" and ""."""
    if protocol != "grpc":
        form = aiohttp.FormData(default_to_multipart=True)
        fields = {
            "model": "eleven-labs-sts",
            "voice": "adam",
            "response_format": "url",
            "output_format": OUTPUT_FORMAT,
        }
        for name, value in fields.items():
            form.add_field(name, value)
        form.add_field("audio", data, filename="a", content_type=label or "application/octet-stream")
        headers = {"Authorization": f"Bearer {key}"}
        async with app.session.post(
            f"{app.urls[protocol]}/api/v1/task", data=form, headers=headers
        ) as answer:
            body = await answer.json()
            assert answer.status == (400 if "error" in body else 200), body
            return (body["error"]["code"], body["error"]["message"]) if "error" in body else ("ok", "")
    audio = AudioInput(data=data, content_type=label)
    if len(data) > 2**22:
        chunks = [UploadMediaRequest(chunk=data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
        begin = [UploadMediaRequest(content_type=label)] if label else []
        call = MediaServiceStub(app.channel).UploadMedia(iter(begin + chunks), metadata=bearer(key))
        audio = AudioInput(media_id=(await call).media.media_id)
    task = Task(
        model="eleven-labs-sts",
        speech_to_speech=SpeechToSpeechInput(audio=audio, voice="adam", output_format=OUTPUT_FORMAT),
    )
    try:
        await TaskServiceStub(app.channel).RunTask(RunTaskRequest(task=task), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return reason_of(error), error.details() or ""
    return "ok", ""


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TOO_LONG)
async def test_audio_above_the_limit_is_refused_without_a_request_to_the_vendor(
    app: RunningApp, protocol: str, name: str
) -> None:
    caller = await app.account()
    requests_before = len(app.upstream.requests)
    label, make = TOO_LONG[name]
    data = make()
    for key in (caller.live, caller.test):
        assert await ask(app, protocol, key, label, data) == ("invalid_parameter", MESSAGE)
    assert len(app.upstream.requests) == requests_before
    assert await app.records(caller) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FITS)
async def test_audio_that_can_be_within_the_limit_is_sent_to_the_vendor(
    app: RunningApp, protocol: str, name: str
) -> None:
    caller = await app.account()
    requests_before = len(app.upstream.requests)
    label, make = FITS[name]
    data = make()
    for key in (caller.live, caller.test) if "measured" not in name else (caller.live,):
        assert await ask(app, protocol, key, label, data) == ("ok", "")
    assert len(app.upstream.requests) == requests_before + 1
    assert len(await app.records(caller)) >= 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_audio_that_the_vendor_refuses_as_too_long_costs_nothing(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account()
    app.upstream.script(error_reply(400, "audio_too_long", param="audio"))
    code, message = await ask(app, protocol, caller.live, "", b"some audio " * 60_000)
    assert code == "invalid_parameter"
    assert "audio" in message
    assert await app.records(caller) == []
    balance = await app.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)
