"""Tool calls of a text's output: joined, counted, billed in part, and replayed."""

from __future__ import annotations

import pytest

from pomelo.catalog.pricing import Usage
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)
from pomelo.providers.chunks import MAX_TEXT_CHARS
from pomelo.providers.text import completed_text
from pomelo.tasks.base import Collector
from tests.unit.tasks.collectors import collector, definition_of, delta, finish, text_end, text_of

WEATHER = ToolCall(id="call_1", name="weather", arguments_json='{"city":"Köln"}')
TIME = ToolCall(id="call_2", name="time", arguments_json="{}")
SIZE = len("weather") + len('{"city":"Köln"}'.encode()) + len("time{}")


def end(*calls: ToolCall, text: str = "") -> TaskEvent:
    """The last event, with the calls that no delta had."""
    return completed_text(text, FINISH_REASON_TOOL_CALLS, None, calls)


def pieces(call: ToolCall, index: int, size: int = 4) -> list[TaskEvent]:
    """A call as deltas with `size` characters of the arguments each."""
    first = ToolCallDelta(index=index, id=call.id, name=call.name)
    arguments = call.arguments_json
    rest = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    deltas = [first, *(ToolCallDelta(index=index, arguments_json=text) for text in rest)]
    return [TaskEvent(tool_call_delta=each) for each in deltas]


def calls_of(result: TaskResult) -> list[ToolCall]:
    return [part.tool_call for part in result.text.message.content if part.HasField("tool_call")]


def streamed(collected: Collector, events: list[TaskEvent]) -> list[TaskEvent]:
    """What a stream passes on of these events."""
    return [passed for event in events if (passed := collected.add(event)) is not None]


def test_a_whole_answer_has_its_text_and_then_its_tool_calls() -> None:
    collected = collector("gpt-4")
    collected.add(end(WEATHER, TIME, text="Let me see."))
    result = finish(collected)
    assert text_of(result) == result.text.message.content[0].text == "Let me see."
    assert calls_of(result) == [WEATHER, TIME]
    assert collected.output_bytes == definition_of("gpt-4").output_size(result) == 11 + SIZE


def test_an_answer_of_nothing_but_tool_calls_has_no_text() -> None:
    collected = collector("gpt-4")
    collected.add(end(WEATHER))
    assert [part.WhichOneof("part") for part in finish(collected).text.message.content] == ["tool_call"]


def test_the_pieces_of_a_stream_are_passed_on_and_joined_if_they_are_stored() -> None:
    collected = collector("gpt-4", stream=True, keep=True)
    events = [delta("Hm"), *pieces(WEATHER, 0), *pieces(TIME, 1)]
    assert streamed(collected, events) == events
    collected.add(text_end())
    result = finish(collected)
    assert text_of(result) == "Hm"
    assert calls_of(result) == [WEATHER, TIME]
    assert collected.output_bytes == 2 + SIZE
    assert list(collected.end_stream(result)) == []
    assert not result.text.HasField("message")


def test_the_interleaved_pieces_of_two_calls_are_joined_by_their_index() -> None:
    collected = collector("gpt-4", stream=True, keep=True)
    first, second = pieces(WEATHER, 0), pieces(ToolCall(id="b", name="x", arguments_json='{"a":[1]}'), 1)
    streamed(collected, [first[0], second[0], *first[1:3], *second[1:], *first[3:]])
    collected.add(text_end())
    assert [each.arguments_json for each in calls_of(finish(collected))] == ['{"city":"Köln"}', '{"a":[1]}']


def test_calls_that_come_with_the_end_of_a_stream_are_sent_as_deltas_before_it() -> None:
    collected = collector("gpt-4", stream=True)
    streamed(collected, pieces(TIME, 0))
    late = ToolCall(id="call_9", name="weather", arguments_json="x" * (MAX_TEXT_CHARS + 1))
    collected.add(end(late, text="Hi"))
    result = finish(collected)
    text, first, second = collected.end_stream(result)
    assert text.text_delta.text == "Hi"
    assert (first.tool_call_delta.index, first.tool_call_delta.id) == (1, "call_9")
    assert second.tool_call_delta == ToolCallDelta(index=1, arguments_json="x")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("calls", "reason", "reported"),
    [
        ([WEATHER], FINISH_REASON_STOP, FINISH_REASON_TOOL_CALLS),
        ([WEATHER], FINISH_REASON_TOOL_CALLS, FINISH_REASON_TOOL_CALLS),
        ([WEATHER], FINISH_REASON_LENGTH, FINISH_REASON_LENGTH),
        ([], FINISH_REASON_TOOL_CALLS, FINISH_REASON_STOP),
    ],
)
def test_the_finish_reason_agrees_with_the_calls(
    calls: list[ToolCall], reason: FinishReason.ValueType, reported: FinishReason.ValueType, stream: bool
) -> None:
    collected = collector("gpt-4", stream=stream)
    if stream:
        streamed(collected, [event for index, call in enumerate(calls) for event in pieces(call, index)])
        calls = []
    collected.add(completed_text("", reason, None, calls))
    assert finish(collected).text.finish_reason == reported


def test_a_stream_of_tool_calls_that_is_left_costs_what_was_delivered() -> None:
    collected = collector("gpt-4", stream=True)
    streamed(collected, pieces(WEATHER, 0, size=5))
    assert collected.partial_usage(None) == Usage(input_tokens=3, output_tokens=4)
    streamed(collected, [TaskEvent(tool_call_delta=ToolCallDelta(arguments_json="x" * 800))])
    assert collected.partial_usage(None).output_tokens == (800 + len("weather") + 16) // 8


def test_tool_calls_without_reported_usage_are_not_free() -> None:
    collected = collector("gpt-4")
    collected.add(end(ToolCall(id="a", name="x", arguments_json="y" * 799)))
    finish(collected)
    assert collected.usage(None) == (Usage(input_tokens=3, output_tokens=100), False)


def test_a_count_of_no_output_tokens_beside_tool_calls_is_impossible() -> None:
    collected = collector("gpt-4")
    event = end(TIME)
    event.completed.usage.input_tokens = 5
    collected.add(event)
    finish(collected)
    assert collected.usage(None) == (Usage(input_tokens=5, output_tokens=1), False)


def test_a_stored_answer_is_replayed_with_its_tool_calls() -> None:
    collected = collector("gpt-4")
    collected.add(end(WEATHER, TIME, text="Hm"))
    text, weather, time, last = definition_of("gpt-4").replay(finish(collected), None)
    assert text.text_delta.text == "Hm"
    assert weather.tool_call_delta == ToolCallDelta(
        index=0, id="call_1", name="weather", arguments_json='{"city":"Köln"}'
    )
    assert time.tool_call_delta == ToolCallDelta(index=1, id="call_2", name="time", arguments_json="{}")
    assert last.completed.text.finish_reason == FINISH_REASON_TOOL_CALLS
    assert not last.completed.text.HasField("message")


@pytest.mark.parametrize("keep", [False, True])
def test_a_call_without_arguments_has_an_empty_object(keep: bool) -> None:
    bare = ToolCall(id="call_3", name="now")
    collected = collector("gpt-4", stream=True, keep=keep)
    passed = streamed(collected, [*pieces(bare, 0), *pieces(WEATHER, 1)])
    assert len(passed) == len(pieces(WEATHER, 1)) + 1
    collected.add(end(ToolCall(id="call_4", name="now")))
    result = finish(collected)
    if keep:
        assert [call.arguments_json for call in calls_of(result)] == ["{}", '{"city":"Köln"}', "{}"]
    first, last = collected.end_stream(result)
    assert first.tool_call_delta == ToolCallDelta(index=0, arguments_json="{}")
    assert last.tool_call_delta == ToolCallDelta(index=2, id="call_4", name="now", arguments_json="{}")


def test_a_piece_without_anything_in_it_is_neither_passed_on_nor_counted() -> None:
    collected = collector("gpt-4", stream=True)
    first, *rest = pieces(WEATHER, 0, size=5)
    empty = TaskEvent(tool_call_delta=ToolCallDelta())
    assert streamed(collected, [first, empty, *rest, empty]) == [first, *rest]
    assert collected.partial_usage(None).output_tokens == 1 + len(rest)


def test_the_arguments_that_a_call_lacks_are_part_of_the_output() -> None:
    collected = collector("gpt-4", stream=True)
    passed = streamed(collected, [*pieces(ToolCall(id="call_1", name="time"), 0), *pieces(WEATHER, 1), end()])
    result = TaskResult()
    collected.finish(result)
    passed += collected.end_stream(result)
    size = sum(
        len((each.tool_call_delta.name + each.tool_call_delta.arguments_json).encode()) for each in passed
    )
    assert collected.output_bytes == size == SIZE
