"""Members that SDKs and frameworks add to messages and items are taken: parsed objects, the index of a call
in a stream, the media type of an image."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.openapi.examples import IMAGE
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


async def test_an_unknown_member_of_a_text_in_an_item_is_refused_as_described(gateway: GatewayApp) -> None:
    part = {"type": "input_text", "text": "Hi", "colour": "red"}
    body = {"model": "gpt-4", "input": [{"role": "user", "content": [part]}]}
    assert faults("ResponseRequest", body) != []
    refused = await error_of(post(gateway, RESPONSES, body))
    assert refused == (400, "invalid_parameter", "input[0].content[0].colour")
