"""MediaService over gRPC."""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import Iterable
from typing import Any

import grpc
import pytest

from pomelo.app import App
from pomelo.gen.v1.media_pb2 import Media, MediaSource
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import ContentPart, ImagePart, Message, Role, TextInput
from pomelo.server.server import ServerOptions, open_server
from pomelo.stores.accounts import Grant, Wallet
from tests.calls import as_dict, bearer, failure, reason_of, upload_messages
from tests.conftest import Keys

CHUNK = 1024 * 1024

IMAGES = {
    "png": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(60),
    "gif": b"GIF89a" + bytes(60),
    "webp": b"RIFF\x44\0\0\0WEBPVP8 " + bytes(60),
}


@pytest.fixture(scope="module")
def media(channel: grpc.aio.Channel) -> Any:
    return MediaServiceStub(channel)


def silent_wav(seconds: float = 1.0) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(16_000)
        audio.writeframes(bytes(int(seconds * 32_000)))
    return file.getvalue()


async def upload(media: Any, key: str, messages: Iterable[UploadMediaRequest]) -> Media:
    """Uploads a file, and returns its metadata."""
    response = await media.UploadMedia(iter(messages), metadata=bearer(key))
    assert isinstance(response.media, Media)
    return response.media


async def refused(media: Any, key: str, messages: Iterable[UploadMediaRequest]) -> grpc.aio.AioRpcError:
    """Returns the error of an upload that must fail."""
    return await failure(media.UploadMedia(iter(messages), metadata=bearer(key)))


async def download(media: Any, request: DownloadMediaRequest, **more: Any) -> tuple[Media, list[bytes]]:
    """Downloads a file, and returns its metadata and its chunks."""
    messages = [message async for message in media.DownloadMedia(request, **more)]
    return messages[0].media, [message.chunk for message in messages[1:]]


def stored(app: App) -> set[str]:
    """Returns the names of all files in the media store."""
    return {path.name for path in (app.settings.data / "media").iterdir()}


@pytest.mark.parametrize("label", ["", "audio/mpeg"])
@pytest.mark.parametrize("name", IMAGES)
async def test_an_image_that_tasks_take_is_described_by_its_type(
    name: str, label: str, media: Any, channel: grpc.aio.Channel, keys: Keys
) -> None:
    data = IMAGES[name]
    uploaded = await upload(media, keys.test, upload_messages(data, label))
    metadata, chunks = await download(media, DownloadMediaRequest(id=uploaded.id), metadata=bearer(keys.test))
    assert (uploaded.content_type, metadata.content_type) == (f"image/{name}", f"image/{name}")
    assert b"".join(chunks) == data
    image = ContentPart(image=ImagePart(source=MediaSource(media_id=uploaded.id)))
    message = Message(role=Role.ROLE_USER, content=[ContentPart(text="What is this?"), image])
    spec = TaskSpec(model="gpt-4", text=TextInput(messages=[message]))
    await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=spec), metadata=bearer(keys.test))


async def test_an_upload_can_be_downloaded_and_used(
    media: Any, channel: grpc.aio.Channel, keys: Keys
) -> None:
    audio = silent_wav(40)
    uploaded = await upload(media, keys.test, upload_messages(audio, "audio/wav"))
    assert uploaded.content_type == "audio/wav"
    assert uploaded.size_bytes == len(audio)
    metadata, chunks = await download(media, DownloadMediaRequest(id=uploaded.id), metadata=bearer(keys.test))
    assert metadata.id == uploaded.id
    assert b"".join(chunks) == audio
    assert max(map(len, chunks)) <= 256 * 1024
    task = TaskSpec(
        model="eleven-labs-stt",
        speech_to_text=SpeechToTextInput(audio=MediaSource(media_id=uploaded.id)),
    )
    response = await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=task), metadata=bearer(keys.test))
    assert response.result.transcription.audio_seconds == pytest.approx(40, abs=0.1)


@pytest.mark.parametrize("whose", ["another account", "the other mode"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "test"])
async def test_another_account_or_mode_can_not_read_or_use_an_upload(
    whose: str, live: bool, media: Any, channel: grpc.aio.Channel, keys: Keys, app: App
) -> None:
    owner = keys.live if live else keys.test
    if whose == "another account":
        account = f"other-{live}"
        await app.store.add_account(account, "unlimited", 1.0)
        await app.store.grant(Grant(f"for {account}", Wallet(account, live), 10**9, 1.0))
        _, other = await app.keyring.create(account, live=live)
    else:
        other = keys.test if live else keys.live
    uploaded = await upload(media, owner, upload_messages(silent_wav(), "audio/wav"))
    error = await failure(media.DownloadMedia(DownloadMediaRequest(id=uploaded.id), metadata=bearer(other)))
    assert reason_of(error) == "not_found"
    audio = MediaSource(media_id=uploaded.id)
    tasks = TaskServiceStub(channel)
    for task in (
        TaskSpec(model="eleven-labs-stt", speech_to_text=SpeechToTextInput(audio=audio)),
        TaskSpec(model="eleven-labs-sts", speech_to_speech=SpeechToSpeechInput(audio=audio, voice="adam")),
    ):
        error = await failure(tasks.RunTask(RunTaskRequest(spec=task), metadata=bearer(other)))
        assert reason_of(error) == "invalid_parameter"
        assert "audio" in (error.details() or "")
        assert uploaded.id in stored(app)
        assert await tasks.RunTask(RunTaskRequest(spec=task), metadata=bearer(owner))


@pytest.mark.parametrize("live", [True, False], ids=["live", "test"])
async def test_the_other_mode_can_not_read_the_media_of_a_task(
    live: bool, media: Any, channel: grpc.aio.Channel, keys: Keys
) -> None:
    owner, other = (keys.live, keys.test) if live else (keys.test, keys.live)
    task = TaskSpec(model="eleven-labs-tts", text_to_speech=TextToSpeechInput(text="Hello.", voice="adam"))
    response = await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=task), metadata=bearer(owner))
    request = DownloadMediaRequest(id=response.result.speech.media.id)
    _, chunks = await download(media, request, metadata=bearer(owner))
    assert chunks
    error = await failure(media.DownloadMedia(request, metadata=bearer(other)))
    assert reason_of(error) == "not_found"


async def test_a_signed_link_needs_no_key(media: Any, keys: Keys) -> None:
    uploaded = await upload(media, keys.test, upload_messages(silent_wav()))
    query = uploaded.url.partition("?")[2]
    _, chunks = await download(media, DownloadMediaRequest(id=uploaded.id, signature=query))
    assert b"".join(chunks) == silent_wav()
    error = await failure(media.DownloadMedia(DownloadMediaRequest(id=uploaded.id, signature=query + "x")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "not_found")
    error = await failure(media.DownloadMedia(DownloadMediaRequest(id=uploaded.id)))
    assert reason_of(error) == "invalid_api_key"


async def test_the_content_type_is_detected_from_the_bytes(media: Any, keys: Keys) -> None:
    assert (await upload(media, keys.test, upload_messages(silent_wav()))).content_type == "audio/wav"
    assert (await upload(media, keys.test, upload_messages(silent_wav(), ""))).content_type == "audio/wav"


async def test_a_chunk_of_1_mib_is_accepted_and_a_larger_one_is_refused(
    media: Any, keys: Keys, app: App
) -> None:
    assert (await upload(media, keys.test, upload_messages(b"x" * CHUNK, size=CHUNK))).size_bytes == CHUNK
    before = stored(app)
    error = await refused(media, keys.test, upload_messages(b"x" * (CHUNK + 1), size=CHUNK + 1))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    assert "chunk" in (error.details() or "")
    assert stored(app) == before


@pytest.mark.parametrize(
    ("messages", "reason", "field"),
    [
        ([UploadMediaRequest(chunk=b"x"), UploadMediaRequest(header=UploadMediaHeader(content_type="audio/wav"))], "invalid_parameter", "header"),
        ([UploadMediaRequest(header=UploadMediaHeader(content_type="audio/wav"))] * 2, "invalid_parameter", "header"),
        ([UploadMediaRequest(chunk=b"x"), UploadMediaRequest(chunk=b"")], "invalid_parameter", "chunk"),
        ([UploadMediaRequest(header=UploadMediaHeader(content_type="audio/wav")), UploadMediaRequest()], "missing_parameter", "chunk"),
        ([UploadMediaRequest()], "missing_parameter", "chunk"),
    ],
)  # fmt: skip
async def test_messages_in_a_wrong_order_are_refused_and_nothing_is_stored(
    messages: list[UploadMediaRequest], reason: str, field: str, media: Any, keys: Keys, app: App
) -> None:
    before = stored(app)
    error = await refused(media, keys.test, messages)
    assert reason_of(error) == reason
    assert field in (error.details() or "")
    assert stored(app) == before


async def test_an_upload_above_the_limit_is_refused_while_the_caller_still_sends(
    media: Any, keys: Keys, app: App
) -> None:
    before = stored(app)
    for _ in range(3):
        error = await refused(
            media, keys.test, upload_messages(b"x" * (60 * CHUNK), "audio/mpeg", size=CHUNK)
        )
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(error) == "payload_too_large"
    assert stored(app) == before


@pytest.mark.parametrize("size", [10, 5 * CHUNK])
async def test_an_upload_without_a_valid_key_is_refused(size: int, media: Any, keys: Keys, app: App) -> None:
    before = stored(app)
    error = await refused(media, keys.revoked, upload_messages(b"x" * size, "audio/mpeg"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    assert as_dict(error.trailing_metadata())["x-request-id"].startswith("req_")
    assert stored(app) == before


async def test_an_invalid_key_is_reported_before_an_invalid_first_message(media: Any, keys: Keys) -> None:
    error = await refused(media, keys.revoked, [UploadMediaRequest()])
    assert reason_of(error) == "invalid_api_key"


async def test_a_cancelled_upload_leaves_no_file(keys: Keys, app: App) -> None:
    before = stored(app)
    async with (
        asyncio.timeout(30),
        open_server(app.services, ServerOptions("127.0.0.1:0")) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for size in (10, 100_000, CHUNK) * 20:  # it is cancelled at different points
            call = MediaServiceStub(channel).UploadMedia(metadata=bearer(keys.test))
            await call.write(UploadMediaRequest(header=UploadMediaHeader(content_type="audio/mpeg")))
            for _ in range(4):  # the larger ones exceed the windows, so the server has read a part
                await call.write(UploadMediaRequest(chunk=b"x" * size))
            assert size < CHUNK or any(name.startswith(".part_") for name in stored(app))
            call.cancel()
            await server.running.idle()
            assert stored(app) == before


def with_unknown_field(place: str) -> list[UploadMediaRequest]:
    """Returns the messages of an upload. One has an unknown field: the header, or a message."""
    messages = [UploadMediaRequest(header=UploadMediaHeader()), UploadMediaRequest(chunk=b"x")]
    target: Any = messages[0].header if place == "header" else messages[int(place)]
    target.MergeFromString(b"\xf8\x3f\x01")
    return messages


@pytest.mark.parametrize(
    ("place", "shown"), [("0", "the request"), ("1", "the request"), ("header", "header")]
)
async def test_an_upload_with_an_unknown_field_is_refused_and_nothing_is_stored(
    place: str, shown: str, media: Any, keys: Keys, app: App
) -> None:
    before = stored(app)
    error = await refused(media, keys.test, with_unknown_field(place))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    assert (error.details() or "").startswith(f"Unknown field 1023 of {shown}: ")
    assert stored(app) == before


async def test_a_download_with_an_unknown_field_is_refused_after_its_key(media: Any, keys: Keys) -> None:
    one = await upload(media, keys.test, upload_messages(silent_wav()))
    request = DownloadMediaRequest(id=one.id)
    request.MergeFromString(b"\xf8\x3f\x01")
    assert reason_of(await failure(media.DownloadMedia(request))) == "invalid_api_key"
    error = await failure(media.DownloadMedia(request, metadata=bearer(keys.test)))
    assert (error.details() or "").startswith("Unknown field 1023 of the request: ")
    request.signature = one.url.partition("?")[2]
    assert reason_of(await failure(media.DownloadMedia(request))) == "invalid_parameter"


async def test_a_download_without_an_id_lacks_it(media: Any, keys: Keys) -> None:
    error = await failure(media.DownloadMedia(DownloadMediaRequest(), metadata=bearer(keys.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "missing_parameter")
    error = await failure(media.DownloadMedia(DownloadMediaRequest()))
    assert reason_of(error) == "invalid_api_key"


@pytest.mark.parametrize("media_id", ["nope", "../../etc/passwd", "media_" + "0" * 42 + ".wav"])
async def test_an_unknown_media_id_is_not_found(media_id: str, media: Any, keys: Keys) -> None:
    error = await failure(media.DownloadMedia(DownloadMediaRequest(id=media_id), metadata=bearer(keys.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "not_found")
