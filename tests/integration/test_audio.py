"""Audio of callers on every protocol: the meaning of its media type, and the limit of its length."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from hashlib import sha256

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import RunningApp, app_fixture
from tests.calls import bearer, reason_of
from tests.driver import PROTOCOL
from tests.tasks import task_type_of, to_options, to_task
from tests.unit.media import corpus
from tests.wav import A_LAW, MU_LAW, PCM, wav_file

GRPC_TRANSPORTS = ("inline", "upload", "upload with the task's label", "upload with another label")
TRANSPORTS = (*GRPC_TRANSPORTS, "form", "data URI", "form through a gateway", "data URI through a gateway")
TRANSCRIPT = {"model": "eleven-labs-stt"}
CONVERSION = {
    "model": "eleven-labs-sts",
    "voice": "adam",
    "response_format": "url",
    "output_format": "pcm_8000",  # the sandbox need not encode it, as it would five minutes of mp3
}


app = app_fixture()


async def ask(
    app: RunningApp, transport: str, key: str, task: dict[str, str], label: str, data: bytes
) -> tuple[str, str]:
    """Runs a task with audio of a media type (empty: none); returns the code and message of an error, or "ok"
    and ""."""
    if transport in GRPC_TRANSPORTS:
        try:
            await _ask_grpc(app, transport, key, task, label, data)
        except grpc.aio.AioRpcError as error:
            return reason_of(error), error.details() or ""
        return "ok", ""
    form = aiohttp.FormData(task, default_to_multipart=True)
    if transport.startswith("form"):
        form.add_field("audio", data, filename="a", content_type=label or "application/octet-stream")
    else:
        form.add_field("audio", f"data:{label};base64,{base64.b64encode(data).decode()}")
    url = app.urls["remote" if "gateway" in transport else "rest"] + "/api/v1/task"
    async with app.session.post(url, data=form, headers={"Authorization": f"Bearer {key}"}) as answer:
        body = await answer.json()
        assert answer.status == (400 if "error" in body else 200), body
    return (body["error"]["code"], body["error"]["message"]) if "error" in body else ("ok", "")


async def _ask_grpc(
    app: RunningApp, transport: str, key: str, task: dict[str, str], label: str, data: bytes
) -> None:
    audio = MediaSource(data=data, content_type=label)
    if transport != "inline":
        header = {"upload": label, "upload with another label": "audio/pcm;rate=44100"}.get(transport)
        messages = [UploadMediaRequest(header=UploadMediaHeader(content_type=header))] if header else []
        messages += [UploadMediaRequest(chunk=data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
        uploaded = await MediaServiceStub(app.channel).UploadMedia(iter(messages), metadata=bearer(key))
        audio = MediaSource(media_id=uploaded.media.id, content_type="" if transport == "upload" else label)
    message = to_task(task)
    getattr(message, task_type_of(message.model)).audio.CopyFrom(audio)
    await TaskServiceStub(app.channel).RunTask(
        RunTaskRequest(spec=message, options=to_options(task)), metadata=bearer(key)
    )


# --- media types

SAMPLES = b"\0\1" * 32_000
VALID_LABELS = {
    "audio/pcm": SAMPLES,
    "audio/pcm;": SAMPLES,
    "audio/pcm;rate=16000;": SAMPLES,
    'audio/pcm;rate="16000"': SAMPLES,
    'Audio/PCM ; ; Channels="1" ; RATE = "16000"': SAMPLES,
    'audio/pcm;rate="1\\6000"': SAMPLES,
    "audio/pcm;rate=48000;charset=binary;name=a.raw": wav_file(PCM, 48_000, 2, SAMPLES),
    "audio/x-pcm;rate=8000": wav_file(PCM, 8_000, 2, SAMPLES),
    "audio/PCMU": wav_file(MU_LAW, 8_000, 1, SAMPLES),
    "audio/PCMA;rate=8000": wav_file(A_LAW, 8_000, 1, SAMPLES),
}
"""Labels of bare samples -> the bytes that the vendor gets."""

UNSUPPORTED_LABELS = (
    "audio/pcm;rate=",
    "audio/pcm;rate",
    "audio/pcm;=16000",
    "audio/pcm;rate=16000;rate=48000",
    "audio/pcm;rate=16000;Rate=16000",
    "audio/pcm;rate=11025",
    "audio/pcm;channels=2",
    "audio/PCMU;rate=16000",
    "audio/L24;rate=48000;channels=1",
    "audio/L8",
    "audio/x-raw",
    "audio/s16le",
)


def vendor_audio(app: RunningApp) -> tuple[str, str]:
    """The media type and `file_format` of the last audio that the vendor got."""
    form = app.upstream.requests[-1].form or ()
    fields = {part.name: part.text for part in form if part.text is not None}
    (audio,) = [part for part in form if part.text is None]
    return audio.content_type, fields.get("file_format") or ""


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_media_type_of_samples_is_accepted_in_any_spelling(transport: str, app: RunningApp) -> None:
    caller = await app.account()
    for label, expected in VALID_LABELS.items():
        assert await ask(app, transport, caller.live, TRANSCRIPT, label, SAMPLES) == ("ok", ""), label
        kind = ("audio/pcm;rate=16000", "pcm_s16le_16") if expected == SAMPLES else ("audio/wav", "")
        assert vendor_audio(app) == kind, label
        (part,) = [part for part in app.upstream.requests[-1].form or () if part.text is None]
        assert part.sha256 == sha256(expected).hexdigest(), label
    assert len(await app.records(caller)) == len(VALID_LABELS)


@pytest.mark.parametrize("label", UNSUPPORTED_LABELS)
async def test_a_media_type_of_samples_that_no_provider_takes_is_refused(label: str, app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.reset()
    errors = {await ask(app, transport, caller.live, TRANSCRIPT, label, SAMPLES) for transport in TRANSPORTS}
    assert len(errors) == 1
    (code, message) = errors.pop()
    assert code == "invalid_parameter"
    assert message.startswith("Invalid audio: must be ")
    assert not app.upstream.requests


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_big_endian_samples_reach_the_vendor_swapped(transport: str, app: RunningApp) -> None:
    caller = await app.account()
    data = random.Random(3).randbytes(300_001)
    swapped = b"".join(data[at + 1 : at + 2] + data[at : at + 1] for at in range(0, 300_000, 2))
    digests = []
    for label, sent in (("audio/L16;rate=16000;channels=1", data), ("audio/pcm;rate=16000", swapped)):
        assert await ask(app, transport, caller.live, TRANSCRIPT, label, sent) == ("ok", "")
        assert vendor_audio(app) == ("audio/pcm;rate=16000", "pcm_s16le_16")
        digests.append([p.sha256 for p in app.upstream.requests[-1].form or () if p.text is None])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("label", ["audio/pcm;rate=16000", "audio/basic", "audio/L16;rate=48000"])
@pytest.mark.parametrize("name", ["flv", "asf", "mpeg-ts", "tta", "caf", "adts", "mp2", "wav", "m4a"])
async def test_a_file_declared_as_samples_reaches_the_vendor_unchanged(
    name: str, label: str, app: RunningApp
) -> None:
    caller = await app.account()
    data = corpus.make(name)
    for transport in TRANSPORTS:
        assert await ask(app, transport, caller.live, TRANSCRIPT, label, data) == ("ok", "")
        media_type, file_format = vendor_audio(app)
        assert not media_type.startswith(("audio/pcm", "audio/basic", "audio/l16")), transport
        assert file_format == ""
        (part,) = [part for part in app.upstream.requests[-1].form or () if part.text is None]
        assert part.size == len(data)


@pytest.mark.parametrize("label", ["audio/pcm;rate=16000", "audio/basic"])
async def test_samples_may_begin_like_a_jpeg(label: str, app: RunningApp) -> None:
    caller = await app.account()
    samples = b"\xff\xd8\xff" + bytes(8_001)
    for transport in TRANSPORTS:
        assert await ask(app, transport, caller.live, TRANSCRIPT, label, samples) == ("ok", "")


IMAGES = {
    "png": b"\x89PNG\r\n\x1a\n" + bytes(3000),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(3000),
    "gif": b"GIF89a" + bytes(3000),
    "webp": b"RIFF\xb8\x0b\0\0WEBPVP8 " + bytes(2992),
}


@pytest.mark.parametrize("label", ["", "image/png", "audio/mpeg"])
@pytest.mark.parametrize("name", IMAGES)
async def test_an_image_is_not_audio(name: str, label: str, app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.reset()
    for key in (caller.live, caller.test):
        for transport in TRANSPORTS:
            error = await ask(app, transport, key, TRANSCRIPT, label, IMAGES[name])
            assert error == ("invalid_parameter", "Invalid audio: must be audio. Its bytes are an image")
    assert not app.upstream.requests


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_audio_does_not_reach_the_vendor_as_an_image(transport: str, app: RunningApp) -> None:
    caller = await app.account()
    for label in ("image/png", "image/jpg", "image/gif"):
        assert await ask(app, transport, caller.live, TRANSCRIPT, label, b"some audio " * 400) == ("ok", "")
        expected = "audio/pcm;rate=44100" if "another" in transport else "application/octet-stream"
        assert vendor_audio(app)[0] in (expected, "audio/wav"), label


# --- lengths

MAX_SECONDS = 300
"""The limit of eleven-labs-sts in seconds."""

MESSAGE = f"Invalid audio: must be audio of at most {MAX_SECONDS} seconds"


def padded(wav: bytes) -> bytes:
    """A WAV file with 4 MB of padding ahead of its first chunk."""
    return wav[:12] + b"JUNK" + (4_000_000).to_bytes(4, "little") + bytes(4_000_000) + wav[12:]


def encoded(name: str, seconds: float, rate: int) -> bytes:
    return corpus.make(name, seconds, rate, silent=True)


# The files are made when a test first needs one, silent and of low rates, because encoding all of them takes long.
TOO_LONG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp3": ("audio/mpeg", lambda: corpus.mp3(301)),
    "mp3 without a label": ("", lambda: corpus.mp3(301)),
    "mp3 declared as samples": ("audio/pcm;rate=48000", lambda: corpus.mp3(301)),
    "flv declared as samples": ("audio/pcm;rate=48000", lambda: encoded("flv", 302, 11_025)),
    "mpeg-ts declared as samples": ("audio/basic", lambda: encoded("mpeg-ts", 302, 8_000)),
    "mp3 declared as big-endian samples": ("audio/L16;rate=48000", lambda: corpus.mp3(301)),
    "wav": ("audio/wav", lambda: corpus.wav(301, rate=6_000)),
    "wav that declares no length": ("audio/wav", lambda: corpus.wav(301, rate=6_000, per_second=0xFFFFFFFF)),
    "wav that declares no samples": ("audio/wav", lambda: corpus.wav(301, rate=6_000, data=0)),
    "flac from a pipe": ("audio/flac", lambda: encoded("flac", 301, 8_000)),
    "ogg opus": ("audio/ogg", lambda: encoded("ogg opus", 301, 8_000)),
    "ogg of two codecs": (
        "audio/ogg",
        lambda: encoded("ogg opus", 151, 8_000) + encoded("ogg vorbis", 151, 8_000),
    ),
    "adts of two rates": (
        "audio/aac",
        lambda: encoded("adts", 1, 96_000) + encoded("adts", 301, 8_000),
    ),
    "samples": ("audio/pcm;rate=8000", lambda: bytes(301 * 16_000)),
    "samples of one byte": ("audio/basic", lambda: bytes(301 * 8_000)),
}

FITS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp3": ("audio/mpeg", lambda: corpus.mp3(299)),
    "mp3 of the limit, with the encoder's padding": (
        "audio/mpeg",
        lambda: encoded("mp3", MAX_SECONDS, 22_050),
    ),
    "m4a of the limit": ("audio/mp4", lambda: encoded("m4a", MAX_SECONDS, 8_000)),
    "ogg opus of the limit": ("audio/ogg", lambda: encoded("ogg opus", MAX_SECONDS, 8_000)),
    "samples of one byte": ("audio/basic", lambda: bytes(299 * 8_000)),
    "wav with padding": ("audio/wav", lambda: padded(corpus.wav(50, rate=6_000))),
    "bytes that can't be measured": ("", lambda: b"some audio " * 60_000),
}


async def convert(app: RunningApp, protocol: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    """Converts audio; returns the code and message of an error, or "ok" and ""."""
    of_grpc = "upload" if len(data) > 2**22 else "inline"
    transport = {"grpc": of_grpc, "rest": "form", "remote": "form through a gateway"}[protocol]
    return await ask(app, transport, key, CONVERSION, label, data)


@PROTOCOL
@pytest.mark.parametrize("name", TOO_LONG)
async def test_audio_above_the_limit_is_refused_without_a_request_to_the_vendor(
    app: RunningApp, protocol: str, name: str
) -> None:
    caller = await app.account()
    requests_before = len(app.upstream.requests)
    label, make = TOO_LONG[name]
    data = make()
    for key in (caller.live, caller.test):
        assert await convert(app, protocol, key, label, data) == ("invalid_parameter", MESSAGE)
    assert len(app.upstream.requests) == requests_before
    assert await app.records(caller) == []


@PROTOCOL
@pytest.mark.parametrize("name", FITS)
async def test_audio_that_can_be_within_the_limit_is_sent_to_the_vendor(
    app: RunningApp, protocol: str, name: str
) -> None:
    caller = await app.account()
    requests_before = len(app.upstream.requests)
    label, make = FITS[name]
    data = make()
    for key in (caller.live, caller.test) if "measured" not in name else (caller.live,):
        assert await convert(app, protocol, key, label, data) == ("ok", "")
    assert len(app.upstream.requests) == requests_before + 1
    assert len(await app.records(caller)) >= 1


@PROTOCOL
async def test_audio_that_the_vendor_refuses_as_too_long_costs_nothing(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account()
    app.upstream.script(error_reply(400, "audio_too_long", param="audio"))
    code, message = await convert(app, protocol, caller.live, "", b"some audio " * 60_000)
    assert code == "invalid_parameter"
    assert "audio" in message
    assert await app.records(caller) == []
    balance = await app.balance(caller, live=True)
    assert (balance.spent, balance.held) == (0, 0)
