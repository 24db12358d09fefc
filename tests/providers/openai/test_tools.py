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
    Tool,
    ToolChoice,
)
from pomelo.providers.base import fit_job
from pomelo.testing import Answer, FaultUpstream, Reply, chunk, error_reply
from pomelo.testing.text_answer import DONE
from tests.providers.rig import Rig, check_no_secrets, read_all
from tests.providers.text_rig import (
    COMPATIBLE,
    FILTERED,
    OPENAI,
    PNG,
    TIME,
    WEATHER,
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


def adjusted(rig: Rig, job: Any) -> list[str]:
    """What is reported of a job."""
    adjustments = fit_job(job, rig.provider.fit_text).adjustments
    return [f"{each.field}={each.used}" if each.used else each.field for each in adjustments]


# --- tool calls as hosts send them

BONN = '{"city":"Bonn"}'
CALLED = [("weather", BONN), ("time", "{}")]


def piece(index: Any = None, call_id: Any = None, name: Any = None, arguments: Any = None) -> dict[str, Any]:
    """A piece of a tool call, without what is None."""
    function = {"name": name, "arguments": arguments}
    fields = {"index": index, "id": call_id, "function": {k: v for k, v in function.items() if v is not None}}
    return {key: value for key, value in fields.items() if value is not None}


STREAMS: dict[str, list[list[dict[str, Any]]]] = {
    "pieces of two calls together": [
        [piece(0, "a", "weather", ""), piece(1, "b", "time", "")],
        [piece(1, arguments="{"), piece(0, arguments='{"city":')],
        [piece(0, arguments='"Bonn"}'), piece(1, arguments="}")],
    ],
    "indexes with gaps": [[piece(3, "a", "weather", BONN)], [piece(7, "b", "time", "{}")]],
    "whole calls in one chunk": [[piece(0, "a", "weather", BONN), piece(1, "b", "time", "{}")]],
    "whole calls without an index": [[piece(None, "a", "weather", BONN), piece(None, "b", "time", "{}")]],
    "whole calls, all with index 0": [[piece(0, "a", "weather", BONN)], [piece(0, "b", "time", "{}")]],
    "whole calls without ids, all with index 0": [
        [piece(0, None, "weather", BONN), piece(0, None, "time", "{}")]
    ],
    "whole calls with the id null": [[piece(0, "null", "weather", BONN)], [piece(0, "null", "time", "{}")]],
    "whole calls with nothing but names": [
        [piece(None, None, "weather", BONN)],
        [piece(None, "", "time", "{}")],
    ],
    "the same id twice": [[piece(0, "a", "weather", BONN), piece(1, "a", "time", "{}")]],
    "objects as arguments": [[piece(0, "a", "weather", {"city": "Bonn"}), piece(1, "b", "time", {})]],
    "no index and the id in the first piece": [
        [piece(None, "a", "weather", '{"city":')],
        [piece(None, None, None, '"Bonn"}')],
        [piece(None, "b", "time", "{}")],
    ],
    "an id for each piece": [
        [piece(0, "a", "weather", '{"city":')],
        [piece(0, "x", None, '"Bonn"}')],
        [piece(1, "b", "time", "")],
        [piece(1, "y", "", "{}")],
    ],
    "the id and the name in each piece": [
        [piece(0, "a", "weather", "")],
        [piece(0, "a", "weather", '{"city":')],
        [piece(0, "a", "weather", '"Bonn"}')],
        [piece(1, "b", "time", "{}")],
    ],
    "the name in each piece, and no id": [
        [piece(0, None, "weather", '{"city":')],
        [piece(0, None, "weather", '"Bonn"}')],
        [piece(1, None, "time", "{}")],
    ],
    "empty ids and names in later pieces": [
        [piece(0, "a", "weather", "")],
        [piece(0, "", "", BONN)],
        [piece(1, "b", "time", "{}"), piece(1, "", "", "")],
    ],
    "an id before the name": [
        [piece(0, "a")],
        [piece(0, None, "weather", "")],
        [piece(0, None, None, BONN)],
        [piece(1, "b", "time", "{}")],
    ],
    "an index as text": [[piece("0", "a", "weather", BONN)], [piece("1", "b", "time", "{}")]],
    "pieces without anything": [
        [piece(0)],
        [piece(0, "a", "weather", BONN), piece(1, "b", "time", "{}"), {}],
    ],
}


@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
async def test_pieces_of_tool_calls_of_any_host_are_the_same_calls(
    rig: Rig, chunks: list[list[dict[str, Any]]], reason: str
) -> None:
    rig.script(streamed(*chunks, reason=reason))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER, TIME]), stream=True))
    calls = tool_calls(answer, stream=True)
    assert [(name, arguments) for _, name, arguments in calls] == CALLED
    given = {one["id"] for pieces in chunks for one in pieces if "id" in one} & {"a", "b"}
    assert given <= {call_id for call_id, _, _ in calls}


def streamed(*chunks: Any, reason: str = "tool_calls") -> Reply:
    """A stream with these `tool_calls` in its chunks."""
    steps = [chunk({"tool_calls": pieces}) for pieces in chunks]
    return Reply(steps=(*steps, chunk({}, finish_reason=reason), DONE))


WHOLE: dict[str, Any] = {
    "as the vendor": [call("a", "weather", BONN), call("b", "time", "{}")],
    "without ids": [piece(None, None, "weather", BONN), piece(None, None, "time", "{}")],
    "with the id null": [piece(None, "null", "weather", BONN), piece(None, "null", "time", "{}")],
    "with the same id": [call("a", "weather", BONN), call("a", "time", "{}")],
    "objects as arguments": [call("a", "weather", {"city": "Bonn"}), call("b", "time", {})],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("calls", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("content", [None, "", []])
async def test_whole_tool_calls_of_any_host_are_the_same_calls(rig: Rig, calls: Any, content: Any) -> None:
    rig.script(whole({"content": content, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER, TIME]), stream=False))
    assert [(name, arguments) for _, name, arguments in tool_calls(answer, stream=False)] == CALLED
    assert text(answer) == ""


def whole(message: dict[str, Any]) -> Reply:
    """A whole response with this message."""
    body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "tool_calls"}]}
    return Reply(steps=(json.dumps(body).encode(),))


@pytest.mark.parametrize(
    "broken",
    [
        [piece(0, "a", None, "{}")],
        [piece(0, "a", 7, "{}")],
        [piece(0, "a", "x" * 257, "{}")],
        [piece(0, "a", "time", ["x"])],
        [piece(0, "a", "time", 7)],
        [{"index": 0, "id": "a", "function": "time"}],
        ["time"],
        "time",
        7,
    ],
)
async def test_tool_calls_that_can_not_be_read_fail(rig: Rig, broken: Any, stream: bool) -> None:
    rig.script(streamed(broken) if stream else whole({"content": None, "tool_calls": broken}))
    error, _ = await failure(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=stream))
    assert error.code == "provider_failed"
    check_no_secrets(error)


async def test_a_call_whose_name_never_comes_fails(rig: Rig) -> None:
    rig.script(streamed([piece(0, "a")]))
    error, _ = await failure(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=True))
    assert error.code == "provider_failed"


async def test_an_id_that_a_caller_could_not_send_back_is_replaced(rig: Rig, stream: bool) -> None:
    calls = [call("x" * 257, "time", "{}"), call("a\nb", "time", "{}")]
    rig.script(streamed(calls) if stream else whole({"content": None, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=stream))
    ids = [call_id for call_id, _, _ in tool_calls(answer, stream=stream)]
    assert len(set(ids)) == 2
    assert all(len(call_id) <= 40 and call_id.isprintable() for call_id in ids)


async def test_a_character_that_is_cut_in_two_is_joined(rig: Rig) -> None:
    first, second = json.dumps("🍊")[1:-1][:6], json.dumps("🍊")[1:-1][6:]
    steps = [
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"weather",'
        b'"arguments":"%b"}}]},"finish_reason":null}]}\n\n' % first.encode(),
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"%b"}}]},'
        b'"finish_reason":"tool_calls"}]}\n\n' % second.encode(),
        DONE,
    ]
    rig.script(Reply(steps=tuple(steps)))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER]), stream=True))
    assert tool_calls(answer, stream=True) == [("a", "weather", "🍊")]


# --- refusals of the vendor


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (hi(tools=[Tool(name="x", parameters_json='{"type":"object"}', strict=True)]), "tools"),
        (hi(tools=[Tool(name="x", parameters_json='{"type":"string"}')]), "tools"),
        (
            hi(format=TextFormat(json_schema=JsonSchema(name="x", schema_json="{}", strict=True))),
            "response_format",
        ),
    ],
)
async def test_a_schema_that_the_vendor_refuses_is_the_callers_fault(
    rig: Rig, task: TextInput, field: str, stream: bool
) -> None:
    error, _ = await failure(rig.provider, OPENAI.job(task, stream=stream))
    assert (error.code, error.field) == ("invalid_parameter", field)


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
