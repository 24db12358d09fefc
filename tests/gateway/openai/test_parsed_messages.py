"""Members that SDKs and frameworks add to messages and items are taken: parsed objects, the index of a call
in a stream, the media type of an image, members of a message in its parts, thoughts, hints for caches."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.openapi.examples import IMAGE
from pomelo.gen.v1.text_pb2 import ImageDetail
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.openai.test_description import faults
from tests.gateway.requests import HI

CHAT, RESPONSES = "chat/completions", "responses"
FUNCTION = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("more", [{}, {"index": 0}], ids=["whole", "joined from the pieces of a stream"])
async def test_a_call_that_an_sdk_has_parsed_can_be_sent_back(
    gateway: GatewayApp, more: dict[str, Any]
) -> None:
    function = {"name": "now", "arguments": "{}", "parsed_arguments": {"zone": None}}
    call = {"id": "c", "type": "function", "function": function, **more}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "parsed": {"sky": "clear"}}
    answered = {"role": "tool", "tool_call_id": "c", "content": "noon"}
    body = HI | {"model": "gpt-4", "messages": [*HI["messages"], called, answered], "tools": [FUNCTION]}
    assert faults("ChatCompletionRequest", body) == []
    async with post(gateway, CHAT, body, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    assert gateway.provider.jobs[-1].input.messages[1].content[0].tool_call.arguments_json == "{}"


async def test_items_that_an_sdk_has_parsed_can_be_sent_back(gateway: GatewayApp) -> None:
    text = {
        "type": "output_text",
        "text": "{}",
        "annotations": [],
        "logprobs": [],
        "parsed": {"sky": "clear"},
    }
    said = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
    call = {"type": "function_call", "id": "f", "call_id": "c", "name": "now", "arguments": "{}"}
    called = {**call, "status": "completed", "parsed_arguments": {"zone": None}}
    answered = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    body = {"model": "gpt-4", "input": [{"role": "user", "content": "Hi"}, said, called, answered]}
    assert faults("ResponseRequest", body) == []
    async with post(gateway, RESPONSES, body, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    first, second = gateway.provider.jobs[-1].input.messages[1].content
    assert (first.text, second.tool_call.arguments_json) == ("{}", "{}")


async def test_an_image_may_have_its_media_type_beside_its_url(gateway: GatewayApp) -> None:
    def asked(media_type: Any) -> dict[str, Any]:
        image = {"url": IMAGE, "detail": "auto", "format": media_type}
        part = {"type": "image_url", "image_url": image}
        return {"model": "gpt-4", "messages": [{"role": "user", "content": [part]}]}

    assert faults("ChatCompletionRequest", asked("image/jpeg")) == []
    async with post(gateway, CHAT, asked("image/jpeg"), headers=STRICT) as response:
        assert response.status == 200, await response.text()
    sent = gateway.provider.jobs[-1].input.messages[0].content[0].image
    assert sent.source.url.startswith("data:image/png;base64,")
    refused = await error_of(post(gateway, CHAT, asked(1)))
    assert refused == (400, "invalid_parameter", "messages[0].content[0].image_url.format")


async def test_an_image_may_be_its_url_alone(gateway: GatewayApp) -> None:
    part = {"type": "image_url", "image_url": IMAGE}
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": [part]}]}
    assert faults("ChatCompletionRequest", body) == []
    async with post(gateway, CHAT, body, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    assert gateway.provider.jobs[-1].input.messages[0].content[0].image.source.url == IMAGE


async def test_a_part_of_the_assistant_may_have_copies_of_members_of_its_message(gateway: GatewayApp) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    copied = {"role": "assistant", "refusal": None, "annotations": [], "tool_calls": [call]}
    part = {"type": "text", "text": "Wait.", **copied}
    said = {"role": "assistant", "content": [part], "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "c", "content": "noon"}
    body = {"model": "gpt-4", "messages": [*HI["messages"], said, answered], "tools": [FUNCTION]}
    async with post(gateway, CHAT, body, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    text, sent = gateway.provider.jobs[-1].input.messages[1].content
    assert (text.text, sent.tool_call.id) == ("Wait.", "c")
    asked = {"role": "user", "content": [part]}
    refused = await error_of(post(gateway, CHAT, body | {"messages": [asked]}))
    assert refused == (400, "invalid_parameter", "messages[0].content[0].role")


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning": "Hm."},
        {"reasoning_content": "Hm."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]},
    ],
    ids=lambda each: next(iter(each)),
)
async def test_what_a_model_of_another_provider_thought_is_left_out(
    gateway: GatewayApp, thought: dict[str, Any]
) -> None:
    said = {"role": "assistant", "content": "Yes.", **thought}
    body = {"model": "gpt-4", "messages": [*HI["messages"], said, *HI["messages"]]}
    async with post(gateway, CHAT, body, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    sent = gateway.provider.jobs[-1].input.messages[1]
    assert [part.text for part in sent.content] == ["Yes."]
    (name,) = thought
    refused = await error_of(
        post(gateway, CHAT, body | {"messages": [{"role": "user", "content": "Hi", **thought}]})
    )
    assert refused == (400, "invalid_parameter", f"messages[0].{name}")


@pytest.mark.parametrize("hint", ["cache_control", "prompt_cache_breakpoint"])
async def test_a_part_may_have_a_hint_for_a_cache(gateway: GatewayApp, hint: str) -> None:
    marked: dict[str, Any] = {hint: {"type": "ephemeral"}}
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": "Hi"},
        {"type": "image_url", "image_url": {"url": IMAGE}},
    ]
    items: list[dict[str, Any]] = [
        {"type": "input_text", "text": "Hi"},
        {"type": "input_image", "image_url": IMAGE},
    ]
    for path, name, content in ((CHAT, "messages", parts), (RESPONSES, "input", items)):
        asked = {"role": "user", "content": [part | marked for part in content]}
        async with post(gateway, path, {"model": "gpt-4", name: [asked]}, headers=STRICT) as response:
            assert response.status == 200, await response.text()
        text, image = gateway.provider.jobs[-1].input.messages[0].content
        assert (text.text, image.image.source.url) == ("Hi", IMAGE)


async def test_the_detail_original_of_an_image_is_high(gateway: GatewayApp) -> None:
    part = {"type": "image_url", "image_url": {"url": IMAGE, "detail": "original"}}
    item = {"type": "input_image", "image_url": IMAGE, "detail": "original"}
    for path, schema, body in (
        (CHAT, "ChatCompletionRequest", {"messages": [{"role": "user", "content": [part]}]}),
        (RESPONSES, "ResponseRequest", {"input": [{"role": "user", "content": [item]}]}),
    ):
        request = {"model": "gpt-4", **body}
        assert faults(schema, request) == []
        async with post(gateway, path, request, headers=STRICT) as response:
            assert response.status == 200, await response.text()
        image = gateway.provider.jobs[-1].input.messages[0].content[0].image
        assert image.detail == ImageDetail.IMAGE_DETAIL_HIGH


async def test_an_unknown_member_of_a_text_in_an_item_is_refused_as_described(gateway: GatewayApp) -> None:
    part = {"type": "input_text", "text": "Hi", "colour": "red"}
    body = {"model": "gpt-4", "input": [{"role": "user", "content": [part]}]}
    assert faults("ResponseRequest", body) != []
    refused = await error_of(post(gateway, RESPONSES, body))
    assert refused == (400, "invalid_parameter", "input[0].content[0].colour")
