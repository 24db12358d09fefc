"""Splits events so that every client can read them, as lines of server-sent events and as gRPC messages."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.text_pb2 import TextOutput

MAX_TEXT_CHARS = 8 * 1024
"""Characters of text in one event: at most 48 KiB of JSON, however they are escaped."""

MAX_AUDIO_BYTES = 64 * 1024
"""Bytes of audio in one event."""


def event_text(event: TaskEvent) -> str:
    """Return the text of a text_delta, or of the message of a `completed`."""
    if event.HasField("completed"):
        return output_text(event.completed.text)
    return event.text_delta.text


def output_text(output: TextOutput) -> str:
    """Return the text of an output's message."""
    parts = output.message.content
    return parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])


def split_text(event: TaskEvent) -> Iterator[TaskEvent]:
    """Split the text of an event into text deltas. The last part of a `completed` remains in it."""
    text = event_text(event)
    last = (len(text) - 1) // MAX_TEXT_CHARS * MAX_TEXT_CHARS
    for start in range(0, last, MAX_TEXT_CHARS):
        yield _text_delta(text[start : start + MAX_TEXT_CHARS])
    if not event.HasField("completed"):
        yield _text_delta(text[last:])
        return
    rest = TaskEvent()
    rest.CopyFrom(event)
    message = rest.completed.text.message
    del message.content[1:]
    message.content[0].text = text[last:]
    yield rest


def _text_delta(text: str) -> TaskEvent:
    event = TaskEvent()
    event.text_delta.text = text
    return event


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
