"""Media types of audio have the same meaning on every protocol, and never override the bytes."""

from __future__ import annotations

import base64
import random
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import AudioInput, SpeechToTextInput
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.app import RunningApp, run_app
from tests.calls import bearer, reason_of
from tests.unit.media import corpus

TRANSPORTS = ("inline", "upload", "form", "data URI", "form through a gateway", "data URI through a gateway")
SAMPLES = b"\0\1" * 32_000

VALID_LABELS = {
    "audio/pcm": "audio/pcm;rate=16000",
    "audio/pcm;": "audio/pcm;rate=16000",
    "audio/pcm;rate=16000;": "audio/pcm;rate=16000",
    'audio/pcm;rate="16000"': "audio/pcm;rate=16000",
    'Audio/PCM ; ; Channels="1" ; RATE = "16000"': "audio/pcm;rate=16000",
    'audio/pcm;rate="1\\6000"': "audio/pcm;rate=16000",
    "audio/pcm;rate=48000;charset=binary;name=a.raw": "audio/pcm;rate=48000",
    "audio/x-pcm;rate=8000": "audio/pcm;rate=8000",
    "audio/PCMU": "audio/basic",
    "audio/PCMA;rate=8000": "audio/x-alaw-basic",
}
"""Labels of bare samples -> the media type that the vendor gets."""

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


@pytest.fixture(scope="module", name="app")
async def _app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("labels")) as app:
        yield app


async def ask(app: RunningApp, transport: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    """Requests a transcript; returns the code and message of an error, or "ok" and ""."""
    if transport in ("inline", "upload"):
        try:
            return await _ask_grpc(app, transport, key, label, data)
        except grpc.aio.AioRpcError as error:
            return reason_of(error), error.details() or ""
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("model", "eleven-labs-stt")
    if transport.startswith("form"):
        form.add_field("audio", data, filename="a", content_type=label)
    else:
        form.add_field("audio", f"data:{label};base64,{base64.b64encode(data).decode()}")
    url = app.urls["remote" if "gateway" in transport else "rest"] + "/api/v1/task"
    async with app.session.post(url, data=form, headers={"Authorization": f"Bearer {key}"}) as answer:
        body = await answer.json()
    error = body.get("error", {"code": "ok", "message": ""})
    return error["code"], error["message"]


async def _ask_grpc(app: RunningApp, transport: str, key: str, label: str, data: bytes) -> tuple[str, str]:
    audio = AudioInput(data=data, content_type=label)
    if transport == "upload":
        requests = [UploadMediaRequest(content_type=label), UploadMediaRequest(chunk=data)]
        uploaded = await MediaServiceStub(app.channel).UploadMedia(iter(requests), metadata=bearer(key))
        audio = AudioInput(media_id=uploaded.media.media_id)
    task = Task(model="eleven-labs-stt", speech_to_text=SpeechToTextInput(audio=audio))
    await TaskServiceStub(app.channel).RunTask(RunTaskRequest(task=task), metadata=bearer(key))
    return "ok", ""


def vendor_audio(app: RunningApp) -> tuple[str, str]:
    """The media type and `file_format` of the last audio that the vendor got."""
    form = app.upstream.requests[-1].form or ()
    fields = {part.name: part.text for part in form if part.text is not None}
    (audio,) = [part for part in form if part.text is None]
    return audio.content_type, fields.get("file_format") or ""


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_media_type_of_samples_is_accepted_in_any_spelling(transport: str, app: RunningApp) -> None:
    caller = await app.account()
    for label, media_type in VALID_LABELS.items():
        assert await ask(app, transport, caller.live, label, SAMPLES) == ("ok", ""), label
        expected = (media_type, "pcm_s16le_16" if media_type == "audio/pcm;rate=16000" else "")
        assert vendor_audio(app) == expected, label
    assert len(await app.records(caller)) == len(VALID_LABELS)


@pytest.mark.parametrize("label", UNSUPPORTED_LABELS)
async def test_a_media_type_of_samples_that_no_provider_takes_is_refused(label: str, app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.reset()
    errors = {await ask(app, transport, caller.live, label, SAMPLES) for transport in TRANSPORTS}
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
        assert await ask(app, transport, caller.live, label, sent) == ("ok", "")
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
        assert await ask(app, transport, caller.live, label, data) == ("ok", "")
        media_type, file_format = vendor_audio(app)
        assert not media_type.startswith(("audio/pcm", "audio/basic", "audio/l16")), transport
        assert file_format == ""
        (part,) = [part for part in app.upstream.requests[-1].form or () if part.text is None]
        assert part.size == len(data)
