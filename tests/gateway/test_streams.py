"""Streams of a service that is played by the test: their ends, their headers, and comments in silence."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
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
from tests.gateway.door import Door, words

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
FLUX = {"model": "flux-1-pro", "prompt": "a lake"}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
COMMENT = b": keep-alive\n\n"

STARTED = Event(started=TaskStarted(id="task_7", model="gpt-4"))
WORD = words("one")[0]
AUDIO = Event(audio_chunk=speech_pb2.AudioChunk(data=b"one", content_type="audio/mpeg"))
PROGRESS = Event(image_progress=image_pb2.ImageProgress(progress=0.5))


class Played:
    """A task service whose streams are `events`, and after them `failure` if there is one."""

    def __init__(self, *events: Event, failure: Exception | None = None) -> None:
        self.events = events
        self.failure = failure
        self.tasks: list[Task] = []

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[Event]]:
        """Streams the events."""
        self.tasks.append(task)

        async def play() -> AsyncIterator[Event]:
            for event in self.events:
                yield event
                await asyncio.sleep(0)
            if self.failure is not None:
                raise self.failure

        yield play()


@asynccontextmanager
async def asked(door: Door, tasks: Any, body: Any, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer of a gateway before `tasks` to a task."""
    services = replace(door.services, tasks=tasks)
    given = door.headers | headers
    async with (
        open_rest(services, GatewayOptions(), "127.0.0.1", 0) as (host, port),
        door.http.post(f"http://{host}:{port}/api/v1/task", json=body, headers=given) as answer,
    ):
        yield answer


# --- ends


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (HI, [STARTED, WORD]),
        ({**TTS, "stream": True}, [STARTED, AUDIO]),
        ({**FLUX, "stream": True}, [STARTED, PROGRESS]),
    ],
    ids=["text", "speech", "image"],
)
async def test_a_stream_without_its_last_event_ends_with_an_error_event(
    door: Door, body: dict[str, Any], events: list[Event]
) -> None:
    async with asked(door, Played(*events), body) as answer:
        assert answer.status == 200
        *_, last = (await answer.text()).removesuffix("\n\n").split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "internal_error"


@pytest.mark.parametrize("events", [[], [STARTED]], ids=["nothing", "its beginning"])
@pytest.mark.parametrize("accept", ["application/json", "audio/*"])
async def test_a_stream_that_ends_before_it_says_anything_is_an_ordinary_error(
    door: Door, events: list[Event], accept: str
) -> None:
    body = {**TTS, "stream": accept == "application/json"}
    async with asked(door, Played(*events), body, Accept=accept) as answer:
        assert answer.status == 500
        assert (await answer.json())["error"]["code"] == "internal_error"


@pytest.mark.parametrize("failure", [None, ZeroDivisionError()], ids=["no result", "a fault"])
async def test_raw_audio_without_its_end_can_not_look_complete(door: Door, failure: Exception | None) -> None:
    async with asked(door, Played(STARTED, AUDIO, failure=failure), TTS, Accept="audio/*") as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_raw_audio_of_no_bytes_is_a_failure_of_the_provider(door: Door) -> None:
    end = Event(result=TaskResult(id="speech_1"))
    end.result.speech.SetInParent()
    async with asked(door, Played(STARTED, end), TTS, Accept="audio/*") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (502, "provider_failed")


async def test_a_stream_that_has_ended_sends_no_comments_into_the_next_one(
    opened: OpenDoor, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        await go_on.wait()
        for event in words("one", "two"):
            yield event

    async with opened(keep_alive=0.05) as door:
        one = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1))
        async with asyncio.timeout(10), one:
            async with one.post(f"{door.url}/api/v1/task", headers=door.headers, json=HI) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            door.player.script = script
            async with one.post(f"{door.url}/api/v1/task", headers=door.headers, json=HI) as answer:
                for _ in range(4):
                    assert await answer.content.readuntil(b"\n\n") == COMMENT
                go_on.set()
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        gc.collect()  # a failure in the background is logged when it is freed
    assert not caplog.records


# --- what a stream's beginning says


async def test_every_chunk_has_the_id_and_the_adjustments_of_the_task_are_a_header(door: Door) -> None:
    started = Event(started=TaskStarted(id="task_7", model="gpt-4"))
    started.started.created.seconds = 1234567890
    started.started.adjustments.append(Adjustment(field="stop"))
    started.started.adjustments.append(Adjustment(field="temperature", used="1"))
    async with asked(door, Played(started, *words("one")), HI) as answer:
        assert answer.headers["X-Pomelo-Adjusted"] == "stop; temperature=1"
        *chunks, done = (await answer.text()).removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    values = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert {(value["id"], value["created"], value["model"]) for value in values} == {
        ("task_7", 1234567890, "gpt-4")
    }


# --- the bytes themselves


@pytest.mark.parametrize(
    ("given", "accept", "used"),
    [
        ({}, "image/webp", ImageFormat.IMAGE_FORMAT_WEBP),
        ({"output_format": "jpeg"}, "image/webp", ImageFormat.IMAGE_FORMAT_JPEG),
        ({"output_format": "jpeg"}, "image/*", ImageFormat.IMAGE_FORMAT_JPEG),
        ({}, "image/*", ImageFormat.IMAGE_FORMAT_UNSPECIFIED),
    ],
)
async def test_an_accepted_type_is_the_format_of_an_image_unless_the_task_names_one(
    door: Door, given: dict[str, str], accept: str, used: int
) -> None:
    tasks = Played(STARTED, Event(result=TaskResult()))
    tasks.events[-1].result.image.images.add(data=b"image", content_type="image/x")
    async with asked(door, tasks, {**FLUX, **given}, Accept=accept) as answer:
        assert (answer.content_type, await answer.read()) == ("image/x", b"image")
    assert tasks.tasks[0].image.output_format == used


@pytest.mark.parametrize(("body", "accept"), [(TTS, "audio/*"), (FLUX, "image/png")])
async def test_media_that_is_sent_raw_is_not_stored(door: Door, body: dict[str, Any], accept: str) -> None:
    before = set(door.media.folder.iterdir())
    async with door.ask(body, headers={"Accept": accept}) as answer:
        assert await answer.read()
    assert set(door.media.folder.iterdir()) == before


# --- comments in silence


async def test_a_comment_comes_only_after_a_silence(opened: OpenDoor) -> None:
    loop = asyncio.get_running_loop()
    spoke: list[float] = []

    async def script(job: Job) -> AsyncIterator[Event]:
        for event in words(*["word"] * 12):
            spoke.append(loop.time())
            yield event
            await asyncio.sleep(0.03)  # a busy stream

    async with opened(keep_alive=0.2) as door, asyncio.timeout(10):
        door.player.script = script
        async with door.ask(HI) as answer:
            heard = 0
            while line := await answer.content.readline():
                heard += line.startswith(b"data: ")
                # However busy this machine is, the interval lies between an event and the comment behind it.
                assert line != COMMENT[:-1] or loop.time() - spoke[heard - 1] > 0.19


async def test_a_comment_comes_soon_after_the_silence_has_lasted(opened: OpenDoor) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        await asyncio.sleep(0.05)  # so that the silence is younger than the stream
        yield WORD
        await end.wait()
        for event in words():
            yield event

    async with opened(keep_alive=0.6) as door, asyncio.timeout(10):
        door.player.script = script
        async with door.ask(HI) as answer:
            await answer.content.readuntil(b"\n\n")
            spoke = loop.time()
            assert await answer.content.readuntil(b"\n\n") == COMMENT
            assert loop.time() - spoke < 1.05
            end.set()
            await answer.read()


async def test_a_client_that_reads_nothing_gets_no_comments(opened: OpenDoor) -> None:
    made = 0
    enough = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        nonlocal made
        while not enough.is_set():
            yield words("x" * 50_000)[0]
            made += 1
        for event in words():
            yield event

    async with opened(keep_alive=0.1, write_timeout=60) as door:
        door.player.script = script
        body = json.dumps(HI).encode()
        reader, writer = await asyncio.open_connection(door.host, door.port, limit=1)
        writer.write(
            f"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: {door.headers['Authorization']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        try:
            async with asyncio.timeout(20):
                before = -1
                while not made or before < made:
                    before = made
                    await asyncio.sleep(0.2)
                await asyncio.sleep(0.5)  # the time in which comments would be due
                enough.set()
                got = b""
                while piece := await reader.read(1 << 20):
                    got += piece
        finally:
            writer.transport.abort()
        assert b"data: [DONE]" in got
        assert got.count(COMMENT) < 3
