"""Tools of chat completions and responses that are refused by name, and the users that requests name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.openai.media_requests import post
from tests.gateway.requests import HAIKU_ONLY, HI

CHAT, RESPONSES, IMAGES = "chat/completions", "responses", "images/generations"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: HI,
    RESPONSES: {"model": "gpt-4", "input": "Hi"},
    IMAGES: {"model": "flux-1-pro", "prompt": "a kite"},
}


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


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"safety_identifier": "ann"}, "ann"),
        ({"user": "bob", "safety_identifier": "ann"}, "ann"),
        ({"user": "bob", "safety_identifier": ""}, "bob"),
        ({"user": "bob", "safety_identifier": None}, "bob"),
    ],
)
async def test_the_safety_identifier_is_the_user_unless_it_is_empty(
    gateway: GatewayApp, path: str, fields: dict[str, Any], user: str
) -> None:
    async with post(gateway, path, BODIES[path] | fields) as response:
        assert response.status == 200
    assert gateway.provider.jobs[-1].user == user


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


async def test_each_part_of_the_reasoning_without_effect_is_reported(gateway: GatewayApp) -> None:
    reasoning = {"effort": "low", "summary": "auto", "context": "auto", "generate_summary": None}
    async with post(gateway, RESPONSES, BODIES[RESPONSES] | {"reasoning": reasoning}) as response:
        assert response.status == 200
        reported = response.headers["X-Pomelo-Adjusted"].split("; ")
    assert [name for name in reported if name.startswith("reasoning.") and "=" not in name] == [
        "reasoning.summary"
    ]


@pytest.mark.parametrize(("name", "code"), [("gpt-4", "model_not_allowed"), ("gpt-0", "model_not_found")])
async def test_a_model_that_the_key_may_not_use_is_not_called_unknown(
    gateway: GatewayApp, name: str, code: str
) -> None:
    url, headers = f"{gateway.url}/v1/models/{name}", {"Authorization": f"Bearer {HAIKU_ONLY}"}
    async with gateway.http.get(url, headers=headers) as response:
        assert (await response.json())["error"]["code"] == code
