"""The answers under /v1 are valid by the schemas that OpenAI publishes."""

from __future__ import annotations

import json
from typing import Any

from tests.app import Account, RunningApp, app_fixture
from tests.sdk import published
from tests.sdk.sdk import CALLERS, CHAT

app = app_fixture()
HI: dict[str, Any] = {"model": "gpt-4", "input": "Hello there", "instructions": "Be brief."}


async def ask(app: RunningApp, protocol: str, key: str, path: str, body: Any = None) -> str:
    """Returns the body of an answer; without `body`, gets the path."""
    headers = {"Authorization": f"Bearer {key}"}
    method = "GET" if body is None else "POST"
    url = app.urls[protocol] + path
    async with app.session.request(method, url, json=body, headers=headers) as answer:
        return await answer.text()


def events_of(text: str) -> list[Any]:
    """Returns the data of events, without the end marker."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(name: str, *answers: Any) -> None:
    assert answers
    for answer in answers:
        assert published.errors(name, answer) == []


@CALLERS
async def test_every_answer_to_a_text_task_is_valid(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    key = account.live if mode == "live" else account.test

    async def post(path: str, body: Any) -> str:
        return await ask(app, protocol, key, path, body)

    check("CreateChatCompletionResponse", json.loads(await post("/v1/chat/completions", CHAT)))
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = events_of(await post("/v1/chat/completions", {**CHAT, "stream": True, **options}))
        check("CreateChatCompletionStreamResponse", *chunks)
    response = json.loads(await post("/v1/responses", HI))
    assert response["store"] is False
    check("Response", response)
    check("ResponseStreamEvent", *events_of(await post("/v1/responses", {**HI, "stream": True})))
    broken = events_of(await post("/v1/responses", {**HI, "input": "[[cut]] [[words:9]]", "stream": True}))
    check("ResponseStreamEvent", *broken)
    assert mode == "live" or broken[-1]["type"] == "error"


@CALLERS
async def test_models_and_errors_are_valid(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    key = account.live if mode == "live" else account.test
    check("ListModelsResponse", json.loads(await ask(app, protocol, key, "/v1/models")))
    check("Model", json.loads(await ask(app, protocol, key, "/v1/models/gpt-4")))
    for path, body in (
        ("/v1/models/gpt-99", None),
        ("/v1/nothing", None),
        ("/v1/chat/completions", {}),
        ("/v1/responses", {"model": "gpt-4"}),
    ):
        check("ErrorResponse", json.loads(await ask(app, protocol, key, path, body)))


def test_the_schemas_refuse_what_is_wrong() -> None:
    assert published.errors("CreateChatCompletionResponse", {"id": "x"})
    assert published.errors("ResponseStreamEvent", {"type": "response.created", "sequence_number": 0})
