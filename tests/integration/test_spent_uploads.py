"""Audio of a form is deleted with its task; audio uploaded over gRPC stays for other tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import App
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream, Gate, Speech, Transcript
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.calls import bearer
from tests.conftest import Keys

AUDIO = b"OggS" + b"audio of some length " * 20_000


@pytest.fixture
def stored_uploads(settings: Settings) -> Any:
    """Returns the uploads in the media folder, which are recognized by their size."""

    def list_uploads() -> set[Path]:
        return {path for path in (settings.data / "media").iterdir() if path.stat().st_size == len(AUDIO)}

    before = list_uploads()
    return lambda: list_uploads() - before


@pytest.fixture
async def reset_upstream(upstream: FaultUpstream) -> AsyncIterator[FaultUpstream]:
    """The fake vendors, reset before and after the test."""
    upstream.reset()
    yield upstream
    upstream.reset()


def form(model: str, **fields: str) -> aiohttp.FormData:
    """A form with an audio file."""
    data = aiohttp.FormData({"model": model, **fields})
    data.add_field("audio", AUDIO, filename="a.ogg", content_type="audio/ogg")
    return data


@pytest.mark.parametrize("remote", [False, True], ids=["rest", "remote"])
@pytest.mark.parametrize("live", [False, True], ids=["test key", "live key"])
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_audio_of_a_form_is_deleted_with_its_task(
    remote: bool,
    live: bool,
    stream: str,
    http: aiohttp.ClientSession,
    rest_url: str,
    gateway_url: str,
    keys: Keys,
    stored_uploads: Any,
) -> None:
    url = gateway_url if remote else rest_url
    headers = {"Authorization": f"Bearer {keys.live if live else keys.test}"}
    for body in (
        form("eleven-labs-stt", stream=stream),
        form("eleven-labs-sts", voice="adam", stream=stream),
    ):
        async with http.post(f"{url}/api/v1/task", data=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
    assert not stored_uploads()


async def test_audio_of_a_form_is_deleted_when_the_task_fails(
    http: aiohttp.ClientSession, rest_url: str, keys: Keys, reset_upstream: FaultUpstream, stored_uploads: Any
) -> None:
    reset_upstream.script(error_reply(400))
    headers = {"Authorization": f"Bearer {keys.live}"}
    async with http.post(f"{rest_url}/api/v1/task", data=form("eleven-labs-stt"), headers=headers) as answer:
        assert answer.status == 502
    assert not stored_uploads()


async def test_audio_of_a_form_is_deleted_when_the_caller_disconnects(
    http: aiohttp.ClientSession,
    rest_url: str,
    keys: Keys,
    reset_upstream: FaultUpstream,
    app: App,
    stored_uploads: Any,
) -> None:
    gate = Gate()
    reset_upstream.script(Transcript(before=(gate,)))
    headers = {"Authorization": f"Bearer {keys.live}"}
    caller = asyncio.create_task(
        http.post(f"{rest_url}/api/v1/task", data=form("eleven-labs-stt"), headers=headers)
    )
    await gate.reached.wait()
    assert len(stored_uploads()) == 1
    caller.cancel()
    async with asyncio.timeout(5):
        await app.draining.idle()
    assert not stored_uploads()


async def test_audio_uploaded_over_grpc_can_be_used_by_the_next_task(
    channel: grpc.aio.Channel, keys: Keys, stored_uploads: Any
) -> None:
    stub, tasks = MediaServiceStub(channel), TaskServiceStub(channel)
    chunks = [UploadMediaRequest(content_type="audio/ogg"), UploadMediaRequest(chunk=AUDIO)]
    uploaded = await stub.UploadMedia(iter(chunks), metadata=bearer(keys.live))
    task = Task(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.media_id
    for _ in range(2):
        await tasks.RunTask(RunTaskRequest(task=task), metadata=bearer(keys.live))
    (path,) = stored_uploads()
    path.unlink()


async def test_the_output_of_a_task_is_not_deleted(
    http: aiohttp.ClientSession, rest_url: str, keys: Keys, reset_upstream: FaultUpstream
) -> None:
    reset_upstream.script(Speech(size=100_000))
    headers = {"Authorization": f"Bearer {keys.live}"}
    async with http.post(
        f"{rest_url}/api/v1/task", data=form("eleven-labs-sts", voice="adam"), headers=headers
    ) as answer:
        url = (await answer.json())["audio"]["url"]
    async with http.get(url) as answer:
        assert answer.status == 200
        assert len(await answer.read()) >= 100_000
