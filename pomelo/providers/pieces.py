"""Cuts events into pieces that every client can read: lines of server-sent events, and messages over gRPC."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse

TEXT_PIECE = 8 * 1024
"""Characters of text in one event: at most 48 KiB of JSON, however they are escaped."""

AUDIO_PIECE = 64 * 1024
"""Bytes of audio in one event."""


def split_text(event: StreamTaskResponse) -> Iterator[StreamTaskResponse]:
    """The same text in several events; the last has finish_reason and usage."""
    text = event.text_delta.content
    last = (len(text) - 1) // TEXT_PIECE * TEXT_PIECE
    for at in range(0, last, TEXT_PIECE):
        piece = StreamTaskResponse()
        piece.text_delta.content = text[at : at + TEXT_PIECE]
        yield piece
    rest = StreamTaskResponse()
    rest.text_delta.content = text[last:]
    rest.text_delta.finish_reason = event.text_delta.finish_reason
    if event.text_delta.HasField("usage"):
        rest.text_delta.usage.CopyFrom(event.text_delta.usage)
    yield rest


def split_audio(event: StreamTaskResponse) -> Iterator[StreamTaskResponse]:
    """The same audio in several events; the first has its content type."""
    data = memoryview(event.audio_chunk.data)
    content_type = event.audio_chunk.content_type
    for at in range(0, len(data), AUDIO_PIECE):
        piece = StreamTaskResponse()
        piece.audio_chunk.data = bytes(data[at : at + AUDIO_PIECE])
        piece.audio_chunk.content_type = content_type
        content_type = ""
        yield piece
