"""Tools and messages at Mistral: its ids of tool calls, and its order of messages."""

from __future__ import annotations

import json

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.gen.v1.text_pb2 import (
    JsonSchema,
    Message,
    ReasoningEffort,
    Role,
    TextFormat,
    TextInput,
    ToolCall,
    ToolChoice,
)
from pomelo.providers.base import fit_job
from pomelo.testing import FaultUpstream, Reply
from pomelo.testing.mistral_protocol import chunk, error_reply, fields_reply
from pomelo.testing.text_answer import DONE
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    MISTRAL,
    TIME,
    WEATHER,
    assistant,
    failure,
    hi,
    message,
    result,
    sent,
    tool_calls,
    tools_input,
)

SMALL = Catalog.load().models["mixtral-8x7b"].routes[0]


async def test_a_request_with_tools_is_exactly_this(upstream: FaultUpstream) -> None:
    task = tools_input(tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED), parallel_tool_calls=True)
    body = (await sent(MISTRAL, upstream, task)).body
    calls = [one for each in body["messages"] for one in each.get("tool_calls", ())]
    first, second, third, fourth = (one["id"] for one in calls)
    assert len({first, second, third, fourth}) == 4
    assert [one["function"] for one in calls] == [
        {"name": "weather", "arguments": '{"city": "Zürich"}'},
        {"name": "weather", "arguments": "{"},
        {"name": "time", "arguments": "{}"},
        {"name": "weather", "arguments": '{"city":"Bonn"}'},
    ]
    for one in calls:
        one.pop("function")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
        {
            "role": "assistant",
            "content": "I'll ask.",
            "tool_calls": [{"id": first, "type": "function"}, {"id": second, "type": "function"}],
        },
        {"role": "tool", "tool_call_id": second, "content": "no such city"},
        {"role": "tool", "tool_call_id": first, "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [{"id": third, "type": "function"}]},
        {"role": "tool", "tool_call_id": third, "content": "12:00"},
        {"role": "assistant", "content": "OK."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": fourth, "type": "function"}]},
        {"role": "tool", "tool_call_id": fourth, "content": "Fine"},
    ]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", True)
    assert body["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather of a city",
                "strict": True,
                "parameters": json.loads(WEATHER.parameters_json),
            },
        },
        {
            "type": "function",
            "function": {"name": "time", "parameters": {"type": "object", "properties": {}}},
        },
    ]


async def test_an_id_of_the_vendors_own_is_sent_unchanged(rig: Rig) -> None:
    answer = await read_all(rig.provider, MISTRAL.job(hi(tools=[TIME]), stream=False))
    ((call_id, name, arguments),) = tool_calls(answer, stream=False)
    called = assistant("", ToolCall(id=call_id, name=name, arguments_json=arguments))
    task = TextInput(messages=[*hi().messages, called, result(call_id, "12:00")], tools=[TIME])
    await read_all(rig.provider, MISTRAL.job(task, stream=False))
    messages = rig.requests[1].body["messages"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == call_id


async def test_names_of_authors_are_left_out(upstream: FaultUpstream) -> None:
    question = message(Role.ROLE_USER, "Hi")
    question.name = "ann"
    named = Message(role=Role.ROLE_USER, content=question.content, name="bob")
    body = (await sent(MISTRAL, upstream, TextInput(messages=[question, named]))).body
    assert body["messages"] == [{"role": "user", "content": "Hi"}] * 2


@pytest.mark.parametrize(
    ("effort", "requested", "reported"),
    [
        (ReasoningEffort.REASONING_EFFORT_NONE, "none", []),
        (ReasoningEffort.REASONING_EFFORT_LOW, "none", ["none"]),
        (ReasoningEffort.REASONING_EFFORT_MEDIUM, "high", ["high"]),
        (ReasoningEffort.REASONING_EFFORT_MAX, "high", ["high"]),
    ],
)
async def test_an_effort_becomes_the_nearest_that_the_model_takes(
    rig: Rig, effort: ReasoningEffort.ValueType, requested: str, reported: list[str]
) -> None:
    job = MISTRAL.job(hi(reasoning_effort=effort), stream=False, route=SMALL)
    await read_all(rig.provider, job)
    assert rig.requests[0].body["reasoning_effort"] == requested
    assert [each.used for each in fit_job(job, rig.provider.fit_text).adjustments] == reported


async def test_whole_calls_in_one_chunk_with_its_text_are_read(rig: Rig) -> None:
    """The vendor's own client takes the id null and the index 0 for what is absent."""
    calls = [
        {"function": {"name": "weather", "arguments": '{"city":"Bonn"}'}},
        {"id": "null", "index": 0, "function": {"name": "time", "arguments": {}}},
    ]
    content = [{"type": "text", "text": "Hm."}]
    last = chunk({"content": content, "tool_calls": calls}, finish_reason="tool_calls")
    rig.script(Reply(steps=(last, DONE)))
    answer = await read_all(rig.provider, MISTRAL.job(hi(tools=[WEATHER, TIME]), stream=True))
    assert answer[0].text_delta.text == "Hm."
    called = tool_calls(answer, stream=True)
    assert [(name, arguments) for _, name, arguments in called] == [
        ("weather", '{"city":"Bonn"}'),
        ("time", "{}"),
    ]


@pytest.mark.parametrize(
    ("reply", "code", "field"),
    [
        (fields_reply(("tools", 0, "function", "parameters"), "dict_type"), "invalid_parameter", "tools"),
        (
            fields_reply(("response_format", "json_schema"), "value_error"),
            "invalid_parameter",
            "response_format",
        ),
        (fields_reply(("tool_choice",), "value_error"), "invalid_parameter", "tool_choice"),
        (fields_reply(("reasoning_effort",), "value_error"), "provider_failed", None),
        (error_reply(400, "invalid_request_message_order", "3230"), "invalid_parameter", "messages"),
    ],
)
async def test_the_field_at_fault_is_named_if_the_caller_set_it(
    rig: Rig, reply: Reply, code: str, field: str | None
) -> None:
    rig.script(reply)
    schema = TextFormat(json_schema=JsonSchema(name="n", schema_json="{}"))
    error, _ = await failure(rig.provider, MISTRAL.job(hi(tools=[TIME], format=schema), stream=False))
    assert (error.code, error.field) == (code, field)
