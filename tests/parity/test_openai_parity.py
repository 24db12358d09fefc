"""A text task has the same output, usage, cost and error over gRPC, under /api/v1/task, and under /v1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.errors import NOT_UNDER_API, TABLE
from tests.app import RunningApp, app_fixture
from tests.driver import REST_PROTOCOL, STREAM
from tests.tasks import text_body

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
SCHEMA = {"name": "forecast", "schema": PARAMETERS}

TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": (text_body("Hello there", max_tokens=20), {"max_output_tokens": 20}),
    "tools": (
        text_body("How is it? [[calls:2]]", tools=[{"type": "function", "function": TOOL}]),
        {"tools": [{"type": "function", **TOOL}]},
    ),
    "schema": (
        text_body("How is it?", response_format={"type": "json_schema", "json_schema": SCHEMA}),
        {"text": {"format": {"type": "json_schema", **SCHEMA}}},
    ),
}
"""The body of a task, and the fields in which a request for its response differs."""

NOT_PROVOKED = {"unsupported_media_type", "not_found", "method_not_allowed"}
"""Errors of requests that are no task."""

CALLERS = [("test", "gpt-4"), *(("live", model) for model in ("gpt-4", "claude-3-haiku", "mixtral-8x7b"))]
"""Modes and models."""

app = app_fixture(settings={"anthropic_api_key": "anthropic-upstream"})


def response_body(name: str, model: str) -> dict[str, Any]:
    """Returns the body of a request for the response of a task."""
    body, fields = TASKS[name]
    return {"model": model, "input": body["messages"], **fields}


async def post(app: RunningApp, protocol: str, key: str, path: str, body: Any) -> tuple[int, Any]:
    """Returns the status of an answer and its JSON: of a stream, that of its events."""
    headers = {"Authorization": f"Bearer {key}"}
    async with app.session.post(app.urls[protocol] + path, json=body, headers=headers) as answer:
        if answer.content_type != "text/event-stream":
            return answer.status, await answer.json()
        lines = [line.removeprefix("data: ") for line in (await answer.text()).split("\n")]
        return answer.status, [json.loads(line) for line in lines if line.startswith("{")]


def chat_output(answer: Any) -> tuple[str, list[list[str]]]:
    """Returns the text and the tool calls of a chat completion, whole or in chunks."""
    if not isinstance(answer, list):
        message = answer["choices"][0]["message"]
        calls = [[call["id"], *call["function"].values()] for call in message.get("tool_calls", ())]
        return message["content"] or "", calls
    deltas = [chunk["choices"][0]["delta"] for chunk in answer]
    calls = []
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append([call["id"], call["function"]["name"], ""])
            calls[call["index"]][2] += call["function"]["arguments"]
    return "".join([delta.get("content") or "" for delta in deltas]), calls


def response_output(answer: Any) -> tuple[str, list[list[str]]]:
    """Returns the text and the tool calls of a response, whole or from the last of its events."""
    items = (answer[-1]["response"] if isinstance(answer, list) else answer)["output"]
    calls = [[i["call_id"], i["name"], i["arguments"]] for i in items if i["type"] == "function_call"]
    return "".join([item["content"][0]["text"] for item in items if item["type"] == "message"]), calls


@REST_PROTOCOL
@STREAM
@pytest.mark.parametrize(("mode", "model"), CALLERS)
@pytest.mark.parametrize("name", TASKS)
async def test_a_task_is_the_same_under_every_path(
    app: RunningApp, protocol: str, stream: bool, mode: str, model: str, name: str
) -> None:
    account = await app.account()
    key = account.live if mode == "live" else account.test
    body = {**TASKS[name][0], "model": model}
    outcomes = [await app.ask(front, key, body, stream=stream) for front in ("grpc", protocol)]
    assert [outcome.code for outcome in outcomes] == ["ok", "ok"]
    expected, other = [(one.output.get("text") or "", one.output.get("calls", [])) for one in outcomes]
    assert other == expected
    assert bool(expected[1]) is (name == "tools")
    streamed = {"stream": True} if stream else {}
    _, chat = await post(app, protocol, key, "/v1/chat/completions", {**body, **streamed})
    assert chat_output(chat) == expected
    _, response = await post(app, protocol, key, "/v1/responses", {**response_body(name, model), **streamed})
    assert response_output(response) == expected
    records = await app.records(account)
    billed = {(each.cost, each.input_tokens, each.output_tokens, each.provider_model) for each in records}
    assert (len(records), len(billed)) == (4, 1)


@REST_PROTOCOL
@pytest.mark.parametrize("code", sorted(set(TABLE) - NOT_UNDER_API - NOT_PROVOKED))
async def test_an_error_is_the_same_under_every_path(app: RunningApp, protocol: str, code: str) -> None:
    account = await app.account()
    body = text_body(f"[[error:{code}]]")
    response = {"model": body["model"], "input": body["messages"]}
    status, expected = await post(app, protocol, account.test, "/api/v1/task", body)
    assert (status, expected["error"]["code"]) == (TABLE[code].http, code)
    for path, asked in (("/v1/chat/completions", body), ("/v1/responses", response)):
        for stream in (False, True):
            answer = await post(app, protocol, account.test, path, {**asked, "stream": stream})
            assert answer[0] == status
            error = answer[1]["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == (expected["error"]["type"], code)
    assert not [record for record in await app.records(account) if record.cost]


@REST_PROTOCOL
@STREAM
@pytest.mark.parametrize("fails", [False, True])
async def test_adjustments_have_the_names_of_parameters_in_every_answer(
    app: RunningApp, protocol: str, stream: bool, fails: bool
) -> None:
    account = await app.account()
    text = "[[error:provider_unavailable]]" if fails else "Hello there"
    headers = {"Authorization": f"Bearer {account.test}"}
    for path, name, body in (
        ("/v1/chat/completions", "max_completion_tokens", text_body(text)),
        ("/v1/responses", "max_output_tokens", {"model": "gpt-4", "input": text}),
    ):
        asked = {**body, name: 10**6, "store": True, "stream": stream}
        async with app.session.post(app.urls[protocol] + path, json=asked, headers=headers) as answer:
            assert answer.status == (503 if fails else 200)
            assert answer.headers["X-Pomelo-Adjusted"] == f"{name}=128000; store"
