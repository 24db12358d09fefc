"""Errors of Anthropic, in responses and within streams."""

from __future__ import annotations

import pytest

from pomelo.testing import Reply, Stop
from pomelo.testing.anthropic_protocol import Answer, error_event, error_reply
from tests.providers.rig import SECRETS, Rig, check_no_secrets, open_provider
from tests.providers.text_rig import ANTHROPIC, LONG, failure, refusal_of


def refusal(status: int, kind: str, code: str | None = None, message: str = SECRETS, **headers: str) -> Reply:
    """An error of the vendor whose message repeats secrets."""
    return error_reply(status, kind, code, message=message, headers=headers)


INVALID = "invalid_request_error"
STATUSES = [
    (refusal(400, INVALID), "provider_failed", None, None),
    (refusal(400, INVALID, message=f"prompt is too long: 9 {SECRETS}"), "context_length_exceeded", None, None),
    (
        refusal(400, INVALID, message="input length and `max_tokens` exceed context limit: 190000 + 64000"),
        "context_length_exceeded",
        None,
        None,
    ),
    (refusal(400, INVALID, message="Output blocked by content filtering policy"), "content_policy_violation", None, None),
    (refusal(400, INVALID, message=f"messages.0.content.1.image.source: {SECRETS}"), "invalid_parameter", None, "messages"),
    (refusal(400, INVALID, "image_dimensions_too_large"), "invalid_parameter", None, "messages"),
    (refusal(400, INVALID, message="stop_sequences: too many"), "invalid_parameter", None, "stop"),
    (refusal(400, INVALID, message="metadata.user_id: it is a name"), "invalid_parameter", None, "user"),
    (refusal(400, INVALID, message="max_tokens: 99 > 64"), "invalid_parameter", None, "max_tokens"),
    (refusal(400, INVALID, message="output_config.format.schema: no"), "invalid_parameter", None, "response_format"),
    (
        refusal(400, INVALID, message="This model does not support assistant message prefill. The conversation must end"),
        "invalid_parameter",
        None,
        "messages",
    ),
    (refusal(400, INVALID, message="Could not process image"), "invalid_parameter", None, "messages"),
    (refusal(400, INVALID, message="thinking.type: no"), "provider_failed", None, None),
    (refusal(400, INVALID, message="a" * 200_000), "provider_failed", None, None),
    (refusal(400, INVALID, message="Your credit balance is too low"), "provider_failed", None, None),
    (refusal(401, "authentication_error"), "provider_failed", None, None),
    (refusal(402, "billing_error"), "provider_failed", None, None),
    (refusal(403, "permission_error"), "provider_failed", None, None),
    (refusal(404, "not_found_error"), "provider_failed", None, None),
    (refusal(409, "conflict_error"), "provider_unavailable", 5, None),
    (refusal(413, "request_too_large"), "payload_too_large", None, None),
    (refusal(429, "rate_limit_error", **{"Retry-After": "17"}), "provider_unavailable", 17, None),
    (refusal(429, "rate_limit_error", "enforced_spend_limit_reached"), "provider_failed", None, None),
    (refusal(429, "rate_limit_error", "contract_spend_limit_reached"), "provider_failed", None, None),
    (refusal(429, "rate_limit_error", "ramp_limit_exceeded", **{"Retry-After": "17"}), "provider_unavailable", 17, None),
    (refusal(500, "api_error"), "provider_unavailable", 5, None),
    (refusal(504, "timeout_error"), "provider_unavailable", 5, None),
    (refusal(529, "overloaded_error"), "provider_unavailable", 5, None),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "code", "wait", "field"), STATUSES)
async def test_a_status_is_mapped_to_an_error(
    rig: Rig, reply: Reply, code: str, wait: int | None, field: str | None, stream: bool
) -> None:  # fmt: skip
    error = await refusal_of(rig, reply, ANTHROPIC.job(stream=stream))
    assert (error.code, error.retry_after, error.field) == (code, wait, field)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("overloaded_error", "provider_unavailable"),
        ("api_error", "provider_unavailable"),
        ("rate_limit_error", "provider_unavailable"),
        ("timeout_error", "provider_unavailable"),
        ("request_too_large", "payload_too_large"),
        ("invalid_request_error", "provider_failed"),
        ("billing_error", "provider_failed"),
        ("a_new_error", "provider_failed"),
    ],
)
async def test_an_error_within_a_stream_is_mapped_by_its_code(rig: Rig, kind: str, code: str) -> None:
    rig.script(Answer("one two", at={1: (error_event(kind, message=SECRETS), Stop.END)}))
    error, begun = await failure(rig.provider, ANTHROPIC.job(stream=True))
    assert (error.code, begun) == (code, "one")
    check_no_secrets(error)


async def test_a_failure_half_way_through_a_long_unary_answer_yields_nothing(rig: Rig) -> None:
    rig.script(Answer("one two", at={1: (error_event(), Stop.END)}))
    async with open_provider(LONG.make, rig.anthropic_base_url) as provider:
        error, begun = await failure(provider, LONG.job(stream=False))
    assert (error.code, begun) == ("provider_unavailable", "")
