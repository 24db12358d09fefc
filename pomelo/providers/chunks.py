"""Splits events so that every client can read them, as lines of server-sent events and as gRPC messages."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.text_pb2 import TextOutput, ToolCall, ToolCallDelta

MAX_TEXT_CHARS = 8 * 1024
"""Characters of text, or of the arguments of a tool call, in one event: at most 48 KiB of JSON, however they
are escaped."""

MAX_AUDIO_BYTES = 64 * 1024
"""Bytes of audio in one event."""


def event_text(event: TaskEvent) -> str:
    """Return the text of a text_delta, or of the message of a `completed`."""
    if event.HasField("completed"):
        return output_text(event.completed.text)
    return event.text_delta.text


def output_text(output: TextOutput) -> str:
    parts = output.message.content
    return parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])


def output_calls(output: TextOutput) -> list[ToolCall]:
    return [part.tool_call for part in output.message.content if part.HasField("tool_call")]


def split_text(event: TaskEvent) -> Iterator[TaskEvent]:
    """Split the text of an event into text deltas. The last part of a `completed` remains in it."""
    text = event_text(event)
    last = (len(text) - 1) // MAX_TEXT_CHARS * MAX_TEXT_CHARS
    for start in range(0, last, MAX_TEXT_CHARS):
        yield text_delta(text[start : start + MAX_TEXT_CHARS])
    if not event.HasField("completed"):
        yield text_delta(text[last:])
        return
    rest = TaskEvent()
    rest.CopyFrom(event)
    content = rest.completed.text.message.content
    del content[:]
    content.add().text = text[last:]
    content.extend([part for part in event.completed.text.message.content if part.HasField("tool_call")])
    yield rest


def text_delta(text: str) -> TaskEvent:
    """Return the event of a piece of text."""
    event = TaskEvent()
    event.text_delta.text = text
    return event


def split_tool_call(call: ToolCall | ToolCallDelta, index: int) -> Iterator[TaskEvent]:
    """Split the tool call `index`, or a piece of it, into deltas; the first has its id and name."""
    arguments = call.arguments_json
    for start in range(0, len(arguments) or 1, MAX_TEXT_CHARS):
        event = TaskEvent()
        delta = event.tool_call_delta
        delta.index = index
        if not start:
            delta.id, delta.name = call.id, call.name
        delta.arguments_json = arguments[start : start + MAX_TEXT_CHARS]
        yield event


def split_audio(event: TaskEvent) -> Iterator[TaskEvent]:
    """Split audio into several events; the first has its content type."""
    data = memoryview(event.audio_chunk.data)
    content_type = event.audio_chunk.content_type
    for start in range(0, len(data), MAX_AUDIO_BYTES):
        chunk = TaskEvent()
        chunk.audio_chunk.data = bytes(data[start : start + MAX_AUDIO_BYTES])
        chunk.audio_chunk.content_type = content_type
        content_type = ""
        yield chunk
