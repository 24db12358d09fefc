"""Pieces of tool calls that a vendor's stream adds, with surrogate pairs that are cut in two."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.text_pb2 import FINISH_REASON_TOOL_CALLS, ToolCall, ToolCallDelta
from pomelo.providers.text import StreamState, completed_text
from pomelo.providers.text.tool_calls import ToolCallState
from tests.unit.refusals import refused


def added(*pieces: tuple[int, str]) -> list[tuple[int, str]]:
    """The index and the arguments of what a state has to yield after these pieces."""
    state = StreamState(Report())
    for index, arguments in pieces:
        state.add_tool_call(index, arguments)
    state.end_tool_calls()
    return [(each.tool_call_delta.index, each.tool_call_delta.arguments_json) for each in state.tool_calls]


def test_the_first_piece_of_a_call_has_its_id_and_name() -> None:
    state = StreamState(Report())
    state.add_tool_call(0, "", "call_1", "weather")
    state.add_tool_call(0, '{"a":1}')
    assert [each.tool_call_delta for each in state.tool_calls] == [
        ToolCallDelta(id="call_1", name="weather"),
        ToolCallDelta(arguments_json='{"a":1}'),
    ]


def test_half_a_surrogate_pair_waits_for_its_other_half_in_the_same_call() -> None:
    assert added((0, "a\ud83d"), (1, "b"), (0, "\ude00c")) == [(0, "a"), (1, "b"), (0, "😀c")]
    assert added((0, "\ud83d"), (1, "\ude00")) == [(0, ""), (1, "\ufffd"), (0, "\ufffd")]
    assert added((0, "a\ud83d")) == [(0, "a"), (0, "\ufffd")]
    assert added((0, "a\ud83d"), (0, "b")) == [(0, "a"), (0, "\ufffdb")]


@pytest.mark.parametrize("arguments", ['{"a":1}', {"a": 1}])
def test_arguments_before_the_name_of_their_call_are_malformed(arguments: Any) -> None:
    with refused("provider_failed"):
        ToolCallState(Report()).add_piece(0, None, None, arguments)


def test_the_last_event_has_its_text_before_its_tool_calls() -> None:
    calls = [ToolCall(id="call_1", name="weather"), ToolCall(id="call_2", name="time", arguments_json="{}")]
    content = completed_text("Hi", FINISH_REASON_TOOL_CALLS, None, calls).completed.text.message.content
    assert content[0].text == "Hi"
    assert [part.tool_call for part in content[1:]] == calls
