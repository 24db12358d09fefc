"""Loops of tool calls with models that require the thoughts behind their calls, which callers do not have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from pomelo.testing import Answer, Call, Received, Reply, VendorProtocol, openai_protocol
from pomelo.testing.reply import json_reply
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL_AND_STREAM

CATALOGUE = """
[models.MODEL]
type = "text"
limits = { max_input_tokens = 10_000, max_output_tokens = 1_000 }
price = { million_input_tokens = "10", million_output_tokens = "20" }
price_version = "2026-11-26"
[[models.MODEL.routes]]
provider = "openrouter"
model = "MODEL"
"""

TIME = {"type": "function", "function": {"name": "time"}}


def calls(name: str, *ids: str) -> list[dict[str, Any]]:
    """Tool calls of a message."""
    return [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids]


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "What time is it, twice?"},
    {"role": "assistant", "content": None, "tool_calls": calls("time", "a", "b")},
    {"role": "tool", "tool_call_id": "a", "content": "noon"},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "assistant", "content": "Noon."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Well.", "tool_calls": calls("time", "c")},
    {"role": "tool", "tool_call_id": "c", "content": "one"},
]


def google(body: dict[str, Any]) -> Any:
    """Gemini's refusal: the first call of each message needs a signature."""
    for message in body["messages"]:
        for index, call in enumerate(message.get("tool_calls", ())):
            extra = call.pop("extra_content", None)
            signed = extra == {"google": {"thought_signature": "skip_thought_signature_validator"}}
            if signed != (index == 0):
                said = (
                    "Function call is missing a thought_signature in functionCall parts. This is required for "
                    f"tools to work correctly. Additional data, function call `default_api:time`, position {index}."
                )
                return [{"error": {"code": 400, "message": said, "status": "INVALID_ARGUMENT"}}]
    return None


def deepseek(body: dict[str, Any]) -> Any:
    """DeepSeek's refusal: each message of the assistant needs its thoughts."""
    if all(each.pop("reasoning_content", None) for each in body["messages"] if each["role"] == "assistant"):
        return None
    said = "The `reasoning_content` in the thinking mode must be passed back to the API."
    return {"error": {"message": said, "type": "invalid_request_error", "code": "invalid_request_error"}}


def kimi(body: dict[str, Any]) -> Any:
    """Kimi's refusal, as OpenRouter passes it on: each message with calls needs its thoughts."""
    for index, message in enumerate(body["messages"]):
        if not message.pop("reasoning_content", None) and "tool_calls" in message:
            said = (
                "thinking is enabled but reasoning_content is missing in assistant tool call message "
                f"at index {index}"
            )
            return {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": said}}}
    return None


def stubborn(body: dict[str, Any]) -> Any:
    """A refusal whatever the request has."""
    return deepseek({"messages": [{"role": "assistant"}]})


def thinker(refusal: Callable[[dict[str, Any]], Any]) -> VendorProtocol:
    """A host whose model has the name of its refusal. Besides it, it takes what OpenAI takes."""

    def refused(received: Received, api_key: str | None) -> Reply | None:
        body = deepcopy(received.body)
        if body["messages"][1:] and (error := refusal(body)) is not None:
            return json_reply(error, 400)
        return openai_protocol.refused(replace(received, body=body), api_key)

    name = refusal.__name__
    return replace(
        openai_protocol.PROTOCOL,
        name=name,
        serves=lambda received: received.body["model"] == name,
        refused=refused,
    )


THINKERS = (google, deepseek, kimi, stubborn)


@pytest.fixture(scope="module", name="app")
async def _app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("loops")
    names = [*(refusal.__name__ for refusal in THINKERS), "plain"]
    (folder / "catalog.toml").write_text("".join(CATALOGUE.replace("MODEL", name) for name in names))
    settings = {"catalog": folder / "catalog.toml", "openrouter_api_key": "o-x"}
    async with run_app(folder, settings=settings, protocols=map(thinker, THINKERS)) as opened:
        yield opened


@pytest.mark.parametrize("model", ["google", "deepseek", "kimi"])
@PROTOCOL_AND_STREAM
async def test_a_tool_loop_goes_on_without_the_thoughts(
    app: RunningApp, model: str, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    app.upstream.reset()
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    app.upstream.default = Answer("One o'clock.", usage=usage)
    body = {"model": model, "tools": [TIME]}
    response = await app.ask(protocol, caller.live, {**body, "messages": HISTORY}, stream=stream)
    assert (response.code, response.content) == ("ok", "One o'clock.")
    record = await app.only_record(caller, response)
    assert (record.input_tokens, record.output_tokens, record.source) == (100, 2, "provider")

    sent = len(app.upstream.requests)
    assert sent in (1, 2)  # the first task of the model learns what it misses
    caller = await app.account()
    response = await app.ask(protocol, caller.live, {**body, "messages": HISTORY}, stream=stream)
    assert response.code == "ok"
    assert len(app.upstream.requests) == sent + 1


@PROTOCOL_AND_STREAM
async def test_a_model_that_refuses_the_placeholders_too_is_asked_twice(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    app.upstream.reset()
    body = {"model": "stubborn", "tools": [TIME], "messages": HISTORY}
    response = await app.ask(protocol, caller.live, body, stream=stream)
    assert (response.code, len(app.upstream.requests)) == ("provider_failed", 2)
    assert (await app.balance(caller, live=True)).spent == 0


@PROTOCOL_AND_STREAM
async def test_another_model_of_the_host_gets_no_placeholders(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    for model in ("google", "deepseek"):
        await app.ask(protocol, caller.live, {"model": model, "tools": [TIME], "messages": HISTORY})
    app.upstream.reset()
    app.upstream.default = Answer("One", tool_calls=(Call("time"),))
    body = {"model": "plain", "tools": [TIME], "messages": HISTORY}
    response = await app.ask(protocol, caller.live, body, stream=stream)
    assert (response.code, len(app.upstream.requests)) == ("ok", 1)
