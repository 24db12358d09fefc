"""Tools, output formats and reasoning at Anthropic, whose API has other forms of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog, Route
from pomelo.gen.v1.text_pb2 import (
    ImageDetail,
    JsonSchema,
    Message,
    ReasoningEffort,
    Role,
    TextFormat,
    TextInput,
    Tool,
    ToolCall,
    ToolChoice,
)
from pomelo.testing import FaultUpstream
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    ANTHROPIC,
    PNG,
    TIME,
    WEATHER,
    adjusted,
    assistant,
    hi,
    image,
    result,
    sent,
    tools_input,
)

OPUS = Catalog.load().models["claude-3-opus"].routes[0]


async def test_a_request_with_tools_is_exactly_this(upstream: FaultUpstream) -> None:
    task = tools_input(tool_choice=ToolChoice(tool="time"), parallel_tool_calls=False)
    body = (await sent(ANTHROPIC, upstream, task)).body
    first = "call_1234567890123456789012345"
    again = body["messages"][3]["content"][0]["id"]
    assert again != first
    assert body == {
        "model": "claude-haiku-4-5",
        "max_tokens": 4096,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "How is the weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I'll ask."},
                    {"type": "tool_use", "id": first, "name": "weather", "input": {"city": "Zürich"}},
                    {"type": "tool_use", "id": "null", "name": "weather", "input": {"INVALID_JSON": "{"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "null",
                        "content": "no such city",
                        "is_error": True,
                    },
                    {"type": "tool_result", "tool_use_id": first},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": again, "name": "time", "input": {}}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": again, "content": "12:00"},
                    {"type": "text", "text": "And now?"},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "2", "name": "weather", "input": {"city": "Bonn"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "2", "content": "Fine"}]},
        ],
        "tool_choice": {"type": "tool", "name": "time", "disable_parallel_tool_use": True},
        "tools": [
            {
                "name": "weather",
                "description": "The weather of a city",
                "strict": True,
                "input_schema": json.loads(WEATHER.parameters_json),
            },
            {"name": "time", "input_schema": {"type": "object"}},
        ],
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": True}, {"type": "auto", "disable_parallel_tool_use": False}),
        ({"tool_choice": ToolChoice(mode=ToolChoice.MODE_AUTO)}, {"type": "auto"}),
        ({"tool_choice": ToolChoice(mode=ToolChoice.MODE_REQUIRED)}, {"type": "any"}),
        (
            {"tool_choice": ToolChoice(mode=ToolChoice.MODE_NONE), "parallel_tool_calls": False},
            {"type": "none"},
        ),
    ],
)
async def test_the_choice_between_tools_has_the_vendors_form(
    upstream: FaultUpstream, options: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert (await sent(ANTHROPIC, upstream, hi(tools=[TIME], **options))).body.get("tool_choice") == expected


@pytest.mark.parametrize(
    ("parameters", "sent_schema"),
    [
        ("", {"type": "object"}),
        ("{}", {"type": "object"}),
        ('{"properties":{}}', {"properties": {}, "type": "object"}),
        (' {"properties":{}}\n', {"properties": {}, "type": "object"}),
        ('{"type":"object","x":[1]}', {"type": "object", "x": [1]}),
    ],
)
async def test_a_schema_without_a_type_gets_one(
    upstream: FaultUpstream, parameters: str, sent_schema: dict[str, Any]
) -> None:
    body = (await sent(ANTHROPIC, upstream, hi(tools=[Tool(name="x", parameters_json=parameters)]))).body
    assert body["tools"] == [{"name": "x", "input_schema": sent_schema}]


async def test_tools_that_were_called_are_declared_in_a_task_without_tools(upstream: FaultUpstream) -> None:
    task = tools_input()
    task.ClearField("tools")
    body = (await sent(ANTHROPIC, upstream, task)).body
    assert body["tool_choice"] == {"type": "none"}
    assert body["tools"] == [
        {"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")
    ]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        ('{"b":1,"a":[2.5,null]}', {"b": 1, "a": [2.5, None]}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('"x"', {"INVALID_JSON": '"x"'}),
        ('{"a":NaN}', {"INVALID_JSON": '{"a":NaN}'}),
        ('{"a":"\\ud83c"}', {"INVALID_JSON": '{"a":"\\ud83c"}'}),
        ('{"a":1e999}', {"a": None}),
    ],
)
async def test_arguments_are_sent_as_an_object(
    upstream: FaultUpstream, arguments: str, given: dict[str, Any]
) -> None:
    called = assistant("", ToolCall(id="a", name="time", arguments_json=arguments))
    task = TextInput(messages=[*hi().messages, called, result("a", "12:00")], tools=[TIME])
    (block,) = (await sent(ANTHROPIC, upstream, task)).body["messages"][1]["content"]
    assert block["input"] == given


async def test_the_arguments_of_all_calls_together_have_a_limited_number_of_values(
    upstream: FaultUpstream,
) -> None:
    half = '{"a":[' + "[]," * 20_000 + "0]}"
    texts = (half, half, '{"b":1}')
    called = assistant(
        "", *[ToolCall(id=f"{i}", name="time", arguments_json=text) for i, text in enumerate(texts)]
    )
    results = [result(f"{i}", "12:00") for i in range(len(texts))]
    task = TextInput(messages=[*hi().messages, called, *results], tools=[TIME])
    blocks = (await sent(ANTHROPIC, upstream, task)).body["messages"][1]["content"]
    inputs = [block["input"] for block in blocks]
    assert inputs == [{"a": [*[[]] * 20_000, 0]}, {"INVALID_JSON": half}, {"b": 1}]


async def test_a_blank_result_is_left_out(upstream: FaultUpstream) -> None:
    called = assistant("", ToolCall(id="a", name="time"))
    task = TextInput(messages=[*hi().messages, called, result("a", " \n")], tools=[TIME])
    (block,) = (await sent(ANTHROPIC, upstream, task)).body["messages"][2]["content"]
    assert block == {"type": "tool_result", "tool_use_id": "a"}


async def test_only_what_follows_results_of_tools_is_in_their_turn(upstream: FaultUpstream) -> None:
    called = assistant("", ToolCall(id="a", name="time"))
    before = [*hi().messages, *hi().messages]
    task = TextInput(messages=[*before, called, result("a", "12:00"), *hi().messages], tools=[TIME])
    turns = (await sent(ANTHROPIC, upstream, task)).body["messages"]
    assert [turn["role"] for turn in turns] == ["user", "user", "assistant", "user"]
    assert [block["type"] for block in turns[3]["content"]] == ["tool_result", "text"]


async def test_ids_of_other_vendors_are_replaced(upstream: FaultUpstream) -> None:
    called = assistant("", ToolCall(id="call:1", name="time"), ToolCall(id="ä", name="time"))
    task = TextInput(messages=[*hi().messages, called, result("ä", "2"), result("call:1", "1")], tools=[TIME])
    _, calls, results = (await sent(ANTHROPIC, upstream, task)).body["messages"]
    ids = [block["id"] for block in calls["content"]]
    assert [block["tool_use_id"] for block in results["content"]] == ids[::-1]


async def test_the_detail_of_an_image_and_names_are_left_out(upstream: FaultUpstream) -> None:
    looked_at = image(PNG)
    looked_at.image.detail = ImageDetail.IMAGE_DETAIL_HIGH
    question = Message(role=Role.ROLE_USER, content=[looked_at], name="ann")
    (turn,) = (await sent(ANTHROPIC, upstream, TextInput(messages=[question]))).body["messages"]
    assert turn.keys() == {"role", "content"}
    assert turn["content"][0].keys() == {"type", "source"}


async def test_a_schema_for_the_output_is_sent_beside_the_effort(upstream: FaultUpstream) -> None:
    schema = JsonSchema(
        name="n", description="d", schema_json='{"type":"object","additionalProperties":false}'
    )
    task = hi(format=TextFormat(json_schema=schema), reasoning_effort=ReasoningEffort.REASONING_EFFORT_LOW)
    received = await sent(ANTHROPIC, upstream, task, route=OPUS)
    assert received.raw.count(b'"output_config"') == 1
    assert received.body["output_config"] == {
        "effort": "low",
        "format": {"type": "json_schema", "schema": {"type": "object", "additionalProperties": False}},
    }


CITY = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (CITY, CITY | {"additionalProperties": False}),
        (CITY | {"additionalProperties": True}, CITY | {"additionalProperties": False}),
        ({"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 1}}}),
        (
            {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 1, "description": "minimum"}},
            },
            {"type": "object", "properties": {"n": {"type": "integer", "description": "minimum"}}},
        ),
        (
            {"type": "object", "properties": {"minimum": {"type": "array", "items": CITY, "minItems": 2}}},
            {
                "type": "object",
                "properties": {"minimum": {"type": "array", "items": CITY | {"additionalProperties": False}}},
            },
        ),
        (
            CITY | {"properties": {"a": {"type": "array", "minItems": 1}}},
            CITY | {"properties": {"a": {"type": "array", "minItems": 1}}, "additionalProperties": False},
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"anyOf": [{"$ref": "#/$defs/c"}, CITY]}},
                "$defs": {"c": CITY},
            },
            {
                "type": "object",
                "properties": {
                    "a": {"anyOf": [{"$ref": "#/$defs/c"}, CITY | {"additionalProperties": False}]}
                },
                "$defs": {"c": CITY | {"additionalProperties": False}},
            },
        ),
    ],
)
async def test_a_schema_that_is_not_strict_is_sent_as_the_vendor_takes_it(
    rig: Rig, given: dict[str, Any], schema: dict[str, Any]
) -> None:
    task = hi(format=TextFormat(json_schema=JsonSchema(name="n", schema_json=json.dumps(given))))
    job = ANTHROPIC.job(task, stream=False)
    await read_all(rig.provider, job)
    expected = {"type": "object", "additionalProperties": False, **schema}
    assert rig.requests[0].body["output_config"]["format"]["schema"] == expected
    assert adjusted(rig, job) == []


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "string"},
        {"type": "object", "additionalProperties": {"type": "number"}},
        {"type": "object", "properties": {"prices": {"type": "object", "additionalProperties": True}}},
    ],
)
async def test_a_schema_that_the_vendor_has_not_is_left_out_and_reported(
    rig: Rig, schema: dict[str, Any]
) -> None:
    task = hi(format=TextFormat(json_schema=JsonSchema(name="n", schema_json=json.dumps(schema))))
    job = ANTHROPIC.job(task, stream=False)
    await read_all(rig.provider, job)
    assert "output_config" not in rig.requests[0].body
    assert adjusted(rig, job) == ["response_format"]


async def test_any_json_object_is_left_out_and_reported(rig: Rig) -> None:
    job = ANTHROPIC.job(hi(format=TextFormat(json_object=TextFormat.JsonObject())), stream=False)
    await read_all(rig.provider, job)
    assert "output_config" not in rig.requests[0].body
    assert adjusted(rig, job) == ["response_format"]


async def test_a_route_that_drops_tools_still_takes_calls_of_before(rig: Rig) -> None:
    route = Route("anthropic", "claude-haiku-4-5", drop=frozenset(("tools",)))
    job = ANTHROPIC.job(tools_input(tool_choice=ToolChoice(tool="time")), stream=False, route=route)
    await read_all(rig.provider, job)
    assert rig.requests[0].body["tool_choice"] == {"type": "none"}
    assert adjusted(rig, job) == ["tools", "tool_choice"]


async def test_fields_of_the_operator_replace_the_callers(rig: Rig) -> None:
    fixed = {"tools": [{"name": "x", "input_schema": {"type": "object"}}], "output_config": {"effort": "low"}}
    schema = JsonSchema(name="n", schema_json="{}")
    task = hi(
        tools=[TIME],
        format=TextFormat(json_schema=schema),
        reasoning_effort=ReasoningEffort.REASONING_EFFORT_MAX,
    )
    job = ANTHROPIC.job(task, stream=False, route=replace(OPUS, options={"extra": fixed}))
    await read_all(rig.provider, job)
    assert {name: rig.requests[0].body[name] for name in fixed} == fixed
    assert rig.requests[0].raw.count(b'"tools"') == rig.requests[0].raw.count(b'"output_config"') == 1
    assert adjusted(rig, job) == ["tools", "response_format", "reasoning_effort"]
