"""OpenAI's Python SDK calls tools and parses JSON that matches a schema, by chat completions and by responses."""

from __future__ import annotations

import json
from typing import Any

from tests.app import Account, RunningApp, app_fixture
from tests.sdk import published
from tests.sdk.python_clients import Forecast
from tests.sdk.sdk import CALLERS, WEATHER, sdk

app = app_fixture()

CHAT_TOOLS: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}]
RESPONSE_TOOLS: Any = [{"type": "function", **WEATHER, "strict": True}]
QUESTION = "How is the weather in Paris and in Rome? [[calls:2]]"


@CALLERS
async def test_a_chat_calls_tools_and_takes_their_results(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    async with sdk(app, account, protocol, mode) as client:
        asked: dict[str, Any] = {"model": "gpt-4", "tools": CHAT_TOOLS, "parallel_tool_calls": True}
        first = await client.chat.completions.create(messages=messages, **asked)
        (choice,) = first.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        calls = choice.message.tool_calls or []
        assert len(calls) == (2 if mode == "test" else 1)
        messages.append(choice.message)
        for call in calls:
            assert call.type == "function"
            assert call.function.name == "weather"
            assert set(json.loads(call.function.arguments)) == {"city", "unit"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 degrees"})
        async with client.chat.completions.stream(messages=messages[:1], **asked) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert [
            (call.id, call.function.name, call.function.arguments)
            for call in streamed.message.tool_calls or []
        ] == [(call.id, call.function.name, call.function.arguments) for call in calls]
        for message in (choice.message, streamed.message):
            messages[1] = message
            last = await client.chat.completions.create(messages=messages, **asked)
            assert last.choices[0].finish_reason == "stop"
            assert (last.choices[0].message.content or "").count("Sunny") == (2 if mode == "test" else 0)


@CALLERS
async def test_a_response_calls_tools_and_takes_their_results(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    asked: dict[str, Any] = {
        "model": "gpt-4",
        "tools": RESPONSE_TOOLS,
        "tool_choice": {"type": "function", "name": "weather"},
    }
    conversation: list[Any] = [{"role": "user", "content": QUESTION}]
    async with sdk(app, account, protocol, mode) as client:
        first = await client.responses.create(input=conversation, **asked)
        calls = [item for item in first.output if item.type == "function_call"]
        assert [call.name for call in calls] == ["weather"] * (2 if mode == "test" else 1)
        async with client.responses.stream(input=conversation, **asked) as stream:
            events = [event async for event in stream]
            last = await stream.get_final_response()
        streamed = [item for item in last.output if item.type == "function_call"]
        assert [(item.call_id, item.arguments) for item in streamed] == [
            (item.call_id, item.arguments) for item in calls
        ]
        assert [event.type for event in events].count("response.function_call_arguments.done") == len(calls)
        conversation += first.output
        for call in calls:
            output = [{"type": "input_text", "text": "Sunny, 20 degrees"}]
            conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
        final = await client.responses.create(input=conversation, model="gpt-4", tools=RESPONSE_TOOLS)
    assert final.output_text


@CALLERS
async def test_a_response_parses_json_that_matches_a_schema(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        answer = await client.responses.parse(
            model="gpt-4", input="How is the weather?", text_format=Forecast
        )
    assert isinstance(answer.output_parsed, Forecast)


@CALLERS
async def test_answers_with_calls_are_valid_by_the_published_schemas(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async def post(path: str, schema: str, body: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {account.live if mode == 'live' else account.test}"}
        async with app.session.post(app.urls[protocol] + path, json=body, headers=headers) as answer:
            lines = (await answer.text()).split("\n")
        texts = [line.removeprefix("data: ") for line in lines if line.startswith(("data: {", "{"))]
        assert texts
        for text in texts:
            assert published.errors(schema, json.loads(text)) == []

    chat = {"model": "gpt-4", "messages": [{"role": "user", "content": QUESTION}], "tools": CHAT_TOOLS}
    await post("/v1/chat/completions", "CreateChatCompletionResponse", chat)
    await post("/v1/chat/completions", "CreateChatCompletionStreamResponse", {**chat, "stream": True})
    response = {"model": "gpt-4", "input": QUESTION, "tools": RESPONSE_TOOLS}
    await post("/v1/responses", "Response", response)
    await post("/v1/responses", "ResponseStreamEvent", {**response, "stream": True})
