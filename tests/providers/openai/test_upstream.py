"""The vendor for tests speaks the real protocol: OpenAI's own client reads it, and it refuses what OpenAI refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from pomelo.testing import Answer, Call, FaultUpstream, Gate, Stop, error_event, error_reply
from tests.providers.rig import KEY, ask

GOOD: dict[str, Any] = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "Hi"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.fixture(name="client")
async def _client(upstream: FaultUpstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=upstream.openai_base_url, api_key=KEY, max_retries=0) as client:
        yield client


async def post(upstream: FaultUpstream, body: Any, **options: Any) -> tuple[int, Any]:
    """Status and JSON of a request."""
    headers = options.pop("headers", {"Authorization": f"Bearer {KEY}"})
    path = options.pop("path", "/v1/chat/completions")
    return await ask("POST", upstream.url + path, json=body, headers=headers)


async def test_the_official_client_reads_a_unary_answer(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    upstream.script(Answer("Grüße 🍊 there"))
    answer = await client.chat.completions.create(**GOOD)
    assert answer.choices[0].message.content == "Grüße 🍊 there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
async def test_the_official_client_reads_a_stream(
    upstream: FaultUpstream, client: openai.AsyncOpenAI, packing: Any
) -> None:
    upstream.script(Answer("Grüße 🍊 there", packing=packing))
    stream = await client.chat.completions.create(**GOOD, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Grüße 🍊 there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 4
    assert any(getattr(chunk, "obfuscation", None) for chunk in chunks)


async def test_without_include_usage_a_stream_has_no_usage(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(**GOOD, stream=True)
    assert all(chunk.usage is None for chunk in [chunk async for chunk in stream])


async def test_the_official_client_sees_refusals_of_the_vendor(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    upstream.script(error_reply(429, "requests", "rate_limit_exceeded"))
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(**GOOD)
    assert limited.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-wrong").chat.completions.create(**GOOD)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**GOOD, temperature=3)
    assert refused.value.param == "temperature"


async def test_the_official_client_sees_an_error_within_a_stream(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    upstream.script(Answer("one two", at={1: (error_event(), Stop.END)}))
    stream = await client.chat.completions.create(**GOOD, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": "Hi"}, "invalid_type", "messages"),
        ({"messages": [{"content": "Hi"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "empty_array", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "mood": 1}]},
            "unknown_parameter",
            "messages[0].mood",
        ),
        (
            {"messages": [{"role": "system", "content": [PICTURE]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "invalid_type",
            "messages[0].content[0].text",
        ),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"top_p": -0.1}, "decimal_below_min_value", "top_p"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": 1.0}, "invalid_type", "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_parameter_combination", "max_tokens"),
        ({"stop": []}, "empty_array", "stop"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "array_above_max_length", "stop"),
        ({"seed": 1.5}, "invalid_type", "seed"),
        ({"n": 129}, "integer_above_max_value", "n"),
        ({"presence_penalty": -3}, "decimal_below_min_value", "presence_penalty"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
        ({"safety_identifier": "x" * 65}, "string_above_max_length", "safety_identifier"),
        ({"reasoning_effort": "lots"}, "invalid_value", "reasoning_effort"),
        ({"speed": 1}, "unknown_parameter", "speed"),
        ({"model": "gpt-5.6-sol", "max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        ({"model": "gpt-5.6-sol", "stop": "x"}, "unsupported_parameter", "stop"),
        ({"model": "gpt-6-luna", "temperature": 1}, "unsupported_value", "temperature"),
    ],
)
async def test_what_the_vendor_would_refuse_is_refused_by_name(
    upstream: FaultUpstream, change: dict[str, Any], code: str, param: str
) -> None:
    upstream.script(Answer("kept for a valid one"))
    status, body = await post(upstream, GOOD | change)
    assert status == 400
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    status, body = await post(upstream, GOOD)
    assert body["choices"][0]["message"]["content"] == "kept for a valid one"


async def test_a_wrong_key_path_method_or_body_is_refused(upstream: FaultUpstream) -> None:
    assert (await post(upstream, GOOD, headers={}))[0] == 401
    assert (await post(upstream, GOOD, headers={"Authorization": "Basic sk-right"}))[0] == 401
    assert (await post(upstream, GOOD, headers={"Authorization": "Bearer sk-wrong"}))[0] == 401
    assert (await post(upstream, GOOD, path="/v1/completions"))[0] == 404
    assert (await post(upstream, [GOOD]))[0] == 400
    async with (
        aiohttp.ClientSession() as session,
        session.get(upstream.url + "/v1/chat/completions") as answer,
    ):
        assert answer.status == 405


async def test_rules_come_before_the_queue_and_the_queue_before_the_default(upstream: FaultUpstream) -> None:
    upstream.default = Answer("default")
    upstream.script(Answer("queued"))
    upstream.when("magic", Answer("ruled"))

    async def ask(prompt: str) -> str:
        _, body = await post(
            upstream, {"model": "gpt-4.1", "messages": [{"role": "user", "content": prompt}]}
        )
        return str(body["choices"][0]["message"]["content"])

    assert await ask("some magic here") == "ruled"
    assert await ask("plain") == "queued"
    assert await ask("plain") == "default"
    upstream.when("plain", lambda received: Answer(received.prompt.upper())(received))
    assert await ask("plain words") == "PLAIN WORDS"
    upstream.reset()
    assert await ask("some magic here") == "default"
    assert len(upstream.requests) == 1


async def test_a_gate_holds_an_answer_and_a_disconnect_is_noticed(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    gate = Gate()
    upstream.script(Answer("one two three", at={2: gate}))
    stream = await client.chat.completions.create(**GOOD, stream=True)
    await gate.reached.wait()
    received = await upstream.received()
    assert received.prompt == "Hi"
    assert received.tokens_sent == 2
    assert received.left_at is None
    await stream.close()
    async with asyncio.timeout(20):
        await received.left.wait()
        await received.done.wait()
    assert received.left_at is not None
    assert received.left_at >= received.at


async def test_an_opened_gate_lets_the_answer_continue(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    gate = Gate()
    upstream.script(Answer("one two", before=(gate,)))
    request_task = asyncio.create_task(client.chat.completions.create(**GOOD))
    await gate.reached.wait()
    assert not request_task.done()
    gate.open()
    assert (await request_task).choices[0].message.content == "one two"
    assert not upstream.requests[0].left.is_set()


TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def test_the_official_client_reads_tool_calls(
    upstream: FaultUpstream, client: openai.AsyncOpenAI
) -> None:
    calls = (Call("weather", '{"city":"Zürich"}'), Call("weather"))
    upstream.script(*[Answer("Hm.", tool_calls=calls, finish_reason="tool_calls")] * 2)
    answer = await client.chat.completions.create(**GOOD, tools=[TOOL])
    async with client.chat.completions.stream(**GOOD, tools=[TOOL]) as stream:
        streamed = await stream.get_final_completion()
    for choice in (answer.choices[0], streamed.choices[0]):
        assert (choice.message.content, choice.finish_reason) == ("Hm.", "tool_calls")
        functions = [call.function for call in choice.message.tool_calls or () if call.type == "function"]
        assert [(each.name, each.arguments) for each in functions] == [
            ("weather", '{"city":"Zürich"}'),
            ("weather", "{}"),
        ]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0]",
        ),
        ({"model": "gpt-5.6-sol", "tools": [TOOL]}, "reasoning_effort"),
    ],
)
async def test_tools_that_the_vendor_would_refuse_are_refused(
    upstream: FaultUpstream, client: openai.AsyncOpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**(GOOD | change))
    assert refused.value.param == param
