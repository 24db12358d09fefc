"""The events that a provider may yield for each task type, and those for which its task fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageOutput, ImageProgress
from pomelo.gen.v1.speech_pb2 import AudioChunk, Transcription
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskStarted
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    FinishReason,
    ImagePart,
    Message,
    Role,
    TextDelta,
    TextOutput,
    ToolCall,
    ToolCallDelta,
)
from pomelo.providers.base import Job
from pomelo.providers.chunks import MAX_AUDIO_BYTES, MAX_TEXT_CHARS
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.guard import MAX_TOOL_CALLS, GuardedEvents
from pomelo.providers.http.client import MAX_BODY_BYTES
from pomelo.providers.text import completed_text
from pomelo.testing.samples import sample

STOP = FinishReason.FINISH_REASON_STOP
WORD = TaskEvent(text_delta=TextDelta(text="Hi"))
TEXT = completed_text("", STOP, None)
PROGRESS = TaskEvent(image_progress=ImageProgress(progress=0.5))
IMAGE = TaskEvent(
    completed=TaskResult(image=ImageOutput(images=[GeneratedImage(data=b"x", content_type="image/png")]))
)
TRANSCRIPT = TaskEvent(completed=TaskResult(transcription=Transcription(text="Hi")))
AUDIO = TaskEvent(audio_chunk=AudioChunk(data=b"x", content_type="audio/mpeg"))
AN_IMAGE = ContentPart(image=ImagePart())
A_CALL = ContentPart(tool_call=ToolCall(id="call_1", name="weather"))


def piece(index: int, arguments: str = "", **first: str) -> TaskEvent:
    """A piece of a tool call; `first` are the id and the name in its first piece."""
    return TaskEvent(tool_call_delta=ToolCallDelta(index=index, arguments_json=arguments, **first))


FIRST = piece(0, id="call_1", name="weather")
SECOND = piece(1, "{}", id="call_2", name="weather")
LATE = "yielded a piece of tool call {} too early"
UNUSABLE = "yielded a tool call without a usable id and name"


def calling(call_id: str, size: int) -> ContentPart:
    """A tool call with so many characters of arguments."""
    return ContentPart(tool_call=ToolCall(id=call_id, name="weather", arguments_json="x" * size))


def message(*parts: ContentPart, role: Any = Role.ROLE_ASSISTANT) -> TaskEvent:
    """A text whose last event has a message of these parts."""
    output = TextOutput(message=Message(role=role, content=parts), finish_reason=STOP)
    return TaskEvent(completed=TaskResult(text=output))


async def guarded(task_type: str, *yielded: TaskEvent, stream: bool = True) -> list[TaskEvent]:
    """The events that pass the guard."""

    async def method(job: Job[Any]) -> AsyncGenerator[TaskEvent, None]:
        for event in yielded:
            yield event

    job = replace(sample(task_type, Route("acme", "large")), stream=stream)
    return [event async for event in GuardedEvents(method, task_type, job)]


async def failure(error: PomeloError) -> UpstreamError:
    """What the guard raises when a plug-in raises this error."""

    async def method(job: Job[Any]) -> AsyncGenerator[TaskEvent, None]:
        raise error
        yield WORD

    with pytest.raises(UpstreamError) as raised:
        await anext(GuardedEvents(method, "text", sample("text", Route("acme", "large"))))
    return raised.value


@pytest.mark.parametrize(
    ("task_type", "events"),
    [
        ("text", [WORD, WORD, TEXT]),
        ("text", [TEXT]),
        ("text", [WORD, message(ContentPart(text=" there"))]),
        ("text", [message(ContentPart(text="a"), ContentPart(text="b"))]),
        ("text", [message()]),
        ("text", [message(A_CALL)]),
        ("text", [message(ContentPart(text="Hi"), A_CALL)]),
        ("text", [WORD, FIRST, piece(0, '{"a":'), SECOND, piece(0, "1}"), WORD, TEXT]),
        ("text", [piece(0, id="call_2", name="x"), message(A_CALL)]),
        ("image", [PROGRESS, IMAGE]),
        ("image", [IMAGE]),
        ("speech_to_text", [TRANSCRIPT]),
        ("text_to_speech", [AUDIO, AUDIO]),
        ("speech_to_speech", [AUDIO]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_events_of_a_task_type_are_passed_on_unchanged(
    task_type: str, events: list[TaskEvent], stream: bool
) -> None:
    assert await guarded(task_type, *events, stream=stream) == events


@pytest.mark.parametrize(
    ("task_type", "events", "logged"),
    [
        ("text", [WORD, TEXT, WORD], "yielded an event after the last one"),
        ("text", [TEXT, TEXT], "yielded an event after the last one"),
        ("image", [IMAGE, PROGRESS], "yielded an event after the last one"),
        ("speech_to_text", [TRANSCRIPT, TRANSCRIPT], "yielded an event after the last one"),
        ("text", [WORD, TaskEvent()], "yielded an empty event for a task of type text"),
        ("text", [TaskEvent(started=TaskStarted())], "yielded started for a task of type text"),
        ("text", [AUDIO], "yielded audio_chunk for a task of type text"),
        ("image", [WORD], "yielded text_delta for a task of type image"),
        ("text_to_speech", [TEXT], "yielded completed for a task of type text_to_speech"),
        ("speech_to_speech", [TRANSCRIPT], "yielded completed for a task of type speech_to_speech"),
        ("text", [TaskEvent(completed=TaskResult())], "yielded a result with no output"),
        ("text", [IMAGE], "yielded a result with image"),
        ("image", [TRANSCRIPT], "yielded a result with transcription"),
        ("speech_to_text", [TEXT], "yielded a result with text"),
        (
            "text",
            [TaskEvent(completed=TaskResult(text=TextOutput()))],
            "yielded a text without its finish_reason",
        ),
        ("text", [completed_text("", 77, None)], "yielded the unknown finish_reason 77"),  # type: ignore[arg-type]
        (
            "text",
            [message(ContentPart(text="Hi"), role=Role.ROLE_USER)],
            "yielded a message of the role 2 instead of the assistant's",
        ),
        ("text", [message(role=0)], "yielded a message of the role 0 instead of the assistant's"),
        ("text", [message(ContentPart(text="Hi"), AN_IMAGE)], "yielded a message with image"),
        ("text", [message(ContentPart())], "yielded a message with an empty part"),
        ("text", [message(A_CALL, ContentPart(text="Hi"))], "yielded a message with text after a tool call"),
        ("text", [message(A_CALL, A_CALL)], "yielded two tool calls with the same id"),
        ("text", [FIRST, message(A_CALL)], "yielded two tool calls with the same id"),
        ("text", [message(ContentPart(tool_call=ToolCall(id="call_1")))], UNUSABLE),
        ("text", [message(ContentPart(tool_call=ToolCall(name="weather")))], UNUSABLE),
        ("text", [piece(0, "{}")], UNUSABLE),
        ("text", [piece(0, id="x" * 257, name="weather")], UNUSABLE),
        ("text", [piece(0, id="x", name="y" * 257)], UNUSABLE),
        ("text", [SECOND], LATE.format(1)),
        ("text", [FIRST, piece(2)], LATE.format(2)),
        ("text", [FIRST, piece(-1)], LATE.format(-1)),
        ("text", [FIRST, FIRST], "yielded the beginning of a tool call twice"),
        ("image", [FIRST], "yielded tool_call_delta for a task of type image"),
        (
            "text",
            [piece(index, id=f"call_{index}", name="x") for index in range(MAX_TOOL_CALLS + 1)],
            "yielded more than 99 tool calls",
        ),
        (
            "text",
            [FIRST, *[piece(0, "x" * MAX_TEXT_CHARS)] * (MAX_BODY_BYTES // MAX_TEXT_CHARS + 1)],
            "yielded tool calls with more than 8,388,608 characters",
        ),
        (
            "text",
            [message(calling("call_1", MAX_BODY_BYTES), calling("call_2", 1))],
            "yielded tool calls with more than 8,388,608 characters",
        ),
        *[
            (
                "text_to_speech",
                [TaskEvent(audio_chunk=AudioChunk(data=b"x", content_type=content_type))],
                "yielded media of a content_type that is not audio/*",
            )
            for content_type in ("text/html", "audio/mpeg\r\nx: y")
        ],
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_any_other_event_is_logged_and_fails_the_task(
    caplog: pytest.LogCaptureFixture, task_type: str, events: list[TaskEvent], logged: str, stream: bool
) -> None:
    with pytest.raises(PomeloError) as raised:
        await guarded(task_type, *events, stream=stream)
    assert raised.value.code == "provider_failed"
    assert [record.getMessage() for record in caplog.records] == [f"request : the provider acme {logged}"]


async def test_empty_audio_is_dropped_and_the_next_gets_its_content_type() -> None:
    empty, first = AudioChunk(content_type="audio/ogg"), AudioChunk(data=b"x")
    events = [TaskEvent(audio_chunk=chunk) for chunk in (empty, first, first)]
    passed = await guarded("text_to_speech", *events)
    assert passed == [TaskEvent(audio_chunk=AudioChunk(data=b"x", content_type="audio/ogg")), events[2]]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_large_chunk_of_audio_is_split_and_the_first_part_has_its_content_type(stream: bool) -> None:
    data = b"x" * MAX_AUDIO_BYTES
    chunk = AudioChunk(data=data + b"yz", content_type="audio/mpeg")
    passed = await guarded("text_to_speech", TaskEvent(audio_chunk=chunk), stream=stream)
    parts = [AudioChunk(data=data, content_type="audio/mpeg"), AudioChunk(data=b"yz")]
    assert passed == [TaskEvent(audio_chunk=part) for part in parts]


async def test_a_long_text_at_the_end_of_a_stream_is_split() -> None:
    text = "x" * MAX_TEXT_CHARS + "y"
    delta, last = await guarded("text", completed_text(text, STOP, None))
    assert delta.text_delta.text == "x" * MAX_TEXT_CHARS
    assert last == completed_text("y", STOP, None)


async def test_a_long_text_of_a_whole_response_is_not_split() -> None:
    event = completed_text("x" * (MAX_TEXT_CHARS + 1), STOP, None)
    assert await guarded("text", event, stream=False) == [event]


async def test_long_arguments_in_a_piece_of_a_stream_are_split() -> None:
    arguments = "x" * MAX_TEXT_CHARS + "y"
    call = {"id": "call_2", "name": "weather"}
    _, first, second, _ = await guarded("text", FIRST, piece(1, arguments, **call), TEXT)
    assert first == piece(1, "x" * MAX_TEXT_CHARS, **call)
    assert second == piece(1, "y")


async def test_a_long_text_at_the_end_of_a_stream_keeps_its_tool_calls() -> None:
    delta, last = await guarded("text", message(ContentPart(text="x" * (MAX_TEXT_CHARS + 1)), A_CALL))
    assert delta.text_delta.text == "x" * MAX_TEXT_CHARS
    assert last == message(ContentPart(text="x"), A_CALL)


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, KeyError])
async def test_whatever_a_plug_in_raises_while_it_is_closed_is_logged(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    async def method(job: Job[Any]) -> AsyncGenerator[TaskEvent, None]:
        try:
            yield WORD
        finally:
            raise error

    events = GuardedEvents(method, "text", sample("text", Route("acme", "large")))
    assert await anext(events) == WORD
    await events.aclose()
    assert "the provider acme failed unexpectedly while it was closed" in caplog.text


@pytest.mark.parametrize(
    ("given", "passed"),
    [(None, None), (0, 0), (3600, 3600), (3601, None), (10**9, None), (-1, None), (1.5, None), (True, None)],
)
async def test_only_a_usable_retry_after_of_a_plug_in_is_passed_on(given: Any, passed: int | None) -> None:
    policy = RetryPolicy.SAME_ROUTE
    error = await failure(
        UpstreamError("provider_unavailable", "Busy", field="model", retry=policy, wait=given)
    )
    assert (error.code, error.message, error.field) == ("provider_unavailable", "Busy", "model")
    assert error.retry is RetryPolicy.SAME_ROUTE
    assert error.wait == passed
    assert type(error.wait) is type(passed)


@pytest.mark.parametrize(
    ("reason", "vendor_code", "logged"),
    [("too long", "E1", ("too long", "E1")), (None, 7, ("", ""))],
    ids=["texts", "no texts"],
)
async def test_an_error_of_a_plug_ins_own_class_keeps_what_is_logged(
    reason: Any, vendor_code: Any, logged: tuple[str, str]
) -> None:
    class OwnError(UpstreamError):
        """An error that may override anything."""

    own = OwnError("provider_failed")
    own.reason, own.vendor_code = reason, vendor_code  # type: ignore[misc]
    error = await failure(own)
    assert (error.reason, error.vendor_code) == logged


@pytest.mark.parametrize("message", ["Use a shorter prompt", " "])
async def test_an_error_of_a_plug_ins_own_class_keeps_its_code_message_and_field(message: str) -> None:
    class OwnError(PomeloError):
        """An error that may override anything."""

    error = await failure(OwnError("invalid_parameter", message, field="prompt"))
    assert (error.code, error.field, error.retry) == ("invalid_parameter", "prompt", RetryPolicy.NEVER)
    assert error.message == (message.strip() or TABLE["invalid_parameter"].message)


async def test_an_error_with_a_row_that_is_not_in_the_table_fails_the_task() -> None:
    error = PomeloError("content_policy_violation")
    error.row = replace(error.row, http=401)  # type: ignore[misc]
    assert (await failure(error)).row is TABLE["provider_failed"]
