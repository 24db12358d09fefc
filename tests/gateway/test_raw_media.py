"""Raw media: what `Accept` selects, in which format, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from gateway.task import raw_media_range
from gateway.types import TASK_FORMATS
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.media_pb2 import Media, MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted, TaskType
from tests.gateway.gateway_app import AUDIO, PNG, GatewayApp
from tests.gateway.requests import FLUX, HI, TTS, code_of, raw_task
from tests.gateway.scripts import STARTED, ScriptedTasks, Step, audio, play, progress

AUDIO_ONLY = {"Accept": "audio/*"}


@pytest.mark.parametrize(
    ("accept", "task_type", "is_raw"),
    [
        ("*/*", TaskType.TASK_TYPE_IMAGE, False),
        ("image/*", TaskType.TASK_TYPE_IMAGE, True),
        ("image/*;q=0", TaskType.TASK_TYPE_IMAGE, False),
        ("image/*; Q=0.0, image/webp", TaskType.TASK_TYPE_IMAGE, True),
        ("IMAGE/PNG;q=0.5", TaskType.TASK_TYPE_IMAGE, True),
        ("application/json, image/*", TaskType.TASK_TYPE_IMAGE, False),
        ("text/html, image/webp, */*;q=0.8", TaskType.TASK_TYPE_IMAGE, True),
        ("audio/*", TaskType.TASK_TYPE_IMAGE, False),
        ("audio/mpeg", TaskType.TASK_TYPE_SPEECH_TO_SPEECH, True),
        ("audio/*", TaskType.TASK_TYPE_TEXT, False),
        ("audio/*", TaskType.TASK_TYPE_SPEECH_TO_TEXT, False),
        (",;,", TaskType.TASK_TYPE_TEXT_TO_SPEECH, False),
    ],
)
def test_raw_media_is_sent_only_if_accept_asks_for_it(accept: str, task_type: int, is_raw: bool) -> None:
    assert bool(raw_media_range(accept, TASK_FORMATS[task_type])) is is_raw


@pytest.mark.parametrize(
    ("accept", "task_type", "used"),
    [
        ("image/avif,image/webp,image/*,*/*;q=0.8", TaskType.TASK_TYPE_IMAGE, "image/webp"),
        ("image/gif", TaskType.TASK_TYPE_IMAGE, "image/gif"),
        ("image/gif, image/bmp", TaskType.TASK_TYPE_IMAGE, "image/gif"),
        ("image/gif, application/json", TaskType.TASK_TYPE_IMAGE, None),
        ("image/webp;q=0, image/*", TaskType.TASK_TYPE_IMAGE, "image/*"),
        ("audio/flac, audio/wav, audio/mpeg", TaskType.TASK_TYPE_TEXT_TO_SPEECH, "audio/wav"),
        ("application/json;q=0.5, image/*", TaskType.TASK_TYPE_IMAGE, "image/*"),
        ("image/*;q=0.5, */*", TaskType.TASK_TYPE_IMAGE, None),
        ("image/webp; q=0.25, image/jpeg;q=0.3, image/png;q=0", TaskType.TASK_TYPE_IMAGE, "image/jpeg"),
        ("audio/mpeg;q=0.9, audio/ogg;q=1.000", TaskType.TASK_TYPE_TEXT_TO_SPEECH, "audio/ogg"),
    ],
)
def test_the_first_format_that_the_task_has_is_sent(accept: str, task_type: int, used: str | None) -> None:
    assert raw_media_range(accept, TASK_FORMATS[task_type]) == used


@pytest.mark.parametrize(
    ("given", "accept", "used"),
    [
        ({}, "audio/wav", "wav_24000"),
        ({}, "audio/x-wav", "wav_24000"),
        ({}, "audio/ogg", "opus_48000_64"),
        ({}, "audio/pcm", "pcm_24000"),
        ({}, "audio/mpeg", ""),
        ({}, "audio/*", ""),
        ({}, "audio/flac", ""),
        ({"output_format": "wav_8000"}, "audio/mpeg", "wav_8000"),
    ],
)
async def test_accept_decides_the_audio_format_unless_the_task_names_one(
    gateway: GatewayApp, given: dict[str, str], accept: str, used: str
) -> None:
    end = Event(completed=TaskResult(id="speech_1"))
    end.completed.speech.SetInParent()
    tasks = ScriptedTasks(STARTED, audio(b"one"), end)
    async with (
        gateway.over(tasks=tasks) as scripted,
        scripted.post_task({**TTS, **given}, headers={"Accept": accept}) as response,
    ):
        assert await response.read() == b"one"
    assert tasks.tasks[0].text_to_speech.output_format == used


async def test_accept_selects_raw_media(gateway: GatewayApp) -> None:
    async with gateway.post_task(FLUX, headers={"Accept": "image/*"}) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert await response.read() == PNG
    async with gateway.post_task(TTS, headers={"Accept": "audio/mpeg"}) as response:
        assert response.headers["Content-Type"] == "audio/mpeg"
        assert response.headers["X-Pomelo-Mode"] == "test"
        assert await response.read() == AUDIO
    async with gateway.post_task(HI, headers=AUDIO_ONLY) as response:
        assert response.headers["Content-Type"] == "application/json"
    async with gateway.post_task(FLUX, skip_auto_headers=["Accept"]) as response:
        assert response.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(("body", "accept"), [(TTS, "audio/*"), (FLUX, "image/png")])
async def test_raw_media_is_not_stored(gateway: GatewayApp, body: dict[str, Any], accept: str) -> None:
    before = set(gateway.media.folder.iterdir())
    async with gateway.post_task(body, headers={"Accept": accept}) as response:
        assert await response.read()
    assert set(gateway.media.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "accept", "used"),
    [
        ({}, "image/png", ImageFormat.IMAGE_FORMAT_PNG),
        ({}, "image/jpeg", ImageFormat.IMAGE_FORMAT_JPEG),
        ({}, "image/webp", ImageFormat.IMAGE_FORMAT_WEBP),
        ({"output_format": "jpeg"}, "image/webp", ImageFormat.IMAGE_FORMAT_JPEG),
        ({"output_format": "jpeg"}, "image/*", ImageFormat.IMAGE_FORMAT_JPEG),
        ({}, "image/*", ImageFormat.IMAGE_FORMAT_UNSPECIFIED),
    ],
)
async def test_accept_decides_the_image_format_unless_the_task_names_one(
    gateway: GatewayApp, given: dict[str, str], accept: str, used: int
) -> None:
    result = TaskResult()
    result.image.images.add(data=b"image", content_type="image/x")
    tasks = ScriptedTasks(STARTED, Event(completed=result))
    async with (
        gateway.over(tasks=tasks) as scripted,
        scripted.post_task({**FLUX, **given}, headers={"Accept": accept}) as response,
    ):
        assert (response.content_type, await response.read()) == ("image/x", b"image")
    assert tasks.tasks[0].image.output_format == used
    assert tasks.options[0].delivery == MediaDelivery.MEDIA_DELIVERY_INLINE


async def test_raw_audio_is_sent_while_it_is_generated(gateway: GatewayApp) -> None:
    received = asyncio.Event()
    gateway.provider.script = play(audio(b"one"), received.wait, audio(b"two"))
    async with gateway.post_task(TTS, headers=AUDIO_ONLY) as response:
        assert await response.content.readany() == b"one"
        received.set()
        assert await response.content.read() == b"two"


async def test_raw_audio_that_fails_before_its_first_byte_is_an_ordinary_error(gateway: GatewayApp) -> None:
    gateway.provider.script = play(PomeloError("provider_unavailable", retry_after=7))
    async with gateway.post_task(TTS, headers=AUDIO_ONLY) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "7")


async def test_a_raw_image_that_fails_after_its_progress_is_an_ordinary_error(gateway: GatewayApp) -> None:
    gateway.provider.script = play(progress(0.5), PomeloError("content_policy_violation"))
    asked = gateway.post_task(FLUX, headers={"Accept": "image/*"})
    assert await code_of(asked) == (400, "content_policy_violation")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_truncated_raw_audio_can_not_look_complete(gateway: GatewayApp, version: str) -> None:
    gateway.provider.script = play(audio(b"one"), PomeloError("provider_failed"))
    received = b""
    with pytest.raises(ConnectionResetError):
        received = await gateway.exchange(raw_task(TTS, "Accept: audio/*", version=version, close=False))
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("end", [(), (ZeroDivisionError(),)], ids=["no result", "a fault"])
async def test_raw_audio_without_a_result_can_not_look_complete(
    gateway: GatewayApp, end: tuple[Step, ...]
) -> None:
    tasks = ScriptedTasks(STARTED, audio(b"one"), lambda: asyncio.sleep(0), *end)
    async with (
        gateway.over(tasks=tasks) as scripted,
        scripted.post_task(TTS, headers=AUDIO_ONLY) as response,
    ):
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_empty_raw_audio_is_a_provider_failure(gateway: GatewayApp) -> None:
    end = Event(completed=TaskResult(id="speech_1"))
    end.completed.speech.SetInParent()
    async with gateway.over(tasks=ScriptedTasks(STARTED, end)) as scripted:
        assert await code_of(scripted.post_task(TTS, headers=AUDIO_ONLY)) == (502, "provider_failed")


async def test_media_with_an_invalid_content_type_are_an_internal_error(gateway: GatewayApp) -> None:
    for content_type in ("image/png\r\nX-Injected: 1", "image/png\n"):
        result = TaskResult()
        result.image.images.add(data=PNG, content_type=content_type)
        gateway.provider.script = play(Event(completed=result))
        sent = gateway.post_task(FLUX, headers={"Accept": "image/*"})
        assert await code_of(sent) == (500, "internal_error")


class StoredImage:
    """A media service with an image that has fewer bytes than it claims. `left` is the time of its last call."""

    left = 0.0

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"abc"

        self.left = call.deadline - time.monotonic()
        yield Media(id=media_id, content_type="image/png", size_bytes=10), pieces()


async def test_a_large_raw_image_has_time_to_be_sent_and_can_not_look_complete(gateway: GatewayApp) -> None:
    result = TaskResult(id="img_1")
    result.image.images.add(content_type="image/png").media.id = "media_1.png"
    media, headers = StoredImage(), {"Accept": "image/*", "X-Request-Timeout": "20"}
    tasks = ScriptedTasks(STARTED, Event(completed=result))
    async with (
        gateway.over(tasks=tasks, media=media) as scripted,
        scripted.post_task(FLUX, headers=headers) as response,
    ):
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert media.left > 60


async def test_what_was_adjusted_is_reported_with_raw_media(gateway: GatewayApp) -> None:
    started = Event(started=TaskStarted(id="speech_1"))
    started.started.adjustments.add(field="seed")
    tasks = ScriptedTasks(started, audio(b"one"), Event(completed=TaskResult(id="speech_1")))
    async with (
        gateway.over(tasks=tasks) as scripted,
        scripted.post_task(TTS, headers=AUDIO_ONLY) as response,
    ):
        assert (response.headers["X-Pomelo-Adjusted"], await response.read()) == ("seed", b"one")
