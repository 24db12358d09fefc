"""The vendor for tests speaks the real protocol: Mistral's own client reads it, and it refuses what Mistral refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from pomelo.testing import Call, FaultUpstream
from pomelo.testing.mistral_protocol import Answer, error_reply
from tests.providers.rig import KEY, ask

if TYPE_CHECKING:
    from mistralai.client import Mistral

GOOD: dict[str, Any] = {"model": "mistral-small-latest", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(name="client")
async def _client(upstream: FaultUpstream) -> AsyncIterator[Mistral]:
    from mistralai.client import Mistral  # takes half a second, so not with this module

    async with Mistral(server_url=upstream.mistral_base_url, api_key=KEY) as client:
        yield client


async def test_the_official_client_reads_a_unary_answer(upstream: FaultUpstream, client: Mistral) -> None:
    upstream.script(Answer("Grüße 🍊 there"))
    answer = await client.chat.complete_async(**GOOD, random_seed=7)
    assert answer.choices[0].message is not None
    assert answer.choices[0].message.content == "Grüße 🍊 there"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)


async def test_the_official_client_reads_an_answer_with_thinking(
    upstream: FaultUpstream, client: Mistral
) -> None:
    upstream.script(Answer("Grüße", thinking="hm"))
    answer = await client.chat.complete_async(**GOOD)
    assert answer.choices[0].message is not None
    content: Any = answer.choices[0].message.content
    assert [part.type for part in content] == ["thinking", "text"]
    assert content[1].text == "Grüße"


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
@pytest.mark.parametrize("thinking", [None, "hm"])
async def test_the_official_client_reads_a_stream(
    upstream: FaultUpstream, client: Mistral, packing: Any, thinking: str | None
) -> None:
    upstream.script(Answer("Grüße 🍊 there", packing=packing, thinking=thinking))
    text, usage, finish = "", None, None
    async with await client.chat.stream_async(**GOOD) as stream:
        async for event in stream:
            choice = event.data.choices[0]
            content: Any = choice.delta.content
            if isinstance(content, list):
                content = "".join(part.text for part in content if part.type == "text")
            text += content or ""
            usage, finish = event.data.usage or usage, choice.finish_reason or finish
    assert (text, finish) == ("Grüße 🍊 there", "stop")
    assert usage is not None
    assert (usage.prompt_tokens, usage.total_tokens) == (1, 4)


async def test_the_official_client_sees_refusals_of_the_vendor(
    upstream: FaultUpstream, client: Mistral
) -> None:
    from mistralai.client import Mistral
    from mistralai.client.errors import HTTPValidationError, SDKError

    upstream.script(error_reply(429, "rate_limited", "1300"))
    with pytest.raises(SDKError) as limited:
        await client.chat.complete_async(**GOOD)
    assert limited.value.status_code == 429
    with pytest.raises(HTTPValidationError) as refused:
        await client.chat.complete_async(**GOOD, temperature=3)
    assert refused.value.data.detail is not None
    assert refused.value.data.detail[0].loc == ["body", "temperature"]
    async with Mistral(server_url=upstream.mistral_base_url, api_key="sk-wrong") as client:
        with pytest.raises(SDKError) as unknown:
            await client.chat.complete_async(**GOOD)
    assert unknown.value.status_code == 401


async def post(upstream: FaultUpstream, body: Any) -> tuple[int, Any]:
    """Status and JSON of a request."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return await ask("POST", upstream.mistral_base_url + "/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize(
    ("change", "kind", "place"),
    [
        ({"model": None}, "missing", ["model"]),
        ({"messages": []}, "value_error", ["messages"]),
        ({"messages": [{"role": "king", "content": "x"}]}, "value_error", ["messages", 0, "role"]),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "extra_forbidden", ["messages", 0, "name"]),
        ({"messages": [{"role": "system"}]}, "missing", ["messages", 0, "content"]),
        ({"user": "alice"}, "extra_forbidden", ["user"]),
        ({"seed": 1}, "extra_forbidden", ["seed"]),
        ({"stream": True, "stream_options": {}}, "extra_forbidden", ["stream_options"]),
        ({"max_completion_tokens": 1}, "extra_forbidden", ["max_completion_tokens"]),
        ({"temperature": 1.6}, "value_error", ["temperature"]),
        ({"top_p": 0}, "value_error", ["top_p"]),
        ({"random_seed": -1}, "value_error", ["random_seed"]),
        ({"stop": [1]}, "value_error", ["stop"]),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "value_error",
            ["messages", 0, "content", 0, "type"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]},
            "extra_forbidden",
            ["messages", 0, "content", 0, "mood"],
        ),
    ],
)  # fmt: skip
async def test_what_the_vendor_would_refuse_is_refused_with_its_path(
    upstream: FaultUpstream, change: dict[str, Any], kind: str, place: list[Any]
) -> None:
    status, body = await post(upstream, GOOD | change)
    assert status == 422
    assert (body["detail"][0]["type"], body["detail"][0]["loc"]) == (kind, ["body", *place])


@pytest.mark.parametrize(
    ("roles", "status"),
    [
        ("user", 200),
        ("system system user user assistant user system", 200),
        ("assistant user", 200),
        ("user assistant", 400),
        ("assistant", 400),
        ("user assistant system user", 400),
    ],
)
async def test_the_order_of_roles_is_checked(upstream: FaultUpstream, roles: str, status: int) -> None:
    assert await ordered(upstream, [{"role": role, "content": "x"} for role in roles.split()]) == status


async def test_a_prefilled_answer_is_accepted_with_its_prefix_and_an_empty_one_is_not(
    upstream: FaultUpstream,
) -> None:
    user = {"role": "user", "content": "x"}
    assert await ordered(upstream, [user, {"role": "assistant", "content": "So", "prefix": True}]) == 200
    assert await ordered(upstream, [{"role": "assistant", "content": ""}, user]) == 400


async def ordered(upstream: FaultUpstream, messages: list[dict[str, Any]]) -> int:
    """The status of a request with these messages; a refusal is one for their order."""
    status, body = await post(upstream, GOOD | {"messages": messages})
    if status != 200:
        assert (body["type"], body["code"]) == ("invalid_request_message_order", "3230")
    return status


async def test_the_official_client_reads_tool_calls(upstream: FaultUpstream, client: Mistral) -> None:
    calls = (Call("weather", '{"city":"Zürich"}'), Call("weather"))
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    upstream.script(*[Answer("", tool_calls=calls, finish_reason="tool_calls")] * 2)
    answer = await client.chat.complete_async(**GOOD, tools=tools)
    assert answer.choices[0].message is not None
    found = [answer.choices[0].message.tool_calls]
    async with await client.chat.stream_async(**GOOD, tools=tools) as stream:
        found += [event.data.choices[0].delta.tool_calls async for event in stream]
    whole, streamed = [each for each in found if each]
    for tool_calls in (whole, streamed):
        functions = [call.function for call in tool_calls]
        assert [(each.name, each.arguments) for each in functions] == [
            ("weather", '{"city":"Zürich"}'),
            ("weather", "{}"),
        ]
