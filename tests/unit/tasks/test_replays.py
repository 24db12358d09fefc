"""Stored answers are replayed as the events of a stream, and have the size of their output."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP
from pomelo.providers.chunks import MAX_AUDIO_BYTES
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import collector, definition_of, finish, text_end, text_of


def text_result(text: str) -> TaskResult:
    """The result of a text task, with what it used."""
    collected = collector("gpt-4")
    collected.add(text_end(text, input_tokens=3, output_tokens=2))
    result = finish(collected)
    result.usage.input_tokens, result.usage.output_tokens, result.cost_micros = 3, 2, 52
    return result


def test_a_text_is_replayed_in_small_deltas_with_its_end_and_usage() -> None:
    result = text_result("größe " * 20_000)
    *deltas, last = definition_of("gpt-4").replay(result, None)
    assert len(deltas) > 1
    assert "".join(one.text_delta.text for one in deltas) == text_of(result) == "größe " * 20_000
    assert {one.WhichOneof("event") for one in deltas} == {"text_delta"}
    assert last.completed.text.finish_reason == result.text.finish_reason == FINISH_REASON_STOP
    assert not last.completed.text.HasField("message")
    assert (last.completed.usage, last.completed.cost_micros) == (result.usage, 52)
    assert (last.completed.usage.input_tokens, last.completed.usage.output_tokens) == (3, 2)


def test_an_empty_text_is_replayed_as_its_end() -> None:
    (event,) = definition_of("gpt-4").replay(text_result(""), None)
    assert event.completed.text.finish_reason


@pytest.mark.parametrize("size", [1, MAX_AUDIO_BYTES, 2 * MAX_AUDIO_BYTES + 1])
def test_audio_is_replayed_in_chunks_and_the_first_has_the_type(tmp_path: Path, size: int) -> None:
    path, data = tmp_path / "audio", bytes(index % 251 for index in range(size))
    path.write_bytes(data)
    result = TaskResult(id="speech_1")
    result.speech.content_type = "audio/mpeg"
    *chunks, last = list(definition_of("eleven-labs-tts").replay(result, path))
    assert b"".join(event.audio_chunk.data for event in chunks) == data
    assert [event.audio_chunk.content_type for event in chunks] == ["audio/mpeg", *[""] * (len(chunks) - 1)]
    assert all(len(one.audio_chunk.data) == MAX_AUDIO_BYTES for one, _ in pairwise(chunks))
    assert last.completed == result


def test_audio_that_was_deleted_can_not_be_replayed(tmp_path: Path) -> None:
    with refused("store_unavailable"):
        list(definition_of("eleven-labs-tts").replay(TaskResult(), tmp_path / "none"))


def test_an_image_is_replayed_as_its_result() -> None:
    result = TaskResult(id="img_1")
    assert [event.completed for event in definition_of("flux-1-pro").replay(result, None)] == [result]


def test_the_size_of_an_output_is_that_of_its_bytes_or_of_its_file() -> None:
    text, transcript = TaskResult(), TaskResult()
    text.text.message.content.add(text="grö")
    text.text.message.content.add(text="ße")
    transcript.transcription.text = "größe"
    assert definition_of("gpt-4").output_size(text) == 7
    assert definition_of("eleven-labs-stt").output_size(transcript) == 7
    for model in ("flux-1-pro", "eleven-labs-tts", "eleven-labs-sts"):
        for data, linked, size in ((b"12345", 0, 5), (b"12345", 9, 5), (b"", 9, 9)):
            answer = TaskResult()
            media = answer.image.images.add() if model == "flux-1-pro" else answer.speech
            media.data, media.media.size_bytes = data, linked
            assert definition_of(model).output_size(answer) == size
