"""What a form brought is deleted with its task; what was uploaded by name stays for the next one."""

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
from pomelo.testing.elevenlabs_wire import error_reply
from tests.calls import bearer
from tests.conftest import Keys

SOUND = b"OggS" + b"a sound of some length " * 20_000


@pytest.fixture
def kept(settings: Settings) -> Any:
    """The uploads that are kept, by their size."""

    def look() -> set[Path]:
        return {path for path in (settings.data / "media").iterdir() if path.stat().st_size == len(SOUND)}

    before = look()
    return lambda: look() - before


@pytest.fixture
async def alone(upstream: FaultUpstream) -> AsyncIterator[FaultUpstream]:
    """The playing vendors, without what other tests left, and left so."""
    upstream.reset()
    yield upstream
    upstream.reset()


def form(model: str, **fields: str) -> aiohttp.FormData:
    """A form with the sound."""
    made = aiohttp.FormData({"model": model, **fields})
    made.add_field("audio", SOUND, filename="a.ogg", content_type="audio/ogg")
    return made


@pytest.mark.parametrize("remote", [False, True], ids=["rest", "remote"])
@pytest.mark.parametrize("live", [False, True], ids=["test key", "live key"])
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_forms_sound_is_deleted_with_its_task(
    remote: bool,
    live: bool,
    stream: str,
    http: aiohttp.ClientSession,
    rest_url: str,
    gateway_url: str,
    keys: Keys,
    kept: Any,
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
    assert not kept()


async def test_it_is_deleted_when_the_task_fails(
    http: aiohttp.ClientSession, rest_url: str, keys: Keys, alone: FaultUpstream, kept: Any
) -> None:
    alone.script(error_reply(400))
    headers = {"Authorization": f"Bearer {keys.live}"}
    async with http.post(f"{rest_url}/api/v1/task", data=form("eleven-labs-stt"), headers=headers) as answer:
        assert answer.status == 502
    assert not kept()


async def test_it_is_deleted_when_the_caller_leaves(
    http: aiohttp.ClientSession, rest_url: str, keys: Keys, alone: FaultUpstream, app: App, kept: Any
) -> None:
    gate = Gate()
    alone.script(Transcript(before=(gate,)))
    headers = {"Authorization": f"Bearer {keys.live}"}
    caller = asyncio.create_task(
        http.post(f"{rest_url}/api/v1/task", data=form("eleven-labs-stt"), headers=headers)
    )
    await gate.reached.wait()
    assert len(kept()) == 1
    caller.cancel()
    async with asyncio.timeout(5):
        await app.draining.idle()
    assert not kept()


async def test_what_was_uploaded_by_name_stays_for_the_next_task(
    channel: grpc.aio.Channel, keys: Keys, kept: Any
) -> None:
    stub, tasks = MediaServiceStub(channel), TaskServiceStub(channel)
    pieces = [UploadMediaRequest(content_type="audio/ogg"), UploadMediaRequest(chunk=SOUND)]
    uploaded = await stub.UploadMedia(iter(pieces), metadata=bearer(keys.live))
    task = Task(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.media_id
    for _ in range(2):
        await tasks.RunTask(RunTaskRequest(task=task), metadata=bearer(keys.live))
    (path,) = kept()
    path.unlink()


async def test_what_a_task_made_is_not_deleted(
    http: aiohttp.ClientSession, rest_url: str, keys: Keys, alone: FaultUpstream
) -> None:
    alone.script(Speech(size=100_000))
    headers = {"Authorization": f"Bearer {keys.live}"}
    async with http.post(
        f"{rest_url}/api/v1/task", data=form("eleven-labs-sts", voice="adam"), headers=headers
    ) as answer:
        made = (await answer.json())["audio"]["url"]
    async with http.get(made) as answer:
        assert answer.status == 200
        assert len(await answer.read()) >= 100_000
