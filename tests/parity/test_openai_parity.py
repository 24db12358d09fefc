"""A text task has the same output, usage, cost and error over gRPC, under /api/v1/task, and under /v1."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.errors import GRPC_ERRORS, TABLE
from tests.app import RunningApp, app_fixture
from tests.driver import REST_PROTOCOL
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

app = app_fixture()


def response_body(name: str) -> dict[str, Any]:
    """Returns the body of a request for the response of a task."""
    body, fields = TASKS[name]
    return {"model": body["model"], "input": body["messages"], **fields}


async def post(app: RunningApp, protocol: str, key: str, path: str, body: Any) -> tuple[int, Any]:
    """Returns the status of an answer and its JSON."""
    headers = {"Authorization": f"Bearer {key}"}
    async with app.session.post(app.urls[protocol] + path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def output_of(answer: dict[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns the text of an answer in any of the three shapes, and its tool calls."""
    if "choices" in answer:
        message = answer["choices"][0]["message"]
        calls = [(call["id"], *call["function"].values()) for call in message.get("tool_calls", ())]
        return message["content"] or "", calls
    items = answer["output"]
    text = "".join([item["content"][0]["text"] for item in items if item["type"] == "message"])
    calls = [
        (item["call_id"], item["name"], item["arguments"])
        for item in items
        if item["type"] == "function_call"
    ]
    return text, calls


@REST_PROTOCOL
@pytest.mark.parametrize("name", TASKS)
async def test_a_task_is_the_same_under_every_path(app: RunningApp, protocol: str, name: str) -> None:
    account = await app.account()
    answers = [
        await post(app, protocol, account.test, path, body)
        for path, body in (
            ("/api/v1/task", TASKS[name][0]),
            ("/v1/chat/completions", TASKS[name][0]),
            ("/v1/responses", response_body(name)),
        )
    ]
    assert (await app.ask("grpc", account.test, TASKS[name][0])).code == "ok"
    assert [status for status, _ in answers] == [200] * 3
    first, *others = [output_of(answer) for _, answer in answers]
    assert others == [first] * 2
    assert bool(first[1]) is (name == "tools")
    records = await app.records(account)
    billed = {(each.cost, each.input_tokens, each.output_tokens, each.provider_model) for each in records}
    assert (len(records), len(billed)) == (4, 1)


@REST_PROTOCOL
@pytest.mark.parametrize("code", sorted(set(TABLE) - GRPC_ERRORS - NOT_PROVOKED))
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
