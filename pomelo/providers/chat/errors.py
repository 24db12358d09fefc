"""Error bodies of chat completions: their shapes, and a table of codes.

Codes of several vendors share the table, because no code has two meanings. If a host uses one differently,
its profile says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from re import IGNORECASE
from re import compile as pattern
from typing import Any

from pomelo.providers.chat.thoughts import MISSING_SIGNATURE, MISSING_TEXT, missing_thoughts
from pomelo.providers.http.errors import ErrorBody
from pomelo.providers.http.parsing import pick, pick_list, pick_text

MEANINGS = {
    "context_length_exceeded": "context_length_exceeded",
    "content_policy_violation": "content_policy_violation",
    "image_content_policy_violation": "content_policy_violation",
    "content_filter": "content_policy_violation",
    "data_inspection_failed": "content_policy_violation",
    "invalid_prompt": "content_policy_violation",
    "cyber_policy": "content_policy_violation",
    "bio_policy": "content_policy_violation",
    "invalid_image": "invalid_parameter",
    "invalid_image_format": "invalid_parameter",
    "invalid_image_mode": "invalid_parameter",
    "invalid_base64_image": "invalid_parameter",
    "unsupported_image_media_type": "invalid_parameter",
    "image_parse_error": "invalid_parameter",
    "image_too_large": "invalid_parameter",
    "image_too_small": "invalid_parameter",
    "image_file_too_large": "invalid_parameter",
    "empty_image_file": "invalid_parameter",
    "rate_limit_exceeded": "provider_unavailable",
    "rate_limited": "provider_unavailable",
    "1300": "provider_unavailable",
    "slow_down": "provider_unavailable",
    "server_is_overloaded": "provider_unavailable",
    "engine_overloaded_error": "provider_unavailable",
    "rate_limit_reached_error": "provider_unavailable",
    # Our account, key, permissions or request. Some have the status 429, but a retry is pointless.
    "above_rate_limit": "provider_failed",
    "credit_balance_exhausted": "provider_failed",
    "organization_spend_limit_exceeded": "provider_failed",
    "project_spend_limit_exceeded": "provider_failed",
    "organization_usage_limit_exceeded": "provider_failed",
    "insufficient_quota": "provider_failed",
    "exceeded_current_quota_error": "provider_failed",
    "billing_hard_limit_reached": "provider_failed",
    "billing_not_active": "provider_failed",
    "invalid_api_key": "provider_failed",
    "model_not_found": "provider_failed",
    "extra_forbidden": "provider_failed",
    MISSING_SIGNATURE: "provider_failed",
    MISSING_TEXT: "provider_failed",
    # HTTP statuses as codes: some hosts send them within a stream.
    "408": "provider_unavailable",
    "413": "payload_too_large",
    "429": "provider_unavailable",
    "500": "provider_unavailable",
    "502": "provider_unavailable",
    "503": "provider_unavailable",
    "504": "provider_unavailable",
    # Types: they count only if the code is unknown.
    "server_error": "provider_unavailable",
    "service_unavailable_error": "provider_unavailable",
    "rate_limit_error": "provider_unavailable",
    "requests": "provider_unavailable",
    "tokens": "provider_unavailable",
}
"""A host's code, or our name for the beginning of its message -> the code of our table."""

_FIELDS = {
    "messages": "messages",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
    "random_seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "user": "user",
    "safety_identifier": "user",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "parallel_tool_calls",
    "response_format": "response_format",
}
"""A host's name of a parameter -> the contract's."""

_PARAM = pattern(r"[a-z_]+")
_TOO_LONG = pattern(
    r"(max|maximum|model's) context (length|window)|too large for model"
    r"|maximum (model|prompt) length"  # vLLM, xAI
    r"|available context size"  # llama.cpp
    r"|`inputs` tokens \+ `max_new_tokens`"  # Together
    r"|maximum number of tokens allowed"  # Google
    r"|exceeded model token limit"  # Kimi
    r"|greater than the context length"  # LM Studio
    r"|context window exceeds limit"  # MiniMax
    r"|range of input length",  # Qwen
    IGNORECASE,
)
_MODERATED = pattern(r"content exists risk|content violates usage guidelines", IGNORECASE)  # DeepSeek, xAI
_MAX_MESSAGE_CHARS = 1000  # only these are searched


def read_error_body(body: Any, own_names: Mapping[str, str] | None = None) -> ErrorBody:
    """Read an error body of any shape: `{"error": {…}}`, also within a list, flat, or a list of invalid
    fields. `own_names` are the host's own names of parameters -> the contract's."""
    if isinstance(body, list) and body:
        body = body[0]  # Google's errors
    error = body["error"] if isinstance(pick(body, "error"), dict) else body
    codes = [str(word) for key in ("code", "type") if type(word := pick(error, key)) in (str, int)]
    param = pick_text(error, "param")
    message = pick(error, "message")
    details = pick(message if isinstance(message, dict) else body, "detail")
    codes.append(pick_text(details, 0, "type"))
    if path := pick_list(details, 0, "loc"):
        param = next((name for name in path[1:] if isinstance(name, str)), "")
    reason = ""
    if isinstance(message, str) and message.startswith("Request too large for"):
        codes.insert(0, "above_rate_limit")  # by itself: OpenAI and Groq call it rate_limit_exceeded
        reason = "the request alone exceeds your account's rate limit at the vendor"
    # OpenRouter passes on the error of its backend as text; others send no more than a text as their error.
    texts = (message, pick(error, "metadata", "raw"), pick(body, "error"))
    said = "\n".join(text[:_MAX_MESSAGE_CHARS] for text in texts if type(text) is str)
    if _TOO_LONG.search(said):
        codes.append("context_length_exceeded")
    if missing := missing_thoughts(said):
        codes.insert(0, missing)
        reason = "the vendor requires the model's thoughts behind tool calls, which callers do not have"
    # OpenRouter's own filter refuses with reasons.
    if pick(error, "metadata", "reasons") or _MODERATED.search(said):
        codes.append("content_policy_violation")
    name = _PARAM.match(param)
    field = (own_names or {}).get(param) or (_FIELDS.get(name[0]) if name else None)
    return ErrorBody(tuple(codes), field, reason)
