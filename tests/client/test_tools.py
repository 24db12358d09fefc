"""Tools, and text in the form of a schema."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.client import InvalidParameter, JsonSchema, Tool, arguments, tool_result, user
from pomelo.client.results import TextReader
from pomelo.client.tasks import text
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import REASONING_EFFORT_XHIGH, ToolCall, ToolCallDelta
from tests.client.clients import read

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "The weather in a city", CITY)
TIME = Tool("time", parameters={"type": "object", "properties": {}})


async def test_a_conversation_continues_with_the_results_of_tools(client: Any) -> None:
    messages: list[Any] = [user("[[calls:2]] How is it in Oslo?")]
    result = await client.text("gpt-4", messages, tools=[WEATHER, TIME])
    assert (result.finish_reason, result.text) == ("tool_calls", "")
    assert [call.name for call in result.tool_calls] == ["weather", "time"]
    assert isinstance(arguments(result.tool_calls[0])["city"], str)
    messages.append(result.message)
    messages.append(tool_result(result.tool_calls[0], "Sunny in Oslo"))
    messages.append(tool_result(result.tool_calls[1], "The clock is broken", is_error=True))
    answer = await client.text("gpt-4", messages, tools=[WEATHER, TIME])
    assert "Sunny in Oslo" in answer.text
    assert answer.finish_reason == "stop"
    with pytest.raises(InvalidParameter):
        await client.text("gpt-4", messages[:-1], tools=[WEATHER, TIME])


async def test_a_stream_has_the_same_tool_calls(client: Any) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, TIME], "seed": 4, "parallel_tool_calls": True}
    whole = await client.text("gpt-4", "[[calls:3]] How is it?", **options)
    pieces: list[str] = []
    streamed = await read(client.stream("gpt-4", "[[calls:3]] How is it?", **options), pieces)
    assert pieces == []
    assert len(whole.tool_calls) == 3
    assert streamed.message == whole.message
    assert (streamed.finish_reason, streamed.usage) == (whole.finish_reason, whole.usage)


def test_the_calls_of_a_stream_are_in_the_order_of_their_indexes() -> None:
    reader = TextReader()
    for index, piece in ((1, "{"), (0, "{}"), (1, "}")):
        delta = ToolCallDelta(index=index, id=f"call {index}", name="time", arguments_json=piece)
        assert reader.read(TaskEvent(tool_call_delta=delta)) is None
    calls = reader.result(TaskResult(), {}).tool_calls
    assert [(call.id, call.arguments_json) for call in calls] == [("call 0", "{}"), ("call 1", "{}")]


async def test_the_choice_of_a_tool(client: Any) -> None:
    tools = [WEATHER, TIME]
    named = await client.text("gpt-4", "How late is it?", tools=tools, tool_choice=TIME)
    assert [call.name for call in named.tool_calls] == ["time"]
    assert (await client.text("gpt-4", "How late is it?", tools=tools, tool_choice="none")).tool_calls == []
    assert (await client.text("gpt-4", "How late is it?", tools=tools, tool_choice="required")).tool_calls


async def test_text_in_the_form_of_a_schema(client: Any) -> None:
    result = await client.text("gpt-4", "Where?", format=JsonSchema(CITY, name="place", strict=True))
    assert set(result.json()) == {"city"}
    assert isinstance((await client.text("gpt-4", "In JSON, please", format="json")).json(), dict)
    with pytest.raises(ValueError, match="Expecting value"):
        (await client.text("gpt-4", "Hi", format="text")).json()


async def test_reasoning_effort_is_one_of_the_contract(client: Any) -> None:
    assert text("gpt-4", "Hi", reasoning_effort="xhigh").spec.text.reasoning_effort == REASONING_EFFORT_XHIGH
    assert (await client.text("gpt-4", "Hi", reasoning_effort="xhigh")).text


def test_empty_arguments_are_an_empty_object() -> None:
    assert arguments(ToolCall(name="time")) == {}
