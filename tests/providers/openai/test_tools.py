"""Tools, output formats and reasoning in requests of the OpenAI provider, and tool calls as hosts send them."""

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
    ToolChoice,
)
from pomelo.testing import Answer, FaultUpstream, error_reply
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    COMPATIBLE,
    FILTERED,
    OPENAI,
    PNG,
    TIME,
    WEATHER,
    adjusted,
    failure,
    finish_reason,
    hi,
    image,
    message,
    sent,
    text,
    tool_calls,
    tools_input,
)

LOW = ReasoningEffort.REASONING_EFFORT_LOW
NONE = ReasoningEffort.REASONING_EFFORT_NONE
SOL = Catalog.load().models["gpt-4"].routes[0]


async def test_a_request_with_tools_is_exactly_this(upstream: FaultUpstream) -> None:
    task = tools_input(tool_choice=ToolChoice(tool="time"), parallel_tool_calls=False)
    received = await sent(OPENAI, upstream, task)
    assert received.body == {
        "model": "gpt-4.1",
        "messages": [
            {"role": "user", "content": "How is the weather?"},
            {
                "role": "assistant",
                "content": "I'll ask.",
                "tool_calls": [
                    call("call_1234567890123456789012345", "weather", '{"city": "Zürich"}'),
                    call("null", "weather", "{"),
                ],
            },
            {"role": "tool", "tool_call_id": "null", "content": "no such city"},
            {"role": "tool", "tool_call_id": "call_1234567890123456789012345", "content": ""},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call(again := id_of(received, 4), "time", "{}")],
            },
            {"role": "tool", "tool_call_id": again, "content": "12:00"},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": None, "tool_calls": [call("2", "weather", '{"city":"Bonn"}')]},
            {"role": "tool", "tool_call_id": "2", "content": "Fine"},
        ],
        "tool_choice": {"type": "function", "function": {"name": "time"}},
        "parallel_tool_calls": False,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "The weather of a city",
                    "strict": True,
                    "parameters": json.loads(WEATHER.parameters_json),
                },
            },
            {"type": "function", "function": {"name": "time"}},
        ],
    }
    assert again not in ("null", "2", "call_1234567890123456789012345")


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call in a request."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def id_of(received: Any, index: int) -> str:
    """The id of the tool call in a message."""
    return str(received.body["messages"][index]["tool_calls"][0]["id"])


async def test_ids_are_the_same_in_every_request(upstream: FaultUpstream) -> None:
    first = await sent(OPENAI, upstream, tools_input())
    upstream.reset()
    assert (await sent(OPENAI, upstream, tools_input())).body == first.body


async def test_a_host_gets_a_schema_for_a_tool_without_parameters(upstream: FaultUpstream) -> None:
    received = await sent(COMPATIBLE, upstream, hi(tools=[TIME]))
    (tool,) = received.body["tools"]
    assert tool["function"] == {"name": "time", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TextFormat(json_object=TextFormat.JsonObject()), {"type": "json_object"}),
        (
            TextFormat(json_schema=JsonSchema(name="n", schema_json='{"type":"object"}')),
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        ),
        (
            TextFormat(json_schema=JsonSchema(name="n", description="d", schema_json="{}", strict=False)),
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "description": "d", "strict": False, "schema": {}},
            },
        ),
    ],
)
async def test_the_output_format_is_sent(
    upstream: FaultUpstream, given: TextFormat, expected: dict[str, Any]
) -> None:
    assert (await sent(OPENAI, upstream, hi(format=given))).body["response_format"] == expected


async def test_names_and_the_detail_of_images_are_sent(upstream: FaultUpstream) -> None:
    looked_at = image(PNG)
    looked_at.image.detail = ImageDetail.IMAGE_DETAIL_LOW
    question = Message(role=Role.ROLE_USER, content=[looked_at], name="ann")
    system = message(Role.ROLE_SYSTEM, "Be brief.")
    system.name = "rules"
    received = await sent(OPENAI, upstream, TextInput(messages=[system, question]))
    assert received.body["messages"] == [
        {"role": "system", "content": "Be brief.", "name": "rules"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}],
            "name": "ann",
        },
    ]


# --- reasoning


@pytest.mark.parametrize(
    ("effort", "requested"),
    [(0, "none"), (NONE, "none"), (LOW, "low"), (ReasoningEffort.REASONING_EFFORT_MAX, "max")],
)
async def test_the_callers_effort_replaces_the_routes(
    upstream: FaultUpstream, effort: Any, requested: str
) -> None:
    received = await sent(OPENAI, upstream, hi(reasoning_effort=effort), route=SOL)
    assert received.body["reasoning_effort"] == requested


async def test_what_excludes_reasoning_is_left_out_and_reported(rig: Rig, stream: bool) -> None:
    job = OPENAI.job(
        hi(reasoning_effort=LOW, temperature=1, top_p=0.5, max_tokens=9), stream=stream, route=SOL
    )
    await read_all(rig.provider, job)
    body = rig.requests[0].body
    assert (body["reasoning_effort"], body["max_completion_tokens"]) == ("low", 9)
    assert body.keys().isdisjoint(("temperature", "top_p"))
    assert adjusted(rig, job) == ["temperature", "top_p"]


async def test_a_model_that_calls_tools_only_without_reasoning_does_not_reason(rig: Rig) -> None:
    job = OPENAI.job(hi(reasoning_effort=LOW, temperature=1, tools=[TIME]), stream=False, route=SOL)
    assert tool_calls(await read_all(rig.provider, job), stream=False)
    body = rig.requests[0].body
    assert (body["reasoning_effort"], body["temperature"]) == ("none", 1)
    assert adjusted(rig, job) == ["reasoning_effort=none"]


async def test_an_effort_of_the_route_that_tools_exclude_is_no_adjustment(rig: Rig) -> None:
    route = replace(SOL, options={**SOL.options, "reasoning_effort": "high"})
    job = OPENAI.job(hi(tools=[TIME]), stream=False, route=route)
    assert tool_calls(await read_all(rig.provider, job), stream=False)
    assert rig.requests[0].body["reasoning_effort"] == "none"
    assert adjusted(rig, job) == []


async def test_fields_of_the_operator_replace_the_callers_tools_and_format(rig: Rig) -> None:
    fixed = {"tools": [call_of_tool("search")], "response_format": {"type": "text"}}
    route = Route("openai", "gpt-4.1", options={"extra": fixed})
    task = hi(tools=[TIME], parallel_tool_calls=True, format=TextFormat(json_object=TextFormat.JsonObject()))
    job = OPENAI.job(task, stream=False, route=route)
    await read_all(rig.provider, job)
    assert {name: rig.requests[0].body[name] for name in fixed} == fixed
    assert rig.requests[0].raw.count(b'"tools"') == rig.requests[0].raw.count(b'"response_format"') == 1
    assert adjusted(rig, job) == ["tools", "parallel_tool_calls", "response_format"]


def call_of_tool(name: str) -> dict[str, Any]:
    """A tool in a request."""
    return {"type": "function", "function": {"name": name}}


# --- refusals of the vendor


async def test_an_effort_that_the_vendor_refuses_is_not_the_callers_fault(rig: Rig) -> None:
    rig.script(error_reply(400, param="reasoning_effort"))
    error, _ = await failure(rig.provider, OPENAI.job(hi(reasoning_effort=LOW), stream=False))
    assert error.code == "provider_failed"


async def test_a_refusal_of_the_model_is_no_json(rig: Rig, stream: bool) -> None:
    schema = JsonSchema(name="x", schema_json='{"type":"object"}')
    rig.script(Answer(refusal="I can't help with that."))
    job = OPENAI.job(hi(format=TextFormat(json_schema=schema)), stream=stream)
    answer = await read_all(rig.provider, job)
    assert text(answer) == "I can't help with that."
    assert finish_reason(answer) == FILTERED
