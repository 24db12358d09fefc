"""Streams of events: what each task type sends, and how a stream fails and ends."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Adjustment
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import AUDIO, PNG, GatewayApp
from tests.gateway.requests import FLUX, HI, STT, TTS, code_of, events, events_of
from tests.gateway.scripts import STARTED, ScriptedTasks, audio, play, progress, text_events, word

STREAM = {**HI, "stream": True}


# --- the events of each task type


async def test_a_text_stream_is_chunks_then_usage_then_done(gateway: GatewayApp) -> None:
    async with gateway.post_task(STREAM) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["X-Pomelo-Mode"] == "test"
        *chunks, last = [data for _, data in events(await response.read())]
    assert last == "[DONE]"
    assert len({c["id"] for c in chunks}) == 1
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == 'Hello "wörld"\n'
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert all("usage" not in c for c in chunks[:-1])


async def test_a_text_stream_is_sent_word_by_word(gateway: GatewayApp) -> None:
    words = "one", "two", "three"
    received = [asyncio.Event() for _ in words]
    *pieces, last = text_events(*words)
    steps: list[Any] = []
    for piece, each in zip(pieces, received, strict=True):
        steps += [piece, each.wait]
    gateway.provider.script = play(*steps, last)
    async with gateway.post_task(STREAM) as response:
        for text, each in zip(words, received, strict=True):
            assert f'"content":"{text}"'.encode() in await response.content.readuntil(b"\n\n")
            each.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_an_audio_stream_is_chunks_then_the_object_without_base64(gateway: GatewayApp) -> None:
    *chunks, final, done = [data for _, data in await events_of(gateway.post_task({**TTS, "stream": True}))]
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"speech.generation.chunk"}
    sent = b"".join(base64.b64decode(c["audio"]["b64_json"]) for c in chunks)
    assert final["object"] == "speech.generation"
    assert set(final["audio"]) == {"url"}
    async with gateway.http.get(final["audio"]["url"]) as link:
        assert await link.read() == sent == AUDIO


async def test_an_image_stream_is_progress_then_the_image(gateway: GatewayApp) -> None:
    *steps, final, done = [data for _, data in await events_of(gateway.post_task({**FLUX, "stream": True}))]
    assert done == "[DONE]"
    assert [(p["object"], p["progress"]) for p in steps] == [
        ("image.progress", 0.25),
        ("image.progress", 1.0),
    ]
    assert final["object"] == "image.generation"
    assert base64.b64decode(final["data"][0]["b64_json"]) == PNG


async def test_a_transcript_stream_is_the_transcript(gateway: GatewayApp) -> None:
    body = {**STT, "audio": base64.b64encode(AUDIO).decode(), "stream": True}
    final, done = [data for _, data in await events_of(gateway.post_task(body))]
    assert (final["object"], final["words"], done) == (
        "speech.transcription",
        [{"text": "hi", "start": 0.0, "end": 0.5, "speaker": None}],
        "[DONE]",
    )


async def test_every_chunk_has_the_task_id_and_adjustments_are_a_header(gateway: GatewayApp) -> None:
    started = Event()
    started.CopyFrom(STARTED)
    started.started.create_time.seconds = 1234567890
    started.started.adjustments.append(Adjustment(field="stop"))
    started.started.adjustments.append(Adjustment(field="temperature", used="1"))
    async with (
        gateway.over(tasks=ScriptedTasks(started, *text_events("one"))) as scripted,
        scripted.post_task(STREAM) as response,
    ):
        assert response.headers["X-Pomelo-Adjusted"] == "stop; temperature=1"
        *chunks, done = [data for _, data in events(await response.read())]
    assert done == "[DONE]"
    assert {(value["id"], value["created"], value["model"]) for value in chunks} == {
        ("task_7", 1234567890, "gpt-4")
    }


async def test_an_event_that_is_newer_than_the_gateway_is_skipped(gateway: GatewayApp) -> None:
    unknown = Event.FromString(b"\xfa\x07\x00")  # field 127
    first, last = text_events("one")
    async with gateway.over(tasks=ScriptedTasks(STARTED, unknown, first, unknown, last)) as scripted:
        *chunks, done = [data for _, data in await events_of(scripted.post_task(STREAM))]
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": "one"}, {}]


# --- failures


async def test_a_stream_that_fails_before_its_first_event_is_an_ordinary_error(gateway: GatewayApp) -> None:
    gateway.provider.script = play(PomeloError("provider_unavailable"))
    assert await code_of(gateway.post_task(STREAM)) == (503, "provider_unavailable")


@pytest.mark.parametrize(
    ("body", "first", "code"),
    [(HI, word(), "provider_failed"), (FLUX, progress(0.5), "content_policy_violation")],
)
async def test_a_stream_that_fails_later_ends_with_an_error_event_and_no_done(
    gateway: GatewayApp, body: dict[str, Any], first: Event, code: str
) -> None:
    gateway.provider.script = play(first, PomeloError(code))
    received = await events_of(gateway.post_task({**body, "stream": True}))
    assert [name for name, _ in received] == ["message", "error"]
    assert received[-1][1]["error"]["code"] == code
    assert "[DONE]" not in [data for _, data in received]


async def test_an_internal_error_in_a_stream_is_an_error_event_and_logged_once(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.provider.script = play(word(), ZeroDivisionError())
    received = await events_of(gateway.post_task(STREAM, headers={"X-Request-Id": "req-find-me"}))
    assert received[-1][1]["error"]["code"] == "internal_error"
    (record,) = caplog.records
    first, *frames = record.getMessage().splitlines()
    assert (first, frames[-1]) == ("request req-find-me failed unexpectedly", "builtins.ZeroDivisionError")
    caplog.clear()
    assert await code_of(gateway.post_task(HI)) == (500, "internal_error")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), ZeroDivisionError()], ids=repr)
async def test_a_task_service_that_fails_unexpectedly_while_the_client_stays_is_an_internal_error(
    gateway: GatewayApp, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway.over(tasks=ScriptedTasks(STARTED, word(), error)) as scripted:
        received = await events_of(scripted.post_task(STREAM))
    assert [name for name, _ in received] == ["message", "error"]
    assert received[-1][1]["error"]["code"] == "internal_error"
    assert len(caplog.records) == 1
    async with gateway.over(tasks=ScriptedTasks(STARTED, error)) as scripted:
        assert await code_of(scripted.post_task(STREAM)) == (500, "internal_error")
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("body", "first"),
    [(HI, word()), (TTS, audio(b"one")), (FLUX, progress(0.5))],
    ids=["text", "speech", "image"],
)
async def test_a_stream_without_its_last_event_ends_with_an_error_event(
    gateway: GatewayApp, body: dict[str, Any], first: Event
) -> None:
    async with gateway.over(tasks=ScriptedTasks(STARTED, first)) as scripted:
        *_, (name, data) = await events_of(scripted.post_task({**body, "stream": True}))
    assert (name, data["error"]["code"]) == ("error", "internal_error")


@pytest.mark.parametrize("begin", [(), (STARTED,)], ids=["nothing", "its beginning"])
@pytest.mark.parametrize("accept", ["application/json", "audio/*"])
async def test_a_stream_that_ends_before_its_first_event_is_an_ordinary_error(
    gateway: GatewayApp, begin: tuple[Event, ...], accept: str
) -> None:
    body = {**TTS, "stream": accept == "application/json"}
    async with gateway.over(tasks=ScriptedTasks(*begin)) as scripted:
        sent = scripted.post_task(body, headers={"Accept": accept})
        assert await code_of(sent) == (500, "internal_error")


async def test_a_deadline_before_the_first_event_is_a_504_and_after_it_an_error_event(
    gateway: GatewayApp,
) -> None:
    async def script(job: Job[Any]) -> AsyncIterator[Event]:
        if job.user == "talks":
            yield word()
        await asyncio.Event().wait()

    gateway.provider.script = script
    soon = {"X-Request-Timeout": "0.6"}
    for body in (STREAM, HI):
        assert await code_of(gateway.post_task(body, headers=soon)) == (504, "deadline_exceeded")
    received = await events_of(gateway.post_task({**STREAM, "user": "talks"}, headers=soon))
    assert received[-1][1]["error"]["code"] == "deadline_exceeded"
    assert gateway.provider.closed.is_set()


@pytest.mark.parametrize("body", [HI, STREAM, {**TTS, "stream": True}, FLUX])
@pytest.mark.parametrize("accept", ["application/json", "image/*, audio/*"])
async def test_a_disconnect_closes_the_provider_immediately(
    gateway: GatewayApp, body: dict[str, Any], accept: str
) -> None:
    started = asyncio.Event()
    first = [word()] if "messages" in body else []
    gateway.provider.script = play(*first, started.set, asyncio.Event().wait)
    request_task = asyncio.create_task(gateway.post_task(body, headers={"Accept": accept}).__aenter__())
    await asyncio.wait_for(started.wait(), 20)
    if body.get("stream") and first:
        (await request_task).close()
    else:
        request_task.cancel()
        await asyncio.wait([request_task])
    left = asyncio.get_running_loop().time()
    await asyncio.wait_for(gateway.provider.closed.wait(), 20)
    assert asyncio.get_running_loop().time() - left < 5
