"""The parameters of chat completions and responses: what changes nothing is accepted, the rest is named."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.openapi.examples import IMAGE as PNG_URI
from gateway.parsing.json import LARGE_BODY
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import Role
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.requests import HI
from tests.gateway.scripts import play, word

CHAT = ("chat/completions", {**HI, "model": "gpt-4"})
RESPONSE = ("responses", {"model": "gpt-4", "input": "Hi"})
FORMS = pytest.mark.parametrize(("path", "body"), [CHAT, RESPONSE], ids=["chat", "responses"])
FUNCTION = {"type": "function", "function": {"name": "now"}}

BOTH: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "stream": None,
    "stream_options": None,
    "store": False,
    "service_tier": "auto",
    "metadata": {},
    "user": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "top_logprobs": 0,
    "moderation": None,
}
CHAT_ONLY: dict[str, Any] = {
    "n": 1,
    "stop": [],
    "seed": None,
    "logprobs": False,
    "logit_bias": {},
    "modalities": ["text"],
    "verbosity": "medium",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "response_format": {"type": "text"},
    "reasoning_effort": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "functions": None,
    "function_call": None,
}
RESPONSE_ONLY: dict[str, Any] = {
    "instructions": None,
    "include": [],
    "background": False,
    "truncation": "disabled",
    "text": {"format": {"type": "text"}, "verbosity": None},
    "reasoning": {"effort": None, "summary": None},
    "max_output_tokens": None,
    "max_tool_calls": None,
    "previous_response_id": None,
    "conversation": None,
    "prompt": None,
}
DEFAULTS = [
    *[pytest.param(form, {name: value}) for form in (CHAT, RESPONSE) for name, value in BOTH.items()],
    *[pytest.param(CHAT, {name: value}) for name, value in CHAT_ONLY.items()],
    *[pytest.param(RESPONSE, {name: value}) for name, value in RESPONSE_ONLY.items()],
    pytest.param(CHAT, {"tool_choice": "none", "parallel_tool_calls": False}),
    pytest.param(RESPONSE, {"tool_choice": "none", "parallel_tool_calls": False}),
    pytest.param(CHAT, {"stream_options": {"include_usage": False, "include_obfuscation": False}}),
    pytest.param(RESPONSE, {"stream_options": {"include_obfuscation": False}}),
    pytest.param(CHAT, {"service_tier": "default"}),
    pytest.param(RESPONSE, {"text": {}, "reasoning": {}}),
    pytest.param(RESPONSE, {"text": {"verbosity": "medium"}, "reasoning": {"context": "auto"}}),
]


@pytest.mark.parametrize(("form", "default"), DEFAULTS)
async def test_a_default_of_clients_changes_nothing_and_is_not_reported(
    gateway: GatewayApp, form: tuple[str, dict[str, Any]], default: dict[str, Any]
) -> None:
    path, body = form
    async with post(gateway, path, body | default, headers=STRICT) as response:
        assert response.status == 200, await response.text()
        assert "X-Pomelo-Adjusted" not in response.headers


@FORMS
@pytest.mark.parametrize(
    "name", ["store", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"]
)
async def test_a_parameter_without_effect_is_reported_or_refused(
    gateway: GatewayApp, path: str, body: dict[str, Any], name: str
) -> None:
    for stream in (False, True):
        given = body | {name: True, "stream": stream}
        async with post(gateway, path, given) as response:
            assert response.status == 200
            assert response.headers["X-Pomelo-Adjusted"] == name
        assert await error_of(post(gateway, path, given, headers=STRICT)) == (400, "invalid_parameter", name)


@pytest.mark.parametrize(
    ("form", "given", "name"),
    [
        (CHAT, {"verbosity": "low"}, "verbosity"),
        (RESPONSE, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSE, {"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ],
    ids=["chat", "responses", "reasoning"],
)
async def test_a_hint_that_agents_send_by_default_is_reported_or_refused(
    gateway: GatewayApp, form: tuple[str, dict[str, Any]], given: dict[str, Any], name: str
) -> None:
    path, body = form
    async with post(gateway, path, body | given) as response:
        assert response.status == 200, await response.text()
        assert response.headers["X-Pomelo-Adjusted"] == name
    assert await error_of(post(gateway, path, body | given, headers=STRICT)) == (
        400,
        "invalid_parameter",
        name,
    )


@pytest.mark.parametrize(
    ("form", "given", "parameter"),
    [
        *[
            (form, given, parameter)
            for form in (CHAT, RESPONSE)
            for given, parameter in (
                ({"service_tier": "priority"}, "service_tier"),
                ({"service_tier": "flex"}, "service_tier"),
                ({"top_logprobs": 2}, "top_logprobs"),
                ({"top_logprobs": False}, "top_logprobs"),
                ({"tool_choice": "required"}, "tool_choice"),
                ({"stream_options": 1}, "stream_options"),
                ({"stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
                ({"user": 1}, "user"),
                ({"safety_identifier": 1}, "safety_identifier"),
                ({"user": "u", "safety_identifier": "x" * 257}, "safety_identifier"),
            )
        ],
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"modalities": ["audio"]}, "modalities"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (RESPONSE, {"background": 0}, "background"),
        (RESPONSE, {"include": ["message.output_text.logprobs"]}, "include"),
        (RESPONSE, {"include": [{}]}, "include"),
        (RESPONSE, {"include": "reasoning.encrypted_content"}, "include"),
        (RESPONSE, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        (RESPONSE, {"max_tokens": 5}, "max_output_tokens"),
        (RESPONSE, {"messages": HI["messages"]}, "input"),
        (RESPONSE, {"response_format": {"type": "text"}}, "text.format"),
        (RESPONSE, {"reasoning_effort": "low"}, "reasoning.effort"),
        (RESPONSE, {"messages[0]": 1}, "messages[0]"),
        (RESPONSE, {"tools": [FUNCTION]}, "tools[0].function"),
        (
            RESPONSE,
            {
                "tools": [{"type": "function", "name": "now"}],
                "tool_choice": {"type": "function", "name": "x"},
            },
            "tool_choice.name",
        ),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(
    gateway: GatewayApp, form: tuple[str, dict[str, Any]], given: dict[str, Any], parameter: str
) -> None:
    path, body = form
    assert await error_of(post(gateway, path, body | given)) == (400, "invalid_parameter", parameter)
    assert not gateway.provider.jobs


# --- errors of a task


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ((CHAT[0], CHAT[1] | {"max_tokens": 10**6}), "max_tokens"),
        ((CHAT[0], CHAT[1] | {"max_completion_tokens": 10**6}), "max_completion_tokens"),
        ((RESPONSE[0], RESPONSE[1] | {"max_output_tokens": 10**6}), "max_output_tokens"),
    ],
)
async def test_an_error_after_adjustments_has_the_names_of_parameters_in_its_headers_and_its_body(
    open_gateway: OpenApp, form: tuple[str, dict[str, Any]], name: str
) -> None:
    path, body = form
    failure = PomeloError("invalid_parameter", "max_tokens is too large", field="max_tokens")
    async with open_gateway() as gateway:
        for stream in (False, True):
            gateway.provider.script = play(failure)
            async with post(gateway, path, body | {"store": True, "stream": stream}) as response:
                assert response.status == 400
                assert response.headers["X-Pomelo-Adjusted"] == f"{name}=128000; store"
                error = (await response.json())["error"]
            assert (error["param"], error["message"]) == (name, f"{name} is too large")
    async with open_gateway(keep_alive=0.01) as gateway:
        waiting = asyncio.Event()
        gateway.provider.script = play(waiting.wait, failure)
        async with post(gateway, path, body | {"stream": True}) as response:
            assert response.headers["X-Pomelo-Adjusted"] == f"{name}=128000"
            waiting.set()
            text = await response.text()
        assert f'"message":"{name} is too large"' in text
        assert f'"param":"{name}"' in text
        gateway.provider.script = play(word("one"), failure)
        async with post(gateway, path, body | {"stream": True}) as response:
            assert f'"param":"{name}"' in await response.text()


IMAGE = {"type": "input_image", "image_url": PNG_URI}
REFUSAL = {"type": "refusal", "refusal": "No."}


@pytest.mark.parametrize(
    ("role", "part", "member", "code"),
    [
        ("user", IMAGE | {"image_url": "ftp://x"}, "image_url", "invalid_parameter"),
        ("user", IMAGE | {"image_url": 1}, "image_url", "invalid_parameter"),
        ("user", IMAGE | {"image_url": None}, "image_url", "missing_parameter"),
        ("user", IMAGE | {"detail": "immense"}, "detail", "invalid_parameter"),
        ("user", IMAGE | {"file_id": "file_1"}, "file_id", "invalid_parameter"),
        ("user", {"type": "input_file"}, "type", "invalid_parameter"),
        ("user", {"type": "input_text"}, "text", "missing_parameter"),
        ("assistant", REFUSAL | {"refusal": None}, "refusal", "missing_parameter"),
        ("assistant", REFUSAL | {"refusal": 1}, "refusal", "invalid_parameter"),
        ("assistant", REFUSAL | {"text": "No."}, "text", "invalid_parameter"),
    ],
)
async def test_an_error_of_a_part_names_the_members_that_it_has_in_a_response(
    gateway: GatewayApp, role: str, part: dict[str, Any], member: str, code: str
) -> None:
    items = [{"role": role, "content": [{"type": "input_text", "text": "Hi"}, part]}]
    refused = await error_of(post(gateway, RESPONSE[0], RESPONSE[1] | {"input": items}))
    assert refused == (400, code, f"input[0].content[1].{member}")


# --- what SDKs send back of an earlier answer


@pytest.mark.parametrize(
    "form",
    [
        *[
            (CHAT[0], {"messages": [*HI["messages"], {"role": "assistant", **said}, *HI["messages"]]})
            for said in list[dict[str, Any]](
                (
                    {"content": [REFUSAL]},
                    {"content": None, "refusal": "No."},
                    {"refusal": "No."},
                    {"content": "No.", "refusal": None, "audio": None, "annotations": [], "parsed": {"a": 1}},
                )
            )
        ],
        *[
            (RESPONSE[0], {"input": [*HI["messages"], {"role": "assistant", **said}, *HI["messages"]]})
            for said in (
                {"content": [REFUSAL]},
                {"content": [{"type": "output_text", "text": "No.", "annotations": [], "logprobs": []}]},
            )
        ],
    ],
)
async def test_what_the_assistant_refused_with_is_its_text(
    gateway: GatewayApp, form: tuple[str, dict[str, Any]]
) -> None:
    path, conversation = form
    async with post(gateway, path, {"model": "gpt-4", **conversation}, headers=STRICT) as response:
        assert response.status == 200, await response.text()
    _, message, _ = gateway.provider.jobs[-1].input.messages
    assert (message.role, [part.text for part in message.content]) == (Role.ROLE_ASSISTANT, ["No."])


async def test_both_names_of_the_limit_may_be_given_with_one_value(gateway: GatewayApp) -> None:
    body = CHAT[1] | {"max_completion_tokens": 7}
    async with post(gateway, CHAT[0], body | {"max_tokens": 7}) as response:
        assert response.status == 200
    assert gateway.provider.jobs[-1].input.max_tokens == 7
    for given in ({"max_tokens": 8}, {"max_tokens": True, "max_completion_tokens": 1}):  # true is not 1
        refused = await error_of(post(gateway, CHAT[0], body | given))
        assert refused == (400, "invalid_parameter", "max_tokens")


@pytest.mark.parametrize(
    ("name", "value"), [("previous_response_id", "x"), ("conversation", "x"), ("prompt", {"id": "p"})]
)
async def test_what_a_response_would_read_from_a_store_is_refused_with_the_remedy(
    gateway: GatewayApp, name: str, value: Any
) -> None:
    async with post(gateway, RESPONSE[0], RESPONSE[1] | {name: value}) as response:
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == ("invalid_parameter", name)
    assert "Send the whole conversation as input" in error["message"]


@pytest.mark.parametrize("size", [2, LARGE_BODY], ids=["small", "large"])
async def test_a_model_of_another_task_type_is_refused(gateway: GatewayApp, size: int) -> None:
    text = "x" * size
    for path, body in (
        (CHAT[0], {"messages": [{"role": "user", "content": text}]}),
        (RESPONSE[0], {"input": text}),
    ):
        refused = await error_of(post(gateway, path, {"model": "flux-1-pro", **body}))
        assert refused == (400, "invalid_parameter", "model")


async def test_an_unknown_model_is_not_found_and_the_message_says_where_they_are(gateway: GatewayApp) -> None:
    async with gateway.http.get(f"{gateway.url}/v1/models/none", headers=gateway.headers) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (404, "model_not_found")
    assert "GET /v1/models" in error["message"]


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        ({"instructions": "Be brief."}, None),
        ({"max_output_tokens": 40}, None),
        ({"metadata": {"a": "b"}}, {}),
        ({"reasoning": {"effort": "low", "summary": None}}, {"effort": None, "summary": None}),
        ({"temperature": 0.5}, None),
        ({"text": {"format": {"type": "json_object"}}}, {"format": {"type": "text"}}),
        ({"top_p": 0.5}, None),
        ({"tools": [{"type": "function", "name": "now"}], "tool_choice": "required"}, []),
        ({"parallel_tool_calls": False}, True),
        ({"user": "me"}, ...),
    ],
    ids=lambda each: next(iter(each)) if type(each) is dict and each else "",
)
async def test_a_response_repeats_what_was_given(
    gateway: GatewayApp, given: dict[str, Any], absent: Any
) -> None:
    name = next(iter(given))
    for sent, expected in (
        (given, given),
        (dict.fromkeys(given), {name: absent}),
        ({}, {name: absent}),
    ):
        async with post(gateway, RESPONSE[0], RESPONSE[1] | sent) as response:
            assert response.status == 200, await response.text()
            repeated = await response.json()
        assert {each: repeated.get(each, ...) for each in expected} == expected


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"text": {"schema": {}}}, "text.schema"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {}}}}, "text.format.json_schema"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
        ({"reasoning": "low"}, "reasoning"),
        ({"tools": [{"type": "function", "name": "now", "function": {}}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {
                "input": [
                    {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": [IMAGE]},
                ]
            },
            "input[1].output[0].type",
        ),
    ],
)
async def test_a_wrong_member_of_a_response_is_named(
    gateway: GatewayApp, given: dict[str, Any], parameter: str
) -> None:
    refused = await error_of(post(gateway, RESPONSE[0], RESPONSE[1] | given))
    assert refused == (400, "invalid_parameter", parameter)
