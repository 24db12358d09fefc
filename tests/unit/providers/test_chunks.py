"""Texts and audio that are too large for one event."""

from __future__ import annotations

import pytest

from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.text_pb2 import ContentPart, FinishReason, TextDelta
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.chunks import MAX_AUDIO_BYTES, MAX_TEXT_CHARS, split_audio, split_text
from pomelo.providers.text import completed_text

STOP = FinishReason.FINISH_REASON_STOP
USAGE = Usage(input_tokens=3, output_tokens=4)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, [1]),
        (MAX_TEXT_CHARS, [MAX_TEXT_CHARS]),
        (MAX_TEXT_CHARS + 1, [MAX_TEXT_CHARS, 1]),
        (2 * MAX_TEXT_CHARS, [MAX_TEXT_CHARS, MAX_TEXT_CHARS]),
    ],
)
def test_a_text_is_split_into_events_of_limited_size(size: int, sizes: list[int]) -> None:
    text = "é" * (size - 1) + "🍊"
    deltas = list(split_text(TaskEvent(text_delta=TextDelta(text=text))))
    assert [len(event.text_delta.text) for event in deltas] == sizes
    assert "".join(event.text_delta.text for event in deltas) == text
    *deltas, last = split_text(completed_text(text, STOP, USAGE))
    assert [len(event.text_delta.text) for event in deltas] == sizes[:-1]
    assert "".join(event.text_delta.text for event in deltas) == text[: -sizes[-1]]
    assert last == completed_text(text[-sizes[-1] :], STOP, USAGE)


def test_the_parts_of_a_completed_message_are_joined_before_they_are_split() -> None:
    event = completed_text("a" * MAX_TEXT_CHARS, STOP, None)
    event.completed.text.message.content.append(ContentPart(text="b"))
    before = event.SerializeToString()
    delta, last = split_text(event)
    assert delta.text_delta.text == "a" * MAX_TEXT_CHARS
    assert last == completed_text("b", STOP, None)
    assert event.SerializeToString() == before, "the provider's event was changed"


def test_audio_is_split_into_events_of_limited_size() -> None:
    data = bytes(range(256)) * 256 + b"x"
    first, last = split_audio(TaskEvent(audio_chunk=AudioChunk(data=data, content_type="audio/ogg")))
    assert first.audio_chunk == AudioChunk(data=data[:MAX_AUDIO_BYTES], content_type="audio/ogg")
    assert last.audio_chunk == AudioChunk(data=b"x")
