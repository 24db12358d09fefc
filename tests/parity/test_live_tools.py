"""Tool calls and JSON of the vendors' models: the same output, bill and error over every front end, whole and
streamed; and for the same task the same output of every vendor."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest

from pomelo.testing import Answer, Call
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOLS, STREAM, Outcome

MODELS = ("gpt-4", "claude-3-opus", "claude-3-haiku", "mixtral-8x7b")
VENDORS = ("gpt-4", "claude-3-sonnet", "mixtral-8x7b")
"""A model of each vendor."""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, heiß oder kalt",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}, "city": {"type": "string"}},
            "required": ["unit", "city"],
            "additionalProperties": False,
        },
    },
}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
ASKED = {"role": "user", "content": "How is the weather?"}
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
]
RESULTS = [
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "18 degrees"}]},
]
AGAIN = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
HISTORY = [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS]
LONGER = [
    *HISTORY,
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [AGAIN]},
    RESULTS[1],
]


def schema(**changes: Any) -> dict[str, Any]:
    """An output format."""
    parameters = {**WEATHER["function"]["parameters"], **changes}
    return {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": parameters}}


TASKS: dict[str, dict[str, Any]] = {
    "a tool call": {"messages": [ASKED], "tools": [WEATHER, NOW]},
    "a strict tool": {"messages": [ASKED], "tools": [STRICT, NOW]},
    "a chosen tool": {
        "messages": [ASKED],
        "tools": [WEATHER, NOW],
        "tool_choice": {"type": "function", "function": {"name": "now"}},
    },
    "one call at most": {
        "messages": [ASKED],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
    "a required tool": {
        "messages": [ASKED],
        "tools": [STRICT, NOW],
        "tool_choice": "required",
        "temperature": 1,
    },
    "no tool": {"messages": [ASKED], "tools": [STRICT, NOW], "tool_choice": "none"},
    "results": {"messages": HISTORY, "tools": [WEATHER, NOW]},
    "ids used twice": {"messages": LONGER, "tools": [STRICT, NOW]},
    "results without tools": {"messages": LONGER},
    "a JSON schema": {"messages": [ASKED], "response_format": schema()},
    "a JSON schema beside tools": {
        "messages": HISTORY,
        "response_format": schema(),
        "tools": [STRICT, NOW],
    },
    "a JSON object": {"messages": [ASKED], "response_format": {"type": "json_object"}},
    "reasoning": {"messages": [ASKED], "reasoning_effort": "minimal"},
    "names": {"messages": [{"role": "developer", "content": "Be brief."}, {**ASKED, "name": "ann"}]},
}
CALLING = ("a tool call", "a strict tool", "a chosen tool", "one call at most", "a required tool")
"""The tasks that are answered with a tool call."""


running = app_fixture(settings={"anthropic_api_key": "anthropic-upstream"})


def without_ids(outcome: Outcome) -> dict[str, Any]:
    """The output without the ids of tool calls, which the vendor makes anew for each request."""
    calls = [[name, json.loads(arguments)] for _, name, arguments in outcome.output.get("calls", [])]
    return {**outcome.output, "calls": calls, "model": ""}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
async def test_a_vendors_tools_and_json_are_the_same_over_every_front_end(
    running: RunningApp, model: str, task: str
) -> None:
    account = await running.account()
    body = {"model": model, **TASKS[task]}
    outcomes = {
        (protocol, stream): await running.ask(protocol, account.live, body, stream=stream)
        for protocol in PROTOCOLS
        for stream in (False, True)
    }
    assert {(each.code, each.message) for each in outcomes.values()} == {("ok", "")}
    first = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        assert without_ids(outcome) == without_ids(first), name
        assert outcome.headers.get("x-pomelo-adjusted") == first.headers.get("x-pomelo-adjusted"), name
    records = await running.records(account)
    assert len(records) == len(outcomes)
    assert (
        len({(each.cost, each.input_tokens, each.output_tokens, each.output_bytes) for each in records}) == 1
    )
    if task in CALLING:
        assert first.output["finish"] == "tool_calls"
        called = "now" if task == "a chosen tool" else "weather"
        assert [name for name, _ in without_ids(first)["calls"]] == [called]
    else:
        assert first.output["finish"] == "stop"
        assert first.output["text"]
    if task.startswith("a JSON schema"):
        assert list(json.loads(first.output["text"]).items()) == [("unit", "celsius"), ("city", "text")]


@STREAM
@pytest.mark.parametrize("task", TASKS)
async def test_tools_and_json_are_the_same_of_every_vendor(
    running: RunningApp, task: str, stream: bool
) -> None:
    account = await running.account()
    outputs = []
    for model in VENDORS:
        outcome = await running.ask("rest", account.live, {"model": model, **TASKS[task]}, stream=stream)
        output = without_ids(outcome)
        outputs.append((outcome.code, output["text"], output["finish"], output["calls"]))
    assert outputs[0] == outputs[1] == outputs[2]


@STREAM
@pytest.mark.parametrize("model", VENDORS)
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"response_format": schema(additionalProperties=True)}, "response_format"),
        (
            {
                "tools": [
                    {**NOW, "function": {"name": "now", "strict": True, "parameters": {"type": "string"}}}
                ]
            },
            "tools",
        ),
    ],
)
async def test_a_schema_that_a_vendor_refuses_is_the_same_error_over_every_front_end(
    running: RunningApp, model: str, wrong: dict[str, Any], field: str, stream: bool
) -> None:
    account = await running.account()
    body = {"model": model, "messages": [ASKED], **wrong}
    outcomes = [await running.ask(each, account.live, body, stream=stream) for each in PROTOCOLS]
    ((code, message),) = {(each.code, each.message) for each in outcomes}
    assert code == "invalid_parameter"
    assert message.startswith(f"Invalid {field}: ")


@STREAM
@pytest.mark.parametrize("model", MODELS)
async def test_a_stored_answer_repeats_the_vendors_tool_calls(
    running: RunningApp, model: str, stream: bool
) -> None:
    account = await running.account()
    body = {"model": model, **TASKS["a tool call"]}
    headers = {"Idempotency-Key": str(uuid4())}
    first, *others = [
        await running.ask(protocol, account.live, body, stream=stream, headers=headers)
        for protocol in PROTOCOLS
    ]
    for other in others:
        assert (other.id, other.output) == (first.id, first.output)
    assert len(await running.records(account)) == 1


@pytest.mark.parametrize("model", MODELS)
async def test_the_answer_of_a_vendor_can_be_sent_back_with_results(running: RunningApp, model: str) -> None:
    account = await running.account()
    body: dict[str, Any] = {"model": model, **TASKS["a tool call"]}
    for protocol in PROTOCOLS:
        first = await running.ask(protocol, account.live, body)
        ((call_id, name, arguments),) = first.output["calls"]
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": call_id, "content": "rain"}
        again = {**body, "messages": [*body["messages"], answer, result]}
        second = await running.ask(protocol, account.live, again)
        assert (second.code, second.output["finish"]) == ("ok", "stop")


@STREAM
async def test_calls_that_are_left_out_are_charged_and_the_others_can_be_sent_back(
    running: RunningApp, stream: bool
) -> None:
    body: dict[str, Any] = {"model": "gpt-4", "messages": [ASKED], "tools": [NOW]}
    usage = {"prompt_tokens": 9, "completion_tokens": 2_000, "total_tokens": 2_009}
    for protocol in PROTOCOLS:
        account = await running.account()
        running.upstream.script(Answer("All.", tool_calls=(Call("now"),) * 120, usage=usage))
        answer = await running.ask(protocol, account.live, body, stream=stream)
        assert (answer.code, answer.output["text"], answer.output["finish"]) == ("ok", "All.", "length")
        assert len(answer.output["calls"]) == 99
        record = await running.only_record(account, answer)
        assert (record.output_tokens, record.complete, record.source) == (2_000, True, "provider")
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in answer.output["calls"]
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "noon"} for call in calls]
        messages = [ASKED, {"role": "assistant", "content": "All.", "tool_calls": calls}, *results]
        again = await running.ask(protocol, account.live, {**body, "messages": messages}, stream=stream)
        assert (again.code, again.output["finish"]) == ("ok", "stop")


@pytest.mark.parametrize("model", MODELS)
async def test_strict_handling_refuses_what_is_adjusted_over_every_front_end(
    running: RunningApp, model: str
) -> None:
    account = await running.account()
    for task, values in TASKS.items():
        body = {"model": model, **values}
        strict = {"Prefer": "handling=strict"}
        adjusted = (await running.ask("rest", account.live, body)).headers.get("x-pomelo-adjusted")
        outcomes = [await running.ask(each, account.live, body, headers=strict) for each in PROTOCOLS]
        assert {each.code for each in outcomes} == {"invalid_parameter" if adjusted else "ok"}, task
        assert len({each.message for each in outcomes}) == 1
        if adjusted:
            assert f"Invalid {adjusted.partition(';')[0].partition('=')[0]}" in outcomes[0].message
