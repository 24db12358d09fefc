"""Checks a chat-completions request as Mistral does.

It is strict, as the vendor is: it refuses fields that the vendor's API description and client do not have.
The values of some fields, such as those of guardrails, are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pomelo.testing.checks import Check, Problem, conversation, declared, flag, number, one_of, text, whole
from pomelo.testing.tool_checks import check_calls, response_format, tool_choice, tools


def check(body: Mapping[str, Any]) -> Problem | None:
    """Return the first problem of a request, or None."""
    problem = declared(body, _FIELDS, _OTHERS, required=("model", "messages"))
    if problem is None:
        problem = _check_order(body["messages"])
    return problem or check_calls(body["messages"], _CALL_ID, indexed=True)


_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")

MESSAGE_ORDER = "message_order"
"""The code of a problem with the order of roles."""


def _check_order(messages: Sequence[Mapping[str, Any]]) -> Problem | None:
    previous = None
    for message in messages:
        role = message["role"]
        if role == "assistant" and not message.get("content") and not message.get("tool_calls"):
            return Problem(MESSAGE_ORDER, None, "An answer must have content or tool calls")
        if role not in _FOLLOWING.get(previous, _FOLLOWING[None]):
            return Problem(MESSAGE_ORDER, None, f"Unexpected role '{role}' after role '{previous}'")
        previous = role
    if previous == "assistant" and not messages[-1].get("prefix"):
        return Problem(MESSAGE_ORDER, None, "The last role must be user or tool, or a prefix")
    return None


_FOLLOWING = {
    None: {"system", "user", "assistant"},
    "assistant": {"assistant", "user", "tool"},
    "tool": {"assistant", "tool"},
}
"""A role -> the roles that may follow; None is for all other roles and the beginning."""


def _top_p(name: str, value: Any) -> Problem | None:
    problem = number(0, 1)(name, value)
    if problem is None and value == 0:
        return Problem("decimal_below_min_value", name, "Input should be greater than 0")
    return problem


def _stop(name: str, value: Any) -> Problem | None:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return None
    return Problem("invalid_type", name, "Input should be a string or a list of strings")


_MESSAGE_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "prefix"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
_CHUNKS = {"text", "image_url", "document_url", "reference", "file", "thinking", "input_audio"}


def _chunk(name: str, chunk: Any, role: str) -> Problem | None:
    if not isinstance(chunk, dict):
        return Problem("invalid_type", name, "Input should be an object")
    chunk_type = chunk.get("type")
    if chunk_type not in ({"text", "thinking"} if role == "system" else _CHUNKS):
        return Problem("invalid_value", f"{name}.type", "There is no such chunk here")
    if chunk_type not in ("text", "image_url"):
        return None
    for key in chunk:
        if key not in ("type", chunk_type):
            return Problem("unknown_parameter", f"{name}.{key}", "Extra inputs are not permitted")
    value = chunk.get(chunk_type)
    if chunk_type == "text" or isinstance(value, str):
        return text()(f"{name}.{chunk_type}", value)
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        return Problem("invalid_type", f"{name}.image_url", "Input should be a string or have a url")
    if set(value) - {"url", "detail"}:
        return Problem("unknown_parameter", f"{name}.image_url", "Extra inputs are not permitted")
    return None


_FIELDS: Mapping[str, Check] = {
    "model": text(1),
    "messages": conversation(_MESSAGE_FIELDS, _chunk, content_optional={"user", "assistant", "tool"}),
    "temperature": number(0, 1.5),
    "top_p": _top_p,
    "max_tokens": whole(0, 2**31 - 1),
    "stop": _stop,
    "random_seed": whole(0, 2**63 - 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "n": whole(1, 128),
    "stream": flag,
    "safe_prompt": flag,
    "tools": tools(parameters_needed=True),
    "tool_choice": tool_choice("any"),
    "parallel_tool_calls": flag,
    "response_format": response_format,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "prompt_mode": one_of("reasoning"),
    "prompt_cache_key": text(),
}

_OTHERS = frozenset((
    "guardrails", "logprobs", "metadata", "min_tokens", "prediction", "prompt_logprobs", "repetition_penalty",
    "service_tier", "top_k", "top_logprobs", "top_prompt_logprobs",
))  # fmt: skip
