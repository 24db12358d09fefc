"""Checks a Messages request as Anthropic does.

It is strict: it refuses fields that the vendor's own client does not have, and what a model or a version of
the API does not take. The values of some fields, such as those of containers, are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pomelo.testing.anthropic_tool_checks import (
    check_calls,
    check_thinking,
    output_config,
    thinking,
    tool_choice,
    tools,
)
from pomelo.testing.checks import Check, Problem, conversation, declared, flag, number, one_of, text, whole

SAMPLING_VERSION = "2023-06-01"
"""The version of the API that takes sampling parameters."""

VERSIONS = (SAMPLING_VERSION, "2026-10-21")

_SAMPLING = ("temperature", "top_p", "top_k")
_NO_SAMPLING = re.compile(r"claude-(opus-4-[7-9]|[a-z]+-([5-9]|\d\d))")
"""Models that take no sampling parameters."""
_BOTH = re.compile(r"claude-(3|2|instant)")
"""Models that take temperature and top_p together; they are retired."""
_NO_PREFILL = re.compile(r"claude-(opus-4-[6-9]|sonnet-4-[6-9]|[a-z]+-([5-9]|\d\d))")
"""Models that do not continue a prefilled message of the assistant."""

_PREFILL_MESSAGE = "This model does not support assistant message prefill: the conversation ends with one"
_BLANK = "text content blocks must contain non-whitespace text"


def check(body: Mapping[str, Any], version: str) -> Problem | None:
    """Return the first problem of a request in a version of the API, or None."""
    problem = declared(body, _FIELDS, _OTHERS, required=("model", "max_tokens", "messages"))
    return problem or _check_combinations(body, version) or check_calls(body) or check_thinking(body)


def _check_combinations(body: Mapping[str, Any], version: str) -> Problem | None:
    model = body["model"]
    for name in _SAMPLING:
        if body.get(name) is not None and (version != SAMPLING_VERSION or _NO_SAMPLING.match(model)):
            return Problem("unsupported_parameter", name, f"{name} is not supported here")
    if body.get("temperature") is not None and body.get("top_p") is not None and not _BOTH.match(model):
        return Problem("unsupported_parameter", None, "temperature and top_p exclude each other")
    if body["messages"][-1]["role"] == "assistant" and _NO_PREFILL.match(model):
        return Problem("invalid_value", None, _PREFILL_MESSAGE)
    return None


def _content_text(name: str, value: Any) -> Problem | None:
    return text()(name, value) or (None if value.strip() else Problem("invalid_value", name, _BLANK))


def _stop_sequences(name: str, value: Any) -> Problem | None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return Problem("invalid_type", name, "must be a list of strings")
    if not all(item.strip() for item in value):
        return Problem("invalid_value", name, "each stop sequence must contain non-whitespace")
    return None


def _system(name: str, value: Any) -> Problem | None:
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return Problem("invalid_type", name, "must be a string or a list of text blocks")
    for index, block in enumerate(value):
        problem = _block(f"{name}[{index}]", block, "system")
        if problem is not None:
            return problem
    return None


def _metadata(name: str, value: Any) -> Problem | None:
    if not isinstance(value, dict):
        return Problem("invalid_type", name, "must be an object")
    for key in value:
        if key != "user_id":
            return Problem("unknown_parameter", f"{name}.{key}", "Extra inputs are not permitted")
    user = value.get("user_id")
    problem = None if user is None else text(0, 512)(f"{name}.user_id", user)
    if problem is None and user is not None and "@" in user:
        problem = Problem("invalid_value", f"{name}.user_id", "this looks like the address of a person")
    return problem


_BLOCKS = {
    "system": {"text"},
    "user": {"text", "image", "document", "search_result", "tool_result", "container_upload"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use", "server_tool_use"},
}
_KEYS = {"text": {"type", "text", "cache_control", "citations"}, "image": {"type", "source", "cache_control"}}
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def _block(name: str, block: Any, role: str) -> Problem | None:
    if not isinstance(block, dict):
        return Problem("invalid_type", name, "must be an object")
    block_type = block.get("type")
    if block_type not in _BLOCKS[role]:
        return Problem("invalid_value", f"{name}.type", "there is no such block here")
    for key in block:
        if key not in _KEYS.get(block_type, block):
            return Problem("unknown_parameter", f"{name}.{key}", "Extra inputs are not permitted")
    if block_type == "text":
        return _content_text(f"{name}.text", block.get("text"))
    return _source(f"{name}.source", block.get("source")) if block_type == "image" else None


def _source(name: str, source: Any) -> Problem | None:
    keys = {"base64": {"type", "media_type", "data"}, "url": {"type", "url"}, "file": {"type", "file_id"}}
    block_type = source.get("type") if isinstance(source, dict) else None
    if block_type not in keys:
        return Problem("invalid_value", f"{name}.type", f"a source is one of {', '.join(keys)}")
    if set(source) != keys[block_type]:
        return Problem(
            "unknown_parameter", name, f"a {block_type} source has {', '.join(sorted(keys[block_type]))}"
        )
    if block_type != "base64":
        return None
    problem = one_of(*_IMAGES)(f"{name}.media_type", source["media_type"])
    if problem is None and not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", str(source["data"])):
        problem = Problem("invalid_value", f"{name}.data", "this is not base64")
    return problem


_FIELDS: Mapping[str, Check] = {
    "model": text(1),
    "max_tokens": whole(0, 2**31 - 1),
    "messages": conversation(
        {"user": {"role", "content"}, "assistant": {"role", "content"}}, _block, content=_content_text
    ),
    "system": _system,
    "stop_sequences": _stop_sequences,
    "temperature": number(0, 1),
    "top_p": number(0, 1),
    "top_k": whole(0, 2**31 - 1),
    "stream": flag,
    "metadata": _metadata,
    "tools": tools,
    "tool_choice": tool_choice,
    "output_config": output_config,
    "thinking": thinking,
    "service_tier": one_of("auto", "standard_only"),
    "speed": one_of("standard", "fast"),
}

_OTHERS = frozenset((
    "cache_control", "container", "diagnostics", "inference_geo", "user_profile_id", "workspace_id",
))  # fmt: skip
