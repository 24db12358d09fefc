"""Tools, their results and output formats over every front end: the same output, bill, error and record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import Keys
from tests.driver import STREAM, TaskRequest
from tests.parity.comparison import Driver, ask_all, assert_same
from tests.rest_driver import RestDriver
from tests.tasks import text_body

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, heiß oder kalt",
        "parameters": {
            "type": "object",
            "required": ["city", "unit", "days"],
            "properties": {
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1},
                "city": {"$ref": "#/$defs/city"},
            },
            "$defs": {"city": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
        },
        "strict": True,
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
CALL_2 = {**CALL, "id": "call_2"}
ASKED = {"role": "user", "content": "How is the weather?"}
SCHEMA = {"name": "city", "schema": {"type": "object", "properties": {"b": {"const": 1}, "a": {}}, "required": ["b", "a"]}}  # fmt: skip


def called(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def answered(call_id: str = "call_1", content: str = "18 degrees") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def talk(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4", "messages": [ASKED, *messages], **more}


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


WORKING: dict[str, dict[str, Any]] = {
    "a tool call": talk(tools=TOOLS),
    "parallel tool calls": text_body("[[calls:5]]", tools=TOOLS),
    "no parallel tool calls": text_body("[[calls:5]]", tools=TOOLS, parallel_tool_calls=False),
    "a chosen tool": talk(tools=TOOLS, tool_choice=choose("now")),
    "a required tool": talk(tools=TOOLS, tool_choice="required"),
    "no tool": talk(tools=TOOLS, tool_choice="none"),
    "no tool without tools": talk(tools=[], tool_choice="none", parallel_tool_calls=False),
    "any tool without tools": talk(tool_choice="auto", parallel_tool_calls=True),
    "truncated arguments": talk(tools=TOOLS, max_tokens=3),
    "a result": talk(called(CALL), answered(), tools=TOOLS),
    "a result after a text": talk(called(CALL, content="Let me see."), answered(), tools=TOOLS),
    "two results": talk(called(CALL, CALL_2), answered("call_2"), answered(content=""), tools=TOOLS),
    "a second round": talk(called(CALL), answered(), {"role": "user", "content": "And now?"}, tools=TOOLS),
    "results without tools": talk(called(CALL), answered()),
    "a JSON schema": talk(response_format={"type": "json_schema", "json_schema": {**SCHEMA, "strict": True}}),
    "a JSON object": talk(response_format={"type": "json_object"}),
    "reasoning": talk(reasoning_effort="high"),
    "names": {"model": "gpt-4", "messages": [{**ASKED, "name": "ann"}, {**ASKED, "name": "bob_2"}]},
    "a long call": text_body("Hi", tools=[{"type": "function", "function": {"name": "long", "parameters": {
        "type": "object", "properties": {"text": {"type": "string", "minLength": 60_000}}, "required": ["text"]}}}]),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many tools": (talk(tools=[choose(f"f{number}") for number in range(129)]), "tools"),
    "two tools with the same name": (talk(tools=[NOW, NOW]), "tools[1].function.name"),
    "a tool without a name": (talk(tools=[choose("")]), "tools[0].function.name"),
    "a tool with a strange name": (talk(tools=[choose("a b")]), "tools[0].function.name"),
    "a required tool without tools": (talk(tool_choice="required"), "tool_choice"),
    "a chosen tool without tools": (talk(tool_choice=choose("now")), "tool_choice"),
    "a chosen tool that is not there": (
        talk(tools=TOOLS, tool_choice=choose("x")),
        "tool_choice.function.name",
    ),
    "a call without a result": (talk(called(CALL)), "messages[1].tool_calls[0]"),
    "a call whose result comes too late": (
        talk(called(CALL), ASKED, answered()),
        "messages[1].tool_calls[0]",
    ),
    "one result of two": (talk(called(CALL, CALL_2), answered(), ASKED), "messages[1].tool_calls[1]"),
    "a result without a call": (talk(answered()), "messages[1].tool_call_id"),
    "a result of another call": (talk(called(CALL), answered("call_9")), "messages[2].tool_call_id"),
    "two results of a call": (talk(called(CALL), answered(), answered()), "messages[3].tool_call_id"),
    "two calls with the same id": (talk(called(CALL, CALL), answered()), "messages[1].tool_calls[1].id"),
    "a strange name of a message": (talk({**ASKED, "name": "Ann B."}), "messages[1].name"),
    "a schema without a name": (
        talk(response_format={"type": "json_schema", "json_schema": {"name": "", "schema": {}}}),
        "response_format.json_schema.name",
    ),
}


@STREAM
@pytest.mark.parametrize("name", WORKING)
async def test_a_tool_call_has_the_same_result_over_all_front_ends(
    name: str, stream: bool, clients: Mapping[str, Driver], keys: Keys
) -> None:
    ask = TaskRequest(WORKING[name], keys.test, stream)
    outcomes = await ask_all(clients, ask)
    assert {front_end: (each.code, each.message) for front_end, each in outcomes.items()} == dict.fromkeys(
        clients, ("ok", "")
    )
    assert_same(outcomes, ask)
    output = outcomes["rest"].output
    assert bool(output["text"]) != ("calls" in output)
    if output["finish"] == "tool_calls":
        assert all(isinstance(json.loads(arguments), dict) for _, _, arguments in output["calls"])


@pytest.mark.parametrize("name", WORKING)
async def test_a_stream_has_the_result_of_a_whole_answer(
    name: str, clients: Mapping[str, Driver], keys: Keys
) -> None:
    whole, streamed = [
        await clients["rest"](TaskRequest(WORKING[name], keys.test, stream)) for stream in (False, True)
    ]
    assert streamed.output == {key: value for key, value in whole.output.items() if key != "model"}


@STREAM
@pytest.mark.parametrize("name", REFUSED)
async def test_a_wrong_tool_is_refused_with_the_same_words_over_all_front_ends(
    name: str, stream: bool, clients: Mapping[str, Driver], keys: Keys
) -> None:
    body, field = REFUSED[name]
    ask = TaskRequest(body, keys.test, stream)
    outcomes = await ask_all(clients, ask)
    assert {each.code for each in outcomes.values()} <= {"invalid_parameter", "missing_parameter"}
    assert_same(outcomes, ask)
    assert field in outcomes["rest"].message


@STREAM
@pytest.mark.parametrize("name", ["a tool call", "parallel tool calls", "a result", "a JSON schema"])
async def test_a_replayed_answer_has_the_tool_calls_of_the_first_over_all_front_ends(
    name: str, stream: bool, clients: Mapping[str, Driver], keys: Keys
) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    ask = TaskRequest(WORKING[name], keys.test, stream, headers=key)
    first = await clients["rest"](ask)
    assert first.code == "ok"
    outcomes = await ask_all(clients, ask)
    assert {each.metadata.get("idempotent-replayed") for each in outcomes.values()} == {"true"}
    assert {each.id for each in outcomes.values()} == {first.id}
    assert_same({"first": first, **outcomes}, ask)
    other = await ask_all(clients, TaskRequest(WORKING[name], keys.test, not stream, headers=key))
    assert {each.metadata.get("idempotent-replayed") for each in other.values()} == {"true"}
    assert {str(each.output.get("calls")) for each in other.values()} == {str(first.output.get("calls"))}


async def test_an_answer_can_be_sent_back_with_its_results(clients: Mapping[str, Driver], keys: Keys) -> None:
    for name, client in clients.items():
        body = text_body("[[calls:3]]", tools=TOOLS)
        first = await client(TaskRequest(body, keys.test))
        calls = [
            {"id": call_id, "type": "function", "function": {"name": tool, "arguments": arguments}}
            for call_id, tool, arguments in first.output["calls"]
        ]
        results = [answered(call["id"], f"result {number}") for number, call in enumerate(calls)]
        body["messages"] += [called(*calls), *results]
        second = await client(TaskRequest(body, keys.test))
        assert second.code == "ok", (name, second.message)
        assert "result 0 result 1 result 2" in second.output["text"]


@STREAM
async def test_a_tool_call_costs_the_same_over_all_front_ends(
    stream: bool, clients: Mapping[str, Driver], keys: Keys, http: Any, rest_url: str
) -> None:
    team = str(uuid4())
    ask = TaskRequest(text_body("[[calls:3]]", tools=TOOLS, metadata={"team": team}), keys.test, stream)
    outcomes = await ask_all(clients, ask)
    assert_same(outcomes, ask)
    usage = f"{rest_url}/api/v1/usage?page_size=100"
    headers = {"Authorization": f"Bearer {keys.test}"}
    async with http.get(usage, headers=headers) as answer:
        records = {record["id"]: record for record in (await answer.json())["data"]}
    found = [records[each.id] for each in outcomes.values()]
    for name in ("cost", "input_tokens", "output_tokens", "output_bytes", "source", "metadata"):
        assert len({str(record[name]) for record in found}) == 1, name
    calls = outcomes["rest"].output["calls"]
    assert found[0]["output_bytes"] == sum(len((name + text).encode()) for _, name, text in calls)
    assert found[0]["metadata"] == {"team": team}
    async with http.get(f"{usage}&group_by=metadata.team", headers=headers) as answer:
        totals = {total["group"]: total for total in (await answer.json())["data"]}
    assert totals[team]["tasks"] == len(clients)


async def test_a_stream_of_tool_calls_that_breaks_off_costs_what_was_delivered(
    clients: Mapping[str, Driver], keys: Keys, http: Any, rest_url: str
) -> None:
    ask = TaskRequest(text_body("[[calls:4]] [[cut]]", tools=TOOLS), keys.test, stream=True)
    outcomes = await ask_all(clients, ask)
    assert {each.code for each in outcomes.values()} == {"provider_failed"}
    assert_same(outcomes, ask)
    calls = outcomes["rest"].output["calls"]
    words = sum(1 + len(arguments.split()) for _, _, arguments in calls)
    headers = {"Authorization": f"Bearer {keys.test}"}
    async with http.get(f"{rest_url}/api/v1/usage?failed=true", headers=headers) as answer:
        records = {record["id"]: record for record in (await answer.json())["data"]}
    for each in outcomes.values():
        record = records[each.id]
        assert record["output_tokens"] == words
        assert record["output_bytes"] == sum(len((name + text).encode()) for _, name, text in calls)
        assert (record["complete"], record["code"]) == (False, "provider_failed")
        assert record["cost"] > 0


async def test_a_form_takes_tools_as_json_text(rest_url: str, http: Any, keys: Keys) -> None:
    body = talk(
        called(CALL),
        answered(),
        ASKED,
        tools=TOOLS,
        tool_choice=choose("now"),
        response_format={"type": "json_object"},
        parallel_tool_calls=True,
        reasoning_effort="low",
        metadata={"team": "a"},
        n=1,
        logprobs=False,
    )
    client = RestDriver(http, rest_url)
    outcome = await client(TaskRequest(body, keys.test, form=True))
    assert (outcome.code, outcome.message) == ("ok", "")
    assert outcome.output == (await client(TaskRequest(body, keys.test))).output
    assert outcome.output["calls"][0][1] == "now"
    assert (await client(TaskRequest({**body, "tool_choice": "none"}, keys.test, form=True))).code == "ok"
