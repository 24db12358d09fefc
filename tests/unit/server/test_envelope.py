"""The serialization of responses that have one message."""

from __future__ import annotations

import pytest

from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskResponse, StreamTaskResponse
from pomelo.server.envelope import envelope


@pytest.mark.parametrize("size", [0, 1, 120, 126, 127, 128, 16_383, 16_384, 70_000, 3_000_000])
def test_an_event_of_any_size_is_serialized_as_protobuf_does_it(size: int) -> None:
    event = TaskEvent(sequence_number=3)
    event.audio_chunk.data = b"a" * size
    expected = StreamTaskResponse(event=event).SerializeToString()
    assert envelope(StreamTaskResponse)(event) == expected


@pytest.mark.parametrize("size", range(118, 124))
def test_a_length_of_one_byte_becomes_one_of_two(size: int) -> None:
    result = TaskResult(id="x" * size, cost_micros=1)
    assert 122 <= result.ByteSize() <= 129
    assert envelope(RunTaskResponse)(result) == RunTaskResponse(result=result).SerializeToString()


def test_an_empty_message_is_present() -> None:
    assert StreamTaskResponse.FromString(envelope(StreamTaskResponse)(TaskEvent())).HasField("event")


def test_a_result_is_serialized_as_protobuf_does_it() -> None:
    result = TaskResult(id="task_1", model="gpt-4", cost_micros=7)
    assert envelope(RunTaskResponse)(result) == RunTaskResponse(result=result).SerializeToString()


def test_a_response_with_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        envelope(TaskResult)
