"""Parameters of chat completions and responses that can't be obeyed are refused, and the users they name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.requests import HI

CHAT, RESPONSES, IMAGES = "chat/completions", "responses", "images/generations"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: HI,
    RESPONSES: {"model": "gpt-4", "input": "Hi"},
    IMAGES: {"model": "flux-1-pro", "prompt": "a kite"},
}


@pytest.mark.parametrize(
    ("path", "fields", "parameter"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (CHAT, {"service_tier": "flex"}, "service_tier"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"conversation": "conv_1"}, "conversation"),
        (RESPONSES, {"prompt": {"id": "p"}}, "prompt"),
        (RESPONSES, {"background": 0}, "background"),
        (RESPONSES, {"top_logprobs": False}, "top_logprobs"),
    ],
)
async def test_a_parameter_that_can_not_be_obeyed_is_refused(
    gateway: GatewayApp, path: str, fields: dict[str, Any], parameter: str
) -> None:
    refused = await error_of(post(gateway, path, BODIES[path] | fields))
    assert refused == (400, "invalid_parameter", parameter)


ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}


@pytest.mark.parametrize(
    ("path", "given", "parameter"),
    [
        (CHAT, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "now"}}]}, "tools[0].type"),
        (RESPONSES, {"tool_choice": ALLOWED}, "tool_choice.type"),
    ],
)
async def test_the_type_of_a_tool_or_choice_is_refused_before_its_members(
    gateway: GatewayApp, path: str, given: dict[str, Any], parameter: str
) -> None:
    async with post(gateway, path, BODIES[path] | given) as response:
        error = (await response.json())["error"]
    assert error["message"] == f"Invalid {parameter}: must be function"
    assert (error["code"], error["param"]) == ("invalid_parameter", parameter)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_strict_handling_refuses_a_parameter_without_effect(gateway: GatewayApp, path: str) -> None:
    body = BODIES[path] | {"store": True}
    assert await error_of(post(gateway, path, body, headers=STRICT)) == (400, "invalid_parameter", "store")
    async with post(gateway, path, body) as response:
        assert (response.status, response.headers["X-Pomelo-Adjusted"]) == (200, "store")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "user"),
    [({"safety_identifier": "ann"}, "ann"), ({"user": "bob", "safety_identifier": "ann"}, "ann")],
)
async def test_the_identifier_of_the_user_reaches_the_provider(
    gateway: GatewayApp, path: str, fields: dict[str, Any], user: str
) -> None:
    async with post(gateway, path, BODIES[path] | fields) as response:
        assert response.status == 200
    assert gateway.provider.jobs[-1].user == user


async def test_an_empty_identifier_of_an_image_replaces_no_user(gateway: GatewayApp) -> None:
    async with post(gateway, IMAGES, BODIES[IMAGES] | {"user": "bob", "safety_identifier": ""}) as response:
        assert response.status == 200
    assert gateway.provider.jobs[-1].user == "bob"


@pytest.mark.parametrize(
    ("path", "given", "parameter"),
    [
        (
            CHAT,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0]",
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}]},
            "input[0]",
        ),
    ],
)
async def test_a_call_without_its_result_is_refused_in_words_of_both_forms(
    gateway: GatewayApp, path: str, given: dict[str, Any], parameter: str
) -> None:
    async with post(gateway, path, BODIES[path] | {"model": "gpt-4"} | given) as response:
        error = (await response.json())["error"]
    assert (
        error["message"] == f"Invalid {parameter}: must be answered by the result of the tool, right after it"
    )
