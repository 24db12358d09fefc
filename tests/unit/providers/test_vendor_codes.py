"""What the codes of each vendor mean, at any status and within a stream, and which fields its refusals name."""

from __future__ import annotations

from typing import Any

import pytest
from multidict import CIMultiDict
from pydantic_core import to_json

from pomelo.providers.anthropic.errors import ERROR_MAPPING as ANTHROPIC
from pomelo.providers.bfl import BFL
from pomelo.providers.chat.errors import MEANINGS, read_error_body
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.elevenlabs.errors import ERROR_MAPPING as ELEVENLABS
from pomelo.providers.http.errors import ErrorMapping, from_error_body, refused
from pomelo.providers.replicate import Replicate
from pomelo.providers.together import ERROR_MAPPING as TOGETHER

MAPPINGS = {
    "chat": ErrorMapping("acme", read_error_body, MEANINGS),
    "mistral": ErrorMapping("mistral", read_error_body, {**MEANINGS, **Mistral.profile.meanings}),
    "anthropic": ANTHROPIC,
    "elevenlabs": ELEVENLABS,
    "bfl": BFL.errors,
    "replicate": Replicate.errors,
    "together": TOGETHER,
}

UNAVAILABLE, FAILED, INVALID = "provider_unavailable", "provider_failed", "invalid_parameter"
MODERATED, TOO_LONG, TOO_LARGE = "content_policy_violation", "context_length_exceeded", "payload_too_large"

CODES = [
    ("chat", TOO_LONG, "context_length_exceeded"),
    ("chat", MODERATED, "content_policy_violation image_content_policy_violation content_filter invalid_prompt"),
    ("chat", MODERATED, "cyber_policy bio_policy data_inspection_failed"),
    ("chat", INVALID, "invalid_image invalid_image_format invalid_base64_image unsupported_image_media_type"),
    ("chat", INVALID, "image_parse_error image_too_large image_too_small image_file_too_large empty_image_file"),
    ("chat", INVALID, "invalid_image_mode"),
    ("chat", UNAVAILABLE, "rate_limit_exceeded rate_limited 1300 slow_down server_is_overloaded"),
    ("chat", UNAVAILABLE, "engine_overloaded_error rate_limit_reached_error"),
    ("chat", UNAVAILABLE, "408 429 500 502 503 504"),
    ("chat", UNAVAILABLE, "server_error service_unavailable_error rate_limit_error requests tokens"),
    ("chat", TOO_LARGE, "413"),
    ("chat", FAILED, "credit_balance_exhausted organization_spend_limit_exceeded project_spend_limit_exceeded"),
    ("chat", FAILED, "organization_usage_limit_exceeded insufficient_quota billing_hard_limit_reached"),
    ("chat", FAILED, "billing_not_active invalid_api_key model_not_found extra_forbidden"),
    ("chat", FAILED, "exceeded_current_quota_error"),
    ("mistral", INVALID, "invalid_request_message_order 3230"),
    ("anthropic", FAILED, "enforced_spend_limit_reached authentication_error billing_error permission_error"),
    ("anthropic", FAILED, "contract_spend_limit_reached not_found_error"),
    ("anthropic", INVALID, "image_dimensions_too_large"),
    ("anthropic", UNAVAILABLE, "rate_limit_error api_error timeout_error overloaded_error"),
    ("anthropic", TOO_LARGE, "request_too_large"),
    ("elevenlabs", INVALID, "voice_not_found voice_does_not_exist"),
    ("elevenlabs", TOO_LONG, "max_character_limit_exceeded text_too_long"),
    ("elevenlabs", UNAVAILABLE, "rate_limit_exceeded concurrent_limit_exceeded too_many_concurrent_requests"),
    ("elevenlabs", UNAVAILABLE, "system_busy rate_limit_error internal_error service_unavailable"),
    ("elevenlabs", FAILED, "quota_exceeded insufficient_credits invalid_api_key needs_authorization"),
    ("elevenlabs", FAILED, "invalid_authorization_header missing_permissions unauthorized model_not_found"),
    ("elevenlabs", FAILED, "payment_required authentication_error authorization_error"),
    ("bfl", FAILED, "Error Failed"),
    ("replicate", FAILED, "failed canceled aborted"),
    ("together", MODERATED, "content_policy_violation content_filter"),
    ("together", UNAVAILABLE, "rate_limit rate_limit_exceeded"),
    ("together", FAILED, "insufficient_quota insufficient_credits invalid_api_key"),
]  # fmt: skip


def bodies(vendor: str, code: str) -> list[Any]:
    """Every error body in which a vendor may send a code."""
    if vendor in ("bfl", "replicate"):
        return [{"status": code, "error": None}]
    if vendor == "elevenlabs":
        return [{"detail": {key: code, "message": "x"}} for key in ("code", "status", "type")]
    if vendor == "anthropic":
        return [
            {"type": "error", "error": {"type": code, "message": "x"}},
            {"type": "error", "error": {"type": "a_new_error", "details": {"error_code": code}}},
        ]
    numbers = [int(code)] if code.isdecimal() else []
    return [{"error": {key: each}} for key in ("code", "type") for each in (code, *numbers)]


@pytest.mark.parametrize(("vendor", "ours", "theirs"), CODES)
def test_a_code_has_its_meaning_at_any_status_and_within_a_stream(
    vendor: str, ours: str, theirs: str
) -> None:
    mapping = MAPPINGS[vendor]
    for code in theirs.split():
        for body in bodies(vendor, code):
            assert from_error_body(body, mapping).code == ours, code
            # Without a known code, these statuses are a failure and an unavailable provider.
            for status in (400, 429):
                assert refused(status, CIMultiDict(), to_json(body), mapping, 0).code == ours, code


@pytest.mark.parametrize("status", ["Request Moderated", "Content Moderated"])
def test_an_image_that_bfl_has_moderated_is_a_violation_of_its_policy(status: str) -> None:
    for body in ({"status": status}, {"detail": status.upper()}):
        assert from_error_body(body, BFL.errors).code == MODERATED


@pytest.mark.parametrize("text", ["NSFW content", "It is sensitive", "Our content policy", "Flagged (E005)"])
def test_an_error_of_replicate_in_such_words_is_a_violation_of_its_policy(text: str) -> None:
    assert from_error_body({"status": "failed", "error": text}, Replicate.errors).code == MODERATED


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("prompt is too long: 9 tokens", TOO_LONG),
        ("input length and `max_tokens` exceed context limit", TOO_LONG),
        ("Output blocked by content filtering policy", MODERATED),
        ("This model does not support assistant message prefill.", INVALID),
        # What a caller wrote may be repeated further on.
        ("Invalid value 'prompt is too long'", FAILED),
    ],
)
def test_the_beginning_of_anthropics_message_is_its_code(message: str, code: str) -> None:
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    assert from_error_body(body, ANTHROPIC).code == code


@pytest.mark.parametrize(
    ("vendor", "first", "last", "code"),
    [
        ("chat", {"code": "insufficient_quota", "type": "requests"}, {"type": "x"}, FAILED),
        ("elevenlabs", {"code": "quota_exceeded", "status": "system_busy"}, {"type": "x"}, FAILED),
        ("elevenlabs", {"status": "quota_exceeded", "type": "rate_limit_error"}, {"code": "x"}, FAILED),
        ("together", {"code": "insufficient_quota", "type": "rate_limit"}, {}, FAILED),
    ],
)
def test_the_most_specific_code_decides(
    vendor: str, first: dict[str, str], last: dict[str, str], code: str
) -> None:
    body = {"detail" if vendor == "elevenlabs" else "error": {**first, **last}}
    if vendor == "chat":
        body = {"error": first}
    assert refused(429, CIMultiDict(), to_json(body), MAPPINGS[vendor], 0).code == code


@pytest.mark.parametrize("code", ["enforced_spend_limit_reached", "contract_spend_limit_reached"])
def test_an_anthropic_code_in_the_details_counts_before_the_type(code: str) -> None:
    error = {"type": "rate_limit_error", "details": {"error_code": code}}
    assert refused(429, CIMultiDict(), to_json({"error": error}), ANTHROPIC, 0).code == FAILED


def test_only_the_beginning_of_a_hosts_message_is_searched() -> None:
    for padding, code in ((900, TOO_LONG), (1000, FAILED)):
        message = "x" * padding + " maximum context length"
        assert from_error_body({"error": {"message": message}}, MAPPINGS["chat"]).code == code


FIELDS = [
    ("chat", "messages max_tokens temperature top_p stop seed presence_penalty frequency_penalty", None),
    ("chat", "tools tool_choice parallel_tool_calls response_format", None),
    ("chat", "max_completion_tokens", "max_tokens"),
    ("chat", "random_seed", "seed"),
    ("chat", "safety_identifier", "user"),
    ("anthropic", "messages max_tokens temperature top_p tools tool_choice", None),
    ("anthropic", "system", "messages"),
    ("anthropic", "stop_sequences", "stop"),
    ("anthropic", "metadata", "user"),
    ("anthropic", "output_config.format", "response_format"),
    ("elevenlabs", "text voice_settings output_format language_code seed audio diarize num_speakers", None),
    ("elevenlabs", "voice_id", "voice"),
    ("elevenlabs", "file", "audio"),
    ("elevenlabs", "timestamps_granularity", "timestamps"),
    ("bfl", "prompt width height output_format seed", None),
    ("bfl", "steps", "num_inference_steps"),
    ("bfl", "guidance", "guidance_scale"),
    ("replicate", "prompt output_format seed num_inference_steps", None),
    ("replicate", "guidance", "guidance_scale"),
    ("replicate", "aspect_ratio megapixels", "width"),
    ("together", "prompt width height output_format seed guidance_scale", None),
    ("together", "steps", "num_inference_steps"),
]


def refusals(vendor: str, name: str) -> list[Any]:
    """Every error body in which a vendor may name a field."""
    if vendor == "anthropic":
        return [{"error": {"message": f"{name}: no"}}, {"error": {"message": f"{name}.0.x: no"}}]
    if vendor in ("bfl", "elevenlabs"):
        return [{"detail": [{"type": "x", "loc": ["body", name]}]}]
    if vendor == "replicate":
        return [{"invalid_fields": [{"field": field}]} for field in (f"input.{name}", name)]
    if vendor == "together":
        return [{"error": {"param": name}}]
    return [{"error": {"param": f"{name}[0].x"}}, {"detail": [{"type": "x", "loc": ["body", name]}]}]


@pytest.mark.parametrize(("vendor", "theirs", "ours"), FIELDS)
def test_a_refused_field_has_the_name_that_callers_know(vendor: str, theirs: str, ours: str | None) -> None:
    for name in theirs.split():
        for body in refusals(vendor, name):
            error = refused(422, CIMultiDict(), to_json(body), MAPPINGS[vendor], 0)
            assert (error.code, error.field) == (INVALID, ours or name)


@pytest.mark.parametrize("name", ["stability", "similarity_boost", "style", "use_speaker_boost", "speed"])
def test_a_refused_voice_setting_is_named_within_its_object(name: str) -> None:
    for body in (
        {"detail": [{"loc": ["body", "voice_settings", name]}]},
        {"detail": {"code": "x", "param": f"voice_settings.{name}"}},
    ):
        error = refused(400, CIMultiDict(), to_json(body), ELEVENLABS, 0)
        assert error.field == f"voice_settings.{name}"
