"""Tool calls and JSON of the vendors' models: the same output, bill and error over every front end, whole and
streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from pomelo.testing import Answer, Call
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome

MODELS = ("gpt-4", "claude-3-opus", "claude-3-haiku", "mixtral-8x7b")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, heiß oder kalt",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
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
SCHEMA = {"name": "weather", "strict": True, "schema": WEATHER["function"]["parameters"]}
TASKS: dict[str, dict[str, Any]] = {
    "a tool call": {"messages": [ASKED], "tools": [WEATHER, NOW]},
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
    "results": {
        "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS],
        "tools": [WEATHER, NOW],
    },
    "a JSON schema": {
        "messages": [ASKED],
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
    },
    "a JSON object": {"messages": [ASKED], "response_format": {"type": "json_object"}},
    "reasoning": {"messages": [ASKED], "reasoning_effort": "minimal"},
    "names": {"messages": [{"role": "developer", "content": "Be brief."}, {**ASKED, "name": "ann"}]},
}


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """An app with keys of all vendors of text."""
    folder = tmp_path_factory.mktemp("live")
    async with run_app(folder, settings={"anthropic_api_key": "anthropic-upstream"}) as app:
        yield app


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
    if task in ("a tool call", "a chosen tool", "one call at most"):
        assert first.output["finish"] == "tool_calls"
        called = "now" if task == "a chosen tool" else "weather"
        assert [name for name, _ in without_ids(first)["calls"]] == [called]
    else:
        assert first.output["finish"] == "stop"
        assert first.output["text"]
    if task == "a JSON schema":
        assert json.loads(first.output["text"]) == {"city": "text", "unit": "celsius"}


@pytest.mark.parametrize("stream", [False, True])
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


@pytest.mark.parametrize("stream", [False, True])
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
