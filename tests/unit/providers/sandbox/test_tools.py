"""Tool calls and JSON output: valid arguments, equal in every form, and counted by words."""

from __future__ import annotations

import json
import time
from itertools import groupby
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.text_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    ContentPart,
    JsonSchema,
    Message,
    Role,
    TextFormat,
    TextInput,
    TextOutput,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.sandbox import Sandbox
from pomelo.providers.sandbox.examples import MAX_CHARACTERS, MAX_DEPTH, MAX_STEPS, MAX_VALUES, example_of
from tests.unit.providers.sandbox.sandbox_jobs import job, message, user_input

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1},
    },
    "required": ["city", "unit", "days"],
}
WEATHER = Tool(name="weather", parameters_json=json.dumps(CITY))
NOW = Tool(name="now")


async def events_of(sandbox: Sandbox, task: TextInput, *, stream: bool) -> list[TaskEvent]:
    return [event async for event in sandbox.text(job("gpt-4", task, stream=stream))]


async def whole(sandbox: Sandbox, task: TextInput) -> tuple[TextOutput, Usage]:
    (event,) = await events_of(sandbox, task, stream=False)
    return event.completed.text, event.completed.usage


async def calls_of(sandbox: Sandbox, task: TextInput) -> list[ToolCall]:
    output, _ = await whole(sandbox, task)
    return [part.tool_call for part in output.message.content]


async def streamed_calls(sandbox: Sandbox, task: TextInput) -> list[ToolCall]:
    *deltas, _ = [event.tool_call_delta for event in await events_of(sandbox, task, stream=True)]
    calls = []
    for _, pieces in groupby(deltas, lambda piece: piece.index):
        first, *rest = pieces
        arguments = first.arguments_json + "".join(piece.arguments_json for piece in rest)
        assert not any(piece.id or piece.name for piece in rest)
        calls.append(ToolCall(id=first.id, name=first.name, arguments_json=arguments))
    return calls


async def test_the_first_tool_is_called_with_valid_arguments(sandbox: Sandbox) -> None:
    task = user_input("What is the weather?", tools=[WEATHER, NOW])
    output, usage = await whole(sandbox, task)
    (part,) = output.message.content
    assert part.tool_call.name == "weather"
    assert part.tool_call.id.startswith("call_")
    assert json.loads(part.tool_call.arguments_json) == {"city": "text", "unit": "celsius", "days": 1}
    assert output.finish_reason == FINISH_REASON_TOOL_CALLS
    words = 1 + len(part.tool_call.arguments_json.split())
    assert usage == Usage(input_tokens=4 + 1 + len(json.dumps(CITY).split()) + 1, output_tokens=words)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 4}, {"max_tokens": 1}, {"seed": 5}])
@pytest.mark.parametrize("prompt", ["Hi", "[[calls:3]]"])
async def test_streamed_calls_equal_those_of_a_whole_answer(
    sandbox: Sandbox, fields: dict[str, Any], prompt: str
) -> None:
    task = user_input(prompt, tools=[WEATHER, NOW], **fields)
    assert await streamed_calls(sandbox, task) == await calls_of(sandbox, task)
    last = (await events_of(sandbox, task, stream=True))[-1].completed
    output, usage = await whole(sandbox, task)
    assert (last.text.finish_reason, last.usage) == (output.finish_reason, usage)
    assert usage.output_tokens <= fields.get("max_tokens", 100)
    limited = "max_tokens" in fields
    assert output.finish_reason == (FINISH_REASON_LENGTH if limited else FINISH_REASON_TOOL_CALLS)


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["text", "calls"])
async def test_an_answer_of_exactly_the_limit_is_whole(sandbox: Sandbox, tools: list[Tool]) -> None:
    output, usage = await whole(sandbox, user_input("Hi", tools=tools))
    count = usage.output_tokens
    assert await whole(sandbox, user_input("Hi", tools=tools, max_tokens=count)) == (output, usage)
    cut, _ = await whole(sandbox, user_input("Hi", tools=tools, max_tokens=count - 1))
    assert cut.finish_reason == FINISH_REASON_LENGTH


async def test_several_calls_have_their_own_ids_and_take_the_tools_in_turn(sandbox: Sandbox) -> None:
    calls = await calls_of(sandbox, user_input("[[calls:3]]", tools=[WEATHER, NOW]))
    assert [call.name for call in calls] == ["weather", "now", "weather"]
    assert len({call.id for call in calls}) == 3
    assert calls[1].arguments_json == "{}"
    (call,) = await calls_of(sandbox, user_input("[[calls:3]]", tools=[NOW], parallel_tool_calls=False))
    assert call.name == "now"


async def test_the_same_message_again_in_a_conversation_gets_calls_with_new_ids(sandbox: Sandbox) -> None:
    task = user_input("[[calls:2]]", tools=[NOW])
    ids = []
    for _ in range(3):
        calls = await calls_of(sandbox, task)
        assert calls == await calls_of(sandbox, task)
        ids += [call.id for call in calls]
        parts = [ContentPart(tool_call=call) for call in calls]
        task.messages.append(Message(role=Role.ROLE_ASSISTANT, content=parts))
        results = [ContentPart(tool_result=ToolResult(tool_call_id=call.id, content="x")) for call in calls]
        task.messages.append(Message(role=Role.ROLE_TOOL, content=results))
        task.messages.append(message(Role.ROLE_USER, "[[calls:2]]"))
    assert len(set(ids)) == 6
    assert ids[:2] == [call.id for call in await calls_of(sandbox, user_input("[[calls:2]]", tools=[NOW]))]


async def test_a_long_message_is_not_read_again_for_each_call(sandbox: Sandbox) -> None:
    async def seconds(calls: int) -> float:
        task = user_input(f"[[calls:{calls}]]" + "x" * 4_000_000, tools=[NOW])
        began = time.process_time()
        assert len(await calls_of(sandbox, task)) == calls
        return time.process_time() - began

    assert await seconds(99) < 10 * await seconds(1)


async def test_the_chosen_tool_is_called_or_none(sandbox: Sandbox) -> None:
    tools = [WEATHER, NOW]
    (call,) = await calls_of(sandbox, user_input("Hi", tools=tools, tool_choice=ToolChoice(tool="now")))
    assert call.name == "now"
    none = ToolChoice(mode=ToolChoice.MODE_NONE)
    output, _ = await whole(sandbox, user_input("Hi", tools=tools, tool_choice=none))
    assert output.message.content[0].text.startswith("This is the Pomelo sandbox")


async def test_an_answer_after_the_results_of_tools_quotes_them(sandbox: Sandbox) -> None:
    task = user_input("What is the weather?", tools=[WEATHER])
    (call,) = await calls_of(sandbox, task)
    task.messages.add(role=Role.ROLE_ASSISTANT).content.add().tool_call.CopyFrom(call)
    result = ToolResult(tool_call_id=call.id, content="18 degrees and rain")
    task.messages.append(Message(role=Role.ROLE_TOOL, content=[ContentPart(tool_result=result)]))
    output, usage = await whole(sandbox, task)
    assert 'The tool returned: "18 degrees and rain"' in output.message.content[0].text
    assert output.finish_reason == FINISH_REASON_STOP
    before = (await whole(sandbox, user_input("What is the weather?", tools=[WEATHER])))[1]
    assert usage.input_tokens == before.input_tokens + 1 + len(call.arguments_json.split()) + 4
    task.messages.append(message(Role.ROLE_USER, "And tomorrow?"))
    assert [each.name for each in await calls_of(sandbox, task)] == ["weather"]


@pytest.mark.parametrize("stream", [False, True])
async def test_json_output_matches_its_schema(sandbox: Sandbox, stream: bool) -> None:
    output_format = TextFormat(json_schema=JsonSchema(name="city", schema_json=json.dumps(CITY)))
    task = user_input("Hi", format=output_format)
    events = await events_of(sandbox, task, stream=stream)
    text = "".join(event.text_delta.text for event in events)
    text += "".join(part.text for part in events[-1].completed.text.message.content)
    assert json.loads(text) == {"city": "text", "unit": "celsius", "days": 1}
    assert events[-1].completed.usage.output_tokens == len(text.split())


async def test_a_json_object_contains_the_answer(sandbox: Sandbox) -> None:
    task = user_input("Grüße", format=TextFormat(json_object=TextFormat.JsonObject()))
    output, _ = await whole(sandbox, task)
    assert 'You said: "Grüße"' in json.loads(output.message.content[0].text)["answer"]


# --- examples of schemas


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, "text"),
        (True, "text"),
        ({"const": [1]}, [1]),
        ({"enum": [None, 1]}, None),
        ({"type": ["integer", "null"]}, 0),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
        ({"type": "number", "maximum": -2.5}, -2.5),
        ({"type": "number", "minimum": -5, "maximum": 5}, 0),
        ({"type": "integer", "minimum": 5, "multipleOf": 4}, 8),
        ({"type": "integer", "exclusiveMaximum": 0}, -1),
        ({"type": "boolean"}, False),
        ({"type": "string", "minLength": 6}, "text.."),
        ({"type": "string", "maxLength": 2}, "te"),
        ({"type": "string", "format": "date"}, "2026-01-01"),
        ({"type": "array"}, []),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [None, None]),
        ({"prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3}, [1, 2, 2]),
        ({"type": "object"}, {}),
        ({"properties": {"a": {"const": 1}, "b": {}}, "required": ["a"]}, {"a": 1}),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"oneOf": [{"const": 3}]}, 3),
        (
            {"allOf": [{"required": ["a"]}, {"properties": {"a": {"const": 1}}}, {"required": ["b"]}]},
            {"a": 1, "b": "text"},
        ),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 7}}}, 7),
        ({"$ref": "https://example.com/schema"}, "text"),
        ({"type": 5, "enum": 7, "required": 1, "minItems": "x", "properties": []}, "text"),
        ({"type": "object", "required": [1, "a"], "properties": {"a": 5}}, {"a": "text"}),
        ({"type": "number", "multipleOf": 5e-324, "minimum": 1e308}, 0),
    ],
)
def test_an_example_follows_its_schema(schema: Any, value: Any) -> None:
    assert example_of(schema) == value


def test_an_example_of_a_schema_that_contains_itself_ends() -> None:
    depth, value = 0, example_of({"required": ["a"], "properties": {"a": {"$ref": "#"}}})
    while value is not None:
        depth, value = depth + 1, value["a"]
    assert depth == MAX_DEPTH + 1
    assert example_of({"$ref": "#"}) == "text"
    wide = {"required": ["a", "b"], "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}}
    assert json.dumps(example_of(wide)).count(":") <= MAX_VALUES


def test_an_example_is_small_however_large_its_schema_wants_it() -> None:
    bombs = [
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 900, "items": {"const": "x" * 90_000}},
        {"required": [str(number) for number in range(5_000)]},
        {"type": "array", "minItems": 999, "items": {"$ref": "#"}, **dict.fromkeys(map(str, range(9_000)))},
        {"type": "array", "minItems": 999, "items": {"required": ["a"] * 9_000}},
        {"type": "array", "minItems": 999, "items": {"$ref": "#" + "/a" * 9_000}},
        {"type": "array", "minItems": 999, "items": {"required": ["x" * 9_000]}},
        {"type": "array", "minItems": 999, "items": {"required": ["\x00" * 900, "b"]}},
        {"type": "array", "minItems": 999, "items": {"type": "number", "minimum": 10**4_000}},
    ]
    before = time.thread_time()
    for schema in bombs:
        assert len(json.dumps(example_of(schema))) < 2 * MAX_CHARACTERS
    assert time.thread_time() - before < 1


@pytest.mark.parametrize(
    "schema", [{"type": "string", "minLength": 9_000}, {"required": ["x" * 900], "minItems": 9}]
)
async def test_all_calls_of_an_answer_have_as_many_characters_as_one(sandbox: Sandbox, schema: Any) -> None:
    items = {"type": "array", "minItems": 999, "items": schema}
    parameters = json.dumps({"required": ["a"], "properties": {"a": items}})
    tools = [Tool(name=f"f{number}", parameters_json=parameters) for number in range(99)]
    for used in (tools, tools[:1]):
        calls = await calls_of(sandbox, user_input("[[calls:99]]", tools=used))
        assert len(calls) == 99
        assert sum(len(call.arguments_json) for call in calls) <= MAX_CHARACTERS
    (call,) = await calls_of(sandbox, user_input("Hi", tools=tools))
    assert MAX_CHARACTERS / 2 < len(call.arguments_json) <= MAX_CHARACTERS


class CountedSchema(dict[str, Any]):
    """A schema that counts how often it is read."""

    reads = 0

    def items(self) -> Any:
        CountedSchema.reads += 1
        return super().items()


@pytest.mark.parametrize("number", [1, 99])
def test_empty_alternatives_of_a_schema_are_read_a_bounded_number_of_times(number: int) -> None:
    CountedSchema.reads = 0
    example_of({"type": "array", "minItems": 999, "items": {"allOf": [CountedSchema()] * 31}}, number)
    assert 0 < CountedSchema.reads <= MAX_STEPS // 4 // number


NAMES = st.sampled_from(["a", "b", "c"])
LEAVES = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-9, 9),
        st.integers(0, 9),
    ),
    st.builds(lambda least: {"type": "string", "minLength": least}, st.integers(0, 9)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["x", 1]}, {"$ref": "#/$defs/leaf"}]),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items, least: {"type": "array", "items": items, "minItems": least}, inner, st.integers(0, 3)),
        st.builds(
            lambda properties: {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False},
            st.dictionaries(NAMES, inner, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=8,
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ["type", "enum", "const", "$ref", "properties", "required", "items", "prefixItems", "minItems", "anyOf",
             "allOf", "minimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "format"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(SCHEMAS)
def test_an_example_of_a_plain_schema_is_valid(schema: dict[str, Any]) -> None:
    root = {**schema, "$defs": {"leaf": {"type": "integer", "exclusiveMinimum": 3}}}
    jsonschema_rs.validate(root, example_of(root))


@settings(deadline=None)
@given(VALUES)
def test_any_schema_has_an_example_that_is_json(schema: Any) -> None:
    assert "Infinity" not in json.dumps(example_of(schema))
    assert json.loads(json.dumps(example_of(schema))) == example_of(schema)
