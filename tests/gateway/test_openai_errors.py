"""Every error of a path under /v1 has the shape and the headers that OpenAI's SDKs read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.errors import PomeloError
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import HI, KEY, Sending, read_response
from tests.gateway.scripts import play, text_events

CHAT = "/v1/chat/completions"
JSON_BODY = {"Content-Type": "application/json"}


async def error_of(request: Sending, status: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the error of a response and its headers."""
    async with request as response:
        assert response.status == status
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-Id"]
        value = await response.json()
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "param", "code"}
        return value["error"], dict(response.headers)


def post_chat(gateway: GatewayApp, body: Any = None, **more: Any) -> Sending:
    headers = gateway.headers | more.pop("headers", {})
    more |= {} if body is None else {"json": body}
    return gateway.http.post(gateway.url + CHAT, headers=headers, **more)


async def test_an_unknown_path_and_method_under_v1_have_the_shape_of_openai(gateway: GatewayApp) -> None:
    error, _ = await error_of(gateway.get("/v1/assistants"), 404)
    assert (error["code"], error["type"], error["param"]) == ("not_found", "invalid_request_error", None)
    error, headers = await error_of(gateway.get(CHAT), 405)
    assert error["code"] == "method_not_allowed"
    assert headers["Allow"] == "POST"


async def test_a_bad_key_is_refused_before_the_body_in_the_shape_of_openai(gateway: GatewayApp) -> None:
    error, headers = await error_of(
        post_chat(gateway, data=b"{" * 100, headers={"Authorization": "Bearer no"}), 401
    )
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert headers["X-Should-Retry"] == "false"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({**HI, "temperature": 3}, "temperature", "invalid_parameter"),
        ({**HI, "nonsense": 1}, "nonsense", "invalid_parameter"),
        ({"model": "gpt-4"}, "messages", "missing_parameter"),
        ({"messages": HI["messages"]}, "model", "missing_parameter"),
        ({**HI, "model": "gpt-99"}, "model", "unsupported_model"),
        ({**HI, "model": "flux-1-pro"}, "model", "invalid_parameter"),
    ],
)
async def test_an_error_of_a_field_names_it_as_param(
    gateway: GatewayApp, body: dict[str, Any], param: str, code: str
) -> None:
    error, headers = await error_of(post_chat(gateway, body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert headers["X-Pomelo-Mode"] == "test"


CALL = {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "noon"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": 1}, "input"),
        ({"instructions": 1}, "instructions"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        ({"input": [{"role": "pilot", "content": "Hi"}]}, "input[0].role"),
        ({"input": [CALL, "Hi"]}, "input[1]"),
        ({"input": [CALL, {**CALL, "call_id": 1}]}, "input[1].call_id"),
        ({"input": [CALL, {**CALL, "call_id": "d", "name": 1}]}, "input[1].name"),
        ({"input": [CALL, {**CALL, "call_id": "d", "arguments": 1}]}, "input[1].arguments"),
        ({"input": [CALL, CALL]}, "input[1].call_id"),
        ({"input": [CALL, {**OUTPUT, "output": 1}]}, "input[1].output"),
        ({"input": [CALL, {**OUTPUT, "call_id": "d"}]}, "input[1].call_id"),
        ({"input": [CALL, {"role": "assistant", "content": 1}, OUTPUT]}, "input[1].content[0].text"),
        ({"input": [{"type": "reasoning"}, CALL]}, "input[1]"),
    ],
)
async def test_an_error_of_an_item_of_a_response_names_its_own_members(
    gateway: GatewayApp, more: dict[str, Any], param: str
) -> None:
    body = {"model": "gpt-4", "input": "Hi", **more}
    request = gateway.http.post(f"{gateway.url}/v1/responses", json=body, headers=gateway.headers)
    error, _ = await error_of(request, 400)
    assert error["param"] == param
    assert f" {param}: must be" in error["message"]


async def test_a_body_that_is_too_large_or_no_json_has_the_shape_of_openai(open_gateway: OpenApp) -> None:
    async with open_gateway(json_limit=1000) as gateway:
        error, _ = await error_of(post_chat(gateway, data=b" " * 1001, headers=JSON_BODY), 413)
        assert error["code"] == "payload_too_large"
        error, _ = await error_of(post_chat(gateway, data=b"x", headers=JSON_BODY), 400)
        assert error["code"] == "invalid_body"
        error, _ = await error_of(post_chat(gateway, data={"model": "gpt-4"}), 415)
        assert error["code"] == "unsupported_media_type"


async def test_a_head_that_can_not_be_read_has_no_path_and_so_the_plain_shape(open_gateway: OpenApp) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    async with (
        open_gateway() as gateway,
        gateway.connect(head.encode() + b"X-Pad: " + b"x" * 9000 + b"\r\n\r\n") as (reader, _),
    ):
        status, _, body = await read_response(reader)
        assert status == 400
        assert set(json.loads(body)["error"]) == {"message", "type", "code"}


@pytest.mark.parametrize(
    ("error", "retry", "retry_after"),
    [
        (PomeloError("provider_unavailable"), "true", "5"),
        (PomeloError("provider_not_configured"), "false", "60"),
        (PomeloError("provider_failed"), "false", None),
        (PomeloError("deadline_exceeded"), "false", None),
        (PomeloError("token_limit_exceeded"), "true", "60"),
        (PomeloError("token_limit_exceeded", values={"requested": 50_000}), "false", "60"),
    ],
)
async def test_an_error_says_whether_sdks_should_retry(
    gateway: GatewayApp, error: PomeloError, retry: str, retry_after: str | None
) -> None:
    gateway.provider.script = play(error)
    async with post_chat(gateway, HI) as response:
        assert (await response.json())["error"]["code"] == error.code
        assert response.headers["X-Should-Retry"] == retry
        assert response.headers.get("Retry-After") == retry_after


async def test_a_stream_that_fails_ends_with_an_error_and_without_done(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*text_events("Hello")[:-1], PomeloError("provider_failed"))
    async with post_chat(gateway, {**HI, "stream": True}) as response:
        assert response.status == 200
        events = (await response.text()).split("\n\n")
    assert events.pop() == ""
    assert "[DONE]" not in events[-1]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["param"]) == ("provider_failed", None)


async def test_the_paths_under_api_keep_their_errors(gateway: GatewayApp) -> None:
    async with gateway.get("/api/v1/nothing") as response:
        assert set((await response.json())["error"]) == {"message", "type", "code"}
        assert "X-Should-Retry" not in response.headers
