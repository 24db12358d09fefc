"""Error bodies of the Messages API, and what the vendor's codes mean."""

from __future__ import annotations

from re import compile as pattern
from typing import Any

from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from pomelo.providers.http.parsing import pick, pick_text

_MEANINGS = {
    "prompt_too_long": "context_length_exceeded",
    "output_blocked": "content_policy_violation",
    "prefill": "invalid_parameter",
    "unreadable_image": "invalid_parameter",
    "image_dimensions_too_large": "invalid_parameter",
    "request_too_large": "payload_too_large",
    # Our account, key or permissions. The first two have the status 429, but a retry is pointless.
    "contract_spend_limit_reached": "provider_failed",
    "enforced_spend_limit_reached": "provider_failed",
    "authentication_error": "provider_failed",
    "billing_error": "provider_failed",
    "permission_error": "provider_failed",
    "not_found_error": "provider_failed",
    "rate_limit_error": "provider_unavailable",
    "api_error": "provider_unavailable",
    "timeout_error": "provider_unavailable",
    "overloaded_error": "provider_unavailable",
}
"""The vendor's code, or our name for the beginning of its message -> the code of our table."""

_MESSAGES = (
    (pattern(r"prompt is too long|input length and .max_tokens. exceed"), "prompt_too_long"),
    (pattern(r"Output blocked by content filtering"), "output_blocked"),
    (pattern(r"This model does not support assistant message prefill"), "prefill"),
    (pattern(r"Could not process image"), "unreadable_image"),
)
"""The vendor has one code for every invalid request; only the beginning of its message differs."""

_FIELD = pattern(r"(output_config\.format|[a-z_]++)[.\w]*+: ")

_FIELDS = {
    "messages": "messages",
    "system": "messages",
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop_sequences": "stop",
    "metadata": "user",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "output_config.format": "response_format",
}
"""The vendor's name of a parameter -> the contract's."""


def _read_error_body(body: Any) -> ErrorBody:
    error = pick(body, "error")
    message = pick_text(error, "message")
    known = [code for text, code in _MESSAGES if text.match(message)]
    codes = (pick_text(error, "details", "error_code"), *known, pick_text(error, "type"))
    name = _FIELD.match(message)
    return ErrorBody(codes, _FIELDS.get(name[1]) if name else None)


ERROR_MAPPING = ErrorMapping("anthropic", _read_error_body, _MEANINGS)
