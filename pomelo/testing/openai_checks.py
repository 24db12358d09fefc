"""Checks a chat-completions request as OpenAI does.

It is strict: it refuses fields that the vendor's API description does not have, and parameters that newer
models do not take. The values of some fields, such as those of audio, are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pomelo.testing.checks import Check, Problem, conversation, declared, flag, number, one_of, text, whole
from pomelo.testing.tool_checks import check_calls, response_format, tool_choice, tools

_CALL_ID = re.compile(r".{1,40}", re.DOTALL)


def check(body: Mapping[str, Any]) -> Problem | None:
    """Return the first problem of a request, or None."""
    return declared(body, _FIELDS, _OTHERS, required=("model", "messages")) or _check_combinations(body)


def _check_combinations(body: Mapping[str, Any]) -> Problem | None:
    if body.get("stream_options") is not None and not body.get("stream"):
        return Problem("invalid_value", "stream_options", "stream_options are only for streams")
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        return Problem("invalid_parameter_combination", "max_tokens", "Send one of the two limits")
    for name in ("tool_choice", "parallel_tool_calls"):
        if body.get(name) is not None and not body.get("tools"):
            return Problem("invalid_value", name, f"{name} is only for requests with tools")
    if problem := check_calls(body["messages"], _CALL_ID):
        return problem
    if not str(body["model"]).startswith(("gpt-5", "gpt-6", "o1", "o3", "o4")):
        return None
    for name in ("max_tokens", "stop", "presence_penalty", "frequency_penalty", "logit_bias"):
        if body.get(name) is not None:
            return Problem("unsupported_parameter", name, f"This model takes no {name}")
    if body.get("reasoning_effort") != "none":
        if body.get("tools"):
            message = "Function tools with reasoning_effort are not supported here. Set it to none"
            return Problem("", "reasoning_effort", message)
        for name in ("temperature", "top_p", "logprobs", "top_logprobs"):
            if body.get(name) is not None:
                return Problem("unsupported_value", name, f"This model takes {name} only without reasoning")
    return None


def _stop(name: str, value: Any) -> Problem | None:
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return Problem("invalid_type", name, f"{name} must be a string or a list of strings")
    if not value:
        return Problem("empty_array", name, f"{name} must not be empty")
    if len(value) > 4:
        return Problem("array_above_max_length", name, f"{name} may have 4 strings")
    return None


def _stream_options(name: str, value: Any) -> Problem | None:
    if not isinstance(value, dict):
        return Problem("invalid_type", name, f"{name} must be an object")
    for key, item in value.items():
        if key not in ("include_usage", "include_obfuscation"):
            return Problem("unknown_parameter", f"{name}.{key}", f"Nothing is called {key}")
        if not isinstance(item, bool):
            return Problem("invalid_type", f"{name}.{key}", f"{key} must be true or false")
    return None


_MESSAGE_FIELDS = {
    "developer": {"role", "content", "name"},
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "refusal", "audio", "tool_calls", "function_call"},
    "tool": {"role", "content", "tool_call_id"},
    "function": {"role", "content", "name"},
}
_PARTS = {
    "user": {"text", "image_url", "input_audio", "file"},
    "assistant": {"text", "refusal"},
}


def _part(name: str, part: Any, role: str) -> Problem | None:
    allowed = _PARTS.get(role, {"text"})
    if not isinstance(part, dict):
        return Problem("invalid_type", name, f"{name} must be an object")
    part_type = part.get("type")
    if part_type not in allowed:
        return Problem("invalid_value", f"{name}.type", f"A part here is one of {', '.join(sorted(allowed))}")
    if set(part) != {"type", part_type}:
        return Problem("unknown_parameter", name, f"A {part_type} part has type and {part_type}")
    value = part[part_type]
    if part_type in ("text", "refusal"):
        return text()(f"{name}.{part_type}", value)
    if part_type != "image_url":
        return None
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        return Problem("invalid_type", f"{name}.image_url", "image_url must have a url")
    if set(value) - {"url", "detail"}:
        return Problem("unknown_parameter", f"{name}.image_url", "image_url has url and detail")
    if value.get("detail", "auto") not in ("auto", "low", "high"):
        return Problem("invalid_value", f"{name}.image_url.detail", "detail is auto, low or high")
    if not value["url"].startswith(("data:image/", "https://", "http://")):
        return Problem("invalid_image_url", f"{name}.image_url.url", "url must be a URL or a data: URI")
    return None


_FIELDS: Mapping[str, Check] = {
    "model": text(1),
    "messages": conversation(_MESSAGE_FIELDS, _part, content_optional={"assistant"}),
    "max_tokens": whole(1, 2**31 - 1),
    "max_completion_tokens": whole(1, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "stop": _stop,
    "n": whole(1, 128),
    "seed": whole(-(2**63), 2**63 - 1),
    "logprobs": flag,
    "top_logprobs": whole(0, 20),
    "stream": flag,
    "stream_options": _stream_options,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "service_tier": one_of("auto", "default", "flex", "scale", "priority", "fast"),
    "safety_identifier": text(0, 64),
    "prompt_cache_key": text(),
    "user": text(),
    "store": flag,
    "tools": tools(),
    "tool_choice": tool_choice(),
    "parallel_tool_calls": flag,
    "response_format": response_format,
}

_OTHERS = frozenset((
    "audio", "function_call", "functions", "logit_bias", "metadata", "modalities", "moderation", "prediction",
    "prompt_cache_options", "prompt_cache_retention", "verbosity", "web_search_options",
))  # fmt: skip
