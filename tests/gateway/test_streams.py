"""Streams of a scripted task service: their ends, their headers, and keep-alive comments."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway.app import open_rest
from gateway.state import GatewayOptions
from pomelo.call import Call
from pomelo.gen.v1 import image_pb2, speech_pb2
from pomelo.gen.v1.image_pb2 import ImageFormat
from pomelo.gen.v1.task_pb2 import Adjustment, Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.gen.v1.task_service_pb2 import TaskStarted
from pomelo.providers.base import Job
from tests.gateway.gateway_app import GatewayApp, OpenApp, text_events

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
FLUX = {"model": "flux-1-pro", "prompt": "a lake"}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
COMMENT = b": keep-alive\n\n"

STARTED = Event(started=TaskStarted(id="task_7", model="gpt-4"))
WORD = text_events("one")[0]
AUDIO_EVENT = Event(audio_chunk=speech_pb2.AudioChunk(data=b"one", content_type="audio/mpeg"))
PROGRESS = Event(image_progress=image_pb2.ImageProgress(progress=0.5))


class ScriptedTasks:
    """A task service whose streams yield `events`, and then raise `failure` if it is not None."""

    def __init__(self, *events: Event, failure: Exception | None = None) -> None:
        self.events = events
        self.failure = failure
        self.tasks: list[Task] = []

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[Event]]:
        """Streams the events."""
        self.tasks.append(task)

        async def events() -> AsyncIterator[Event]:
            for event in self.events:
                yield event
                await asyncio.sleep(0)
            if self.failure is not None:
                raise self.failure

        yield events()


@asynccontextmanager
async def response_to(
    gateway: GatewayApp, tasks: Any, body: Any, **headers: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yields the response of a gateway over `tasks`."""
    services = replace(gateway.services, tasks=tasks)
    given = gateway.headers | headers
    async with (
        open_rest(services, GatewayOptions(), "127.0.0.1", 0) as (host, port),
        gateway.http.post(f"http://{host}:{port}/api/v1/task", json=body, headers=given) as response,
    ):
        yield response


# --- ends


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (HI, [STARTED, WORD]),
        ({**TTS, "stream": True}, [STARTED, AUDIO_EVENT]),
        ({**FLUX, "stream": True}, [STARTED, PROGRESS]),
    ],
    ids=["text", "speech", "image"],
)
async def test_a_stream_without_its_last_event_ends_with_an_error_event(
    gateway: GatewayApp, body: dict[str, Any], events: list[Event]
) -> None:
    async with response_to(gateway, ScriptedTasks(*events), body) as response:
        assert response.status == 200
        *_, last = (await response.text()).removesuffix("\n\n").split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "internal_error"


@pytest.mark.parametrize("events", [[], [STARTED]], ids=["nothing", "its beginning"])
@pytest.mark.parametrize("accept", ["application/json", "audio/*"])
async def test_a_stream_that_ends_before_its_first_event_is_an_ordinary_error(
    gateway: GatewayApp, events: list[Event], accept: str
) -> None:
    body = {**TTS, "stream": accept == "application/json"}
    async with response_to(gateway, ScriptedTasks(*events), body, Accept=accept) as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == "internal_error"


@pytest.mark.parametrize("failure", [None, ZeroDivisionError()], ids=["no result", "a fault"])
async def test_raw_audio_without_a_result_can_not_look_complete(
    gateway: GatewayApp, failure: Exception | None
) -> None:
    async with response_to(
        gateway, ScriptedTasks(STARTED, AUDIO_EVENT, failure=failure), TTS, Accept="audio/*"
    ) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_empty_raw_audio_is_a_provider_failure(gateway: GatewayApp) -> None:
    end = Event(result=TaskResult(id="speech_1"))
    end.result.speech.SetInParent()
    async with response_to(gateway, ScriptedTasks(STARTED, end), TTS, Accept="audio/*") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "provider_failed")


async def test_a_finished_stream_sends_no_comments_into_the_next_response(
    open_gateway: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    proceed = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        await proceed.wait()
        for event in text_events("one", "two"):
            yield event

    async with open_gateway(keep_alive=0.05) as gateway:
        one = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1))
        async with asyncio.timeout(10), one:
            async with one.post(f"{gateway.url}/api/v1/task", headers=gateway.headers, json=HI) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            gateway.provider.script = script
            async with one.post(f"{gateway.url}/api/v1/task", headers=gateway.headers, json=HI) as response:
                for _ in range(4):
                    assert await response.content.readuntil(b"\n\n") == COMMENT
                proceed.set()
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
        gc.collect()  # a failure in the background is logged when it is freed
    assert not caplog.records


# --- the beginning of a stream


async def test_every_chunk_has_the_task_id_and_adjustments_are_a_header(gateway: GatewayApp) -> None:
    started = Event(started=TaskStarted(id="task_7", model="gpt-4"))
    started.started.created.seconds = 1234567890
    started.started.adjustments.append(Adjustment(field="stop"))
    started.started.adjustments.append(Adjustment(field="temperature", used="1"))
    async with response_to(gateway, ScriptedTasks(started, *text_events("one")), HI) as response:
        assert response.headers["X-Pomelo-Adjusted"] == "stop; temperature=1"
        *chunks, done = (await response.text()).removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    values = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert {(value["id"], value["created"], value["model"]) for value in values} == {
        ("task_7", 1234567890, "gpt-4")
    }


# --- raw media


@pytest.mark.parametrize(
    ("given", "accept", "used"),
    [
        ({}, "image/webp", ImageFormat.IMAGE_FORMAT_WEBP),
        ({"output_format": "jpeg"}, "image/webp", ImageFormat.IMAGE_FORMAT_JPEG),
        ({"output_format": "jpeg"}, "image/*", ImageFormat.IMAGE_FORMAT_JPEG),
        ({}, "image/*", ImageFormat.IMAGE_FORMAT_UNSPECIFIED),
    ],
)
async def test_accept_decides_the_image_format_unless_the_task_names_one(
    gateway: GatewayApp, given: dict[str, str], accept: str, used: int
) -> None:
    tasks = ScriptedTasks(STARTED, Event(result=TaskResult()))
    tasks.events[-1].result.image.images.add(data=b"image", content_type="image/x")
    async with response_to(gateway, tasks, {**FLUX, **given}, Accept=accept) as response:
        assert (response.content_type, await response.read()) == ("image/x", b"image")
    assert tasks.tasks[0].image.output_format == used


@pytest.mark.parametrize(("body", "accept"), [(TTS, "audio/*"), (FLUX, "image/png")])
async def test_raw_media_is_not_stored(gateway: GatewayApp, body: dict[str, Any], accept: str) -> None:
    before = set(gateway.media.folder.iterdir())
    async with gateway.post_task(body, headers={"Accept": accept}) as response:
        assert await response.read()
    assert set(gateway.media.folder.iterdir()) == before


# --- keep-alive comments


async def test_a_comment_is_sent_only_after_silence(open_gateway: OpenApp) -> None:
    loop = asyncio.get_running_loop()
    sent_at: list[float] = []

    async def script(job: Job) -> AsyncIterator[Event]:
        for event in text_events(*["word"] * 12):
            sent_at.append(loop.time())
            yield event
            await asyncio.sleep(0.03)  # a busy stream

    async with open_gateway(keep_alive=0.2) as gateway, asyncio.timeout(10):
        gateway.provider.script = script
        async with gateway.post_task(HI) as response:
            received = 0
            while line := await response.content.readline():
                received += line.startswith(b"data: ")
                # However busy this machine is, the interval lies between an event and the comment behind it.
                assert line != COMMENT[:-1] or loop.time() - sent_at[received - 1] > 0.19


async def test_a_comment_is_sent_soon_after_the_keep_alive_time(open_gateway: OpenApp) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        await asyncio.sleep(0.05)  # so that the silence is younger than the stream
        yield WORD
        await end.wait()
        for event in text_events():
            yield event

    async with open_gateway(keep_alive=0.6) as gateway, asyncio.timeout(10):
        gateway.provider.script = script
        async with gateway.post_task(HI) as response:
            await response.content.readuntil(b"\n\n")
            sent_at = loop.time()
            assert await response.content.readuntil(b"\n\n") == COMMENT
            assert loop.time() - sent_at < 1.05
            end.set()
            await response.read()


async def test_a_client_that_reads_nothing_gets_no_comments(open_gateway: OpenApp) -> None:
    sent = 0
    enough = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        nonlocal sent
        while not enough.is_set():
            yield text_events("x" * 50_000)[0]
            sent += 1
        for event in text_events():
            yield event

    async with open_gateway(keep_alive=0.1, write_timeout=60) as gateway:
        gateway.provider.script = script
        body = json.dumps(HI).encode()
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port, limit=1)
        writer.write(
            f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: {gateway.headers['Authorization']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        try:
            async with asyncio.timeout(20):
                before = -1
                while not sent or before < sent:
                    before = sent
                    await asyncio.sleep(0.2)
                await asyncio.sleep(0.5)  # the time in which comments would be due
                enough.set()
                data_received = b""
                while piece := await reader.read(1 << 20):
                    data_received += piece
        finally:
            writer.transport.abort()
        assert b"data: [DONE]" in data_received
        assert data_received.count(COMMENT) < 3
