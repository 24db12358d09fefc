"""Requests of the Mistral provider, and the parts of its protocol that only Mistral has."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.text_pb2 import Role, TextInput
from pomelo.testing import Reply
from pomelo.testing.mistral_protocol import (
    Answer,
    chunk,
    error_event,
    error_reply,
    fields_reply,
    gateway_reply,
)
from pomelo.testing.text_answer import DONE
from tests.providers.rig import KEY, SECRETS, Rig, check_no_secrets, read_all
from tests.providers.text_rig import (
    MISTRAL,
    PNG,
    USER,
    check_last,
    failure,
    hi,
    largest_input,
    message,
    refusal_of,
    sent,
    text,
)


async def test_the_largest_request_is_exactly_this(rig: Rig) -> None:
    received = await sent(MISTRAL, rig, largest_input(), user=USER, stream=True)
    assert received.body == {
        "model": "mistral-small-latest",
        "messages": [
            {"role": "system", "content": "Be brief. Ünïcödé 🍊"},
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be quick."}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": PNG}},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "A dot."}, {"type": "text", "text": " Or two."}],
            },
            {"role": "user", "content": "Sure?"},
        ],
        "max_tokens": 100,
        "temperature": 1.5,
        "top_p": 0.9,
        "random_seed": 2**53 - 1,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "stop": ["END", "\n\n"],
        "stream": True,
    }
    assert received.path == "/mistral/v1/chat/completions"
    assert received.headers["Authorization"] == f"Bearer {KEY}"


async def test_the_smallest_request_has_no_field_that_the_caller_did_not_set(rig: Rig) -> None:
    received = await sent(MISTRAL, rig, hi())
    assert received.body == {"model": "mistral-small-latest", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("text_input", "sends"), [(0.0, 1e-6), (1e-9, 1e-6), (1e-6, 1e-6), (0.5, 0.5), (1.0, 1.0)]
)
async def test_a_top_p_of_zero_which_the_vendor_refuses_is_the_minimum_that_it_takes(
    rig: Rig, text_input: float, sends: float
) -> None:
    assert (await sent(MISTRAL, rig, hi(top_p=text_input))).body["top_p"] == sends


@pytest.mark.parametrize(
    "roles",
    [[Role.ROLE_USER, Role.ROLE_ASSISTANT], [Role.ROLE_ASSISTANT], [Role.ROLE_SYSTEM, Role.ROLE_ASSISTANT]],
)
async def test_a_prefilled_answer_is_the_callers_fault(rig: Rig, roles: list[Any], stream: bool) -> None:
    text_input = TextInput(messages=[message(role, "The answer is") for role in roles])
    error, _ = await failure(rig.provider, MISTRAL.job(text_input, stream=stream))
    assert (error.code, error.field) == ("invalid_parameter", "messages")


async def test_a_route_may_request_the_count_of_a_stream_and_the_closed_schema_refuses_it(rig: Rig) -> None:
    route = Route("mistral", "m", options={"stream_usage": "option"})
    error, _ = await failure(rig.provider, MISTRAL.job(stream=True, route=route))
    assert (error.code, error.field) == ("provider_failed", None)
    assert rig.requests[0].body["stream_options"] == {"include_usage": True}


async def test_content_in_chunks_is_joined_without_the_thinking(rig: Rig, stream: bool) -> None:
    rig.script(Answer("one two", thinking="a canary thought"))
    answer = await read_all(rig.provider, MISTRAL.job(stream=stream))
    assert text(answer) == "one two"
    check_last(answer, 3, 2)


@pytest.mark.parametrize("content", [["x"], [{"type": "text"}], [{"type": "text", "text": 7}], 7, {"a": 1}])
async def test_content_of_another_shape_fails(rig: Rig, content: Any) -> None:
    rig.script(Reply(steps=(chunk({"content": content}), chunk({}, finish_reason="stop"), DONE)))
    assert (await failure(rig.provider, MISTRAL.job(stream=True)))[0].code == "provider_failed"


def refusal(status: int, kind: str = "a_kind", code: str | None = None, **headers: str) -> Reply:
    """An error of the vendor whose message repeats secrets."""
    return error_reply(status, kind, code, message=SECRETS, headers=headers)


LONG = f"Prompt contains 40000 tokens, too large for model with 32768 maximum context length {SECRETS}"
NESTED = b'{"object":"error","message":{"detail":[{"type":"%s","loc":["body","%s"],"msg":"x"}]},"type":"e"}'
STATUSES = [
    (refusal(400), "provider_failed", None, None),
    (error_reply(400, message=LONG), "context_length_exceeded", None, None),
    (fields_reply(["temperature"], "less_than_equal", SECRETS), "invalid_parameter", None, "temperature"),
    (fields_reply(["random_seed"], "int_type", SECRETS), "invalid_parameter", None, "seed"),
    (fields_reply(["messages", 0, "content"], "string_type"), "invalid_parameter", None, "messages"),
    (fields_reply(["user"], "extra_forbidden", SECRETS), "provider_failed", None, None),
    (fields_reply(["stop"], "extra_forbidden", SECRETS), "provider_failed", None, None),
    (fields_reply([], "missing"), "provider_failed", None, None),
    (Reply(422, steps=(NESTED % (b"value_error", b"top_p"),)), "invalid_parameter", None, "top_p"),
    (Reply(422, steps=(NESTED % (b"extra_forbidden", b"top_p"),)), "provider_failed", None, None),
    (Reply(422, steps=(b'{"detail":[7]}',)), "provider_failed", None, None),
    (Reply(422, steps=(b'{"detail":[{"loc":7,"type":7}]}',)), "provider_failed", None, None),
    (Reply(401, steps=(b'{"detail":"Unauthorized"}',)), "provider_failed", None, None),
    (gateway_reply(401, SECRETS), "provider_failed", None, None),
    (gateway_reply(429, SECRETS), "provider_unavailable", 5, None),
    (refusal(400, "invalid_request_message_order", "3230"), "invalid_parameter", None, "messages"),
    (refusal(403), "provider_failed", None, None),
    (refusal(404), "provider_failed", None, None),
    (refusal(429, "rate_limited", "1300", **{"Retry-After": "7"}), "provider_unavailable", 7, None),
    (refusal(500), "provider_unavailable", 5, None),
    (refusal(502), "provider_unavailable", 5, None),
    (refusal(503), "provider_unavailable", 5, None),
    (refusal(504), "provider_unavailable", 5, None),
]


@pytest.mark.parametrize(("reply", "code", "wait", "field"), STATUSES)
async def test_a_status_is_mapped_to_an_error(
    rig: Rig, reply: Reply, code: str, wait: int | None, field: str | None, stream: bool
) -> None:  # fmt: skip
    error = await refusal_of(rig, reply, MISTRAL.job(stream=stream))
    assert (error.code, error.retry_after, error.field) == (code, wait, field)


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (error_event("rate_limited", "1300", SECRETS), "provider_unavailable"),
        (error_event("server_error", None, SECRETS), "provider_unavailable"),
        (error_event("a_new_one", None, SECRETS), "provider_failed"),
        (b'data: {"error":{"type":"rate_limited","message":"<b>"}}\n\n', "provider_unavailable"),
    ],
)
async def test_an_error_within_a_stream_is_mapped_by_its_code(rig: Rig, step: bytes, code: str) -> None:
    rig.script(Answer("one two", at={1: step}))
    error, begun = await failure(rig.provider, MISTRAL.job(stream=True))
    assert (error.code, begun) == (code, "one")
    check_no_secrets(error)
