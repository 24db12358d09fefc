"""Splits events so that every client can read them, as lines of server-sent events and as gRPC messages."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse

MAX_TEXT_CHARS = 8 * 1024
"""Characters of text in one event: at most 48 KiB of JSON, however they are escaped."""

MAX_AUDIO_BYTES = 64 * 1024
"""Bytes of audio in one event."""


def split_text(event: StreamTaskResponse) -> Iterator[StreamTaskResponse]:
    """Split a text into several events; the last has finish_reason and usage."""
    text = event.text_delta.content
    last = (len(text) - 1) // MAX_TEXT_CHARS * MAX_TEXT_CHARS
    for start in range(0, last, MAX_TEXT_CHARS):
        chunk = StreamTaskResponse()
        chunk.text_delta.content = text[start : start + MAX_TEXT_CHARS]
        yield chunk
    rest = StreamTaskResponse()
    rest.text_delta.content = text[last:]
    rest.text_delta.finish_reason = event.text_delta.finish_reason
    if event.text_delta.HasField("usage"):
        rest.text_delta.usage.CopyFrom(event.text_delta.usage)
    yield rest


def split_audio(event: StreamTaskResponse) -> Iterator[StreamTaskResponse]:
    """Split audio into several events; the first has its content type."""
    data = memoryview(event.audio_chunk.data)
    content_type = event.audio_chunk.content_type
    for start in range(0, len(data), MAX_AUDIO_BYTES):
        chunk = StreamTaskResponse()
        chunk.audio_chunk.data = bytes(data[start : start + MAX_AUDIO_BYTES])
        chunk.audio_chunk.content_type = content_type
        content_type = ""
        yield chunk
