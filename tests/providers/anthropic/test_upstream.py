"""The vendor for tests speaks the real protocol: Anthropic's own client reads it, and it refuses what Anthropic does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from pomelo.testing import Call, FaultUpstream, Stop
from pomelo.testing.anthropic_protocol import Answer, error_event, error_reply
from tests.providers.rig import KEY, ask

if TYPE_CHECKING:
    import anthropic

GOOD: dict[str, Any] = {
    "model": "claude-haiku-4-5",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Hi"}],
}


@pytest.fixture(name="client")
async def _client(upstream: FaultUpstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic  # takes nearly two seconds, so not with this module

    async with anthropic.AsyncAnthropic(
        base_url=upstream.anthropic_base_url, api_key=KEY, max_retries=0
    ) as client:
        yield client


async def test_the_official_client_reads_a_unary_answer(
    upstream: FaultUpstream, client: anthropic.AsyncAnthropic
) -> None:
    upstream.script(Answer("Grüße 🍊 there", thinking="hm"))
    answer = await client.messages.create(**GOOD, system="Be brief.")
    thought, text = answer.content
    assert (thought.type, thought.type == "thinking" and thought.thinking) == ("thinking", "hm")
    assert text.type == "text"
    assert text.text == "Grüße 🍊 there"
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 3)


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
async def test_the_official_client_reads_a_stream(
    upstream: FaultUpstream, client: anthropic.AsyncAnthropic, packing: Any
) -> None:
    upstream.script(Answer("Grüße 🍊 there", packing=packing, thinking="hm"))
    async with client.messages.stream(**GOOD) as stream:
        assert [text async for text in stream.text_stream] == ["Grüße", " 🍊", " there"]
        answer = await stream.get_final_message()
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 3)


async def test_the_official_client_sees_refusals_of_the_vendor(
    upstream: FaultUpstream, client: anthropic.AsyncAnthropic
) -> None:
    import anthropic

    upstream.script(error_reply(429, "rate_limit_error"), error_reply(529, "overloaded_error"))
    with pytest.raises(anthropic.RateLimitError) as limited:
        await client.messages.create(**GOOD)
    assert limited.value.request_id == "req_test0001"
    with pytest.raises(anthropic.APIStatusError) as busy:
        await client.messages.create(**GOOD)
    assert busy.value.status_code == 529
    with pytest.raises(anthropic.AuthenticationError):
        await client.with_options(api_key="sk-wrong").messages.create(**GOOD)
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
        await client.messages.create(**GOOD, stop_sequences=["\n"])


async def test_the_official_client_sees_an_error_within_a_stream(
    upstream: FaultUpstream, client: anthropic.AsyncAnthropic
) -> None:
    import anthropic

    upstream.script(Answer("one two", at={1: (error_event(), Stop.END)}))
    stream = await client.messages.create(**GOOD, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        async for _ in stream:
            pass


async def post(
    upstream: FaultUpstream, body: Any, version: str = "2023-06-01", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a request."""
    headers = (headers or {"x-api-key": KEY}) | {"anthropic-version": version}
    return await ask("POST", upstream.url + "/v1/messages", json=body, headers=headers)


def user(*blocks: Any) -> dict[str, Any]:
    """A conversation of one message."""
    return {"messages": [{"role": "user", "content": list(blocks)}]}


PICTURE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        (user({"type": "text", "text": ""}), "messages.0.content.0.text"),
        (user({"type": "text", "text": "x", "mood": 1}), "messages.0.content.0.mood"),
        (user({"type": "image_url", "image_url": {"url": "x"}}), "messages.0.content.0.type"),
        (user({"type": "image", "source": PICTURE | {"media_type": "image/bmp"}}), "messages.0.content.0.source.media_type"),
        (user({"type": "image", "source": PICTURE | {"data": "data:"}}), "messages.0.content.0.source.data"),
        (user({"type": "image", "source": {"type": "base64"}}), "messages.0.content.0.source"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"stop": ["END"]}, "stop"),
        ({"seed": 1}, "seed"),
        ({"temperature": 1.1}, "temperature"),
        ({"model": "claude-opus-4-8", "temperature": 1}, "temperature"),
        ({"model": "claude-sonnet-5-5", "top_p": 1}, "top_p"),
        ({"metadata": {"user": "x"}}, "metadata.user"),
        ({"metadata": {"user_id": "a@b.c"}}, "metadata.user_id"),
        ({"metadata": {"user_id": "a" * 513}}, "metadata.user_id"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"temperature": 1, "top_p": 1}, "temperature and top_p exclude each other"),
        (
            {"model": "claude-sonnet-4-6", "messages": [*GOOD["messages"], {"role": "assistant", "content": "So"}]},
            "This model does not support assistant message prefill",
        ),
    ],
)  # fmt: skip
async def test_what_the_vendor_would_refuse_is_refused_with_its_path(
    upstream: FaultUpstream, change: dict[str, Any], place: str
) -> None:
    upstream.script(Answer("kept for a valid one"))
    status, body = await post(upstream, GOOD | change)
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["error"]["message"].partition(": ")[0] == place
    _, body = await post(upstream, GOOD)
    assert body["content"][0]["text"] == "kept for a valid one"


async def test_a_wrong_key_or_version_is_refused(upstream: FaultUpstream) -> None:
    assert (await post(upstream, GOOD, **{"x-api-key": "sk-wrong"}))[0] == 401
    assert (await post(upstream, GOOD, **{"Authorization": "Basic sk-right"}))[0] == 401
    assert (await post(upstream, GOOD, **{"Authorization": f"Bearer {KEY}"}))[0] == 200
    assert (await post(upstream, GOOD, version="2020-01-01"))[0] == 400
    assert (await post(upstream, GOOD | {"temperature": 1}, version="2026-10-21"))[0] == 400
    assert (await post(upstream, [GOOD]))[0] == 400


TOOL: Any = {"name": "weather", "input_schema": {"type": "object"}}


@pytest.mark.parametrize("thinking", [None, "hm"])
@pytest.mark.parametrize("text", ["", "Hm."])
async def test_the_official_client_reads_tool_calls(
    upstream: FaultUpstream, client: anthropic.AsyncAnthropic, thinking: str | None, text: str
) -> None:
    calls = (Call("weather", '{"city":"Zürich"}'), Call("weather"))
    upstream.script(*[Answer(text, tool_calls=calls, thinking=thinking, finish_reason="tool_use")] * 2)
    answer = await client.messages.create(**GOOD, tools=[TOOL])
    async with client.messages.stream(**GOOD, tools=[TOOL]) as stream:
        streamed = await stream.get_final_message()
    for message in (answer, streamed):
        blocks: list[Any] = list(message.content)
        assert [block.input for block in blocks if block.type == "tool_use"] == [{"city": "Zürich"}, {}]
        assert len(blocks) == 2 + bool(thinking) + bool(text)
        assert message.stop_reason == "tool_use"


USE = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"name": "weather", "input_schema": {}}]},
        {"tools": [{"name": "a b", "input_schema": {"type": "object"}}]},
        {"tools": [TOOL, TOOL]},
        {"tools": [TOOL | {"strict": True}]},
        {"tools": [TOOL], "tool_choice": {"type": "required"}},
        {"tools": [TOOL], "tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
        {"output_config": {"effort": "minimal"}},
        {"output_config": {"effort": "low"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"model": "claude-opus-4-6", "thinking": {"type": "adaptive"}, "temperature": 1},
        {
            "model": "claude-opus-4-6",
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [TOOL],
            "tool_choice": {"type": "any"},
        },
        *(
            {"tools": tools, "messages": [*GOOD["messages"], *turns]}
            for tools, turns in (
                ([TOOL], [{"role": "assistant", "content": [USE]}]),
                ([TOOL], [{"role": "user", "content": [RESULT]}]),
                ([], [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]),
                (
                    [TOOL],
                    [{"role": "assistant", "content": [USE, USE]}, {"role": "user", "content": [RESULT]}],
                ),
                (
                    [TOOL],
                    [
                        {"role": "assistant", "content": [USE]},
                        {"role": "user", "content": [{"type": "text", "text": "x"}, RESULT]},
                    ],
                ),
            )
        ),
    ],
)
async def test_tools_that_the_vendor_would_refuse_are_refused(
    upstream: FaultUpstream, change: dict[str, Any]
) -> None:
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    status, body = await ask(
        "POST", upstream.anthropic_base_url + "/v1/messages", json=GOOD | change, headers=headers
    )
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
