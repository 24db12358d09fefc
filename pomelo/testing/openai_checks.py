"""What OpenAI would refuse in a chat-completions request, checked field by field.

`openai_wire` calls `check`. Strict on purpose: a name that the vendor's published description of the API
doesn't declare is refused, as are parameters that its newer models don't take. Fields that belong to tools,
sound and the like are known by name and otherwise let through.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request is refused: the vendor's `code` and `param`, and a message in our words."""

    code: str
    param: str | None
    message: str


Check = Callable[[str, Any], Problem | None]


def check(body: Mapping[str, Any]) -> Problem | None:
    """The first thing that is wrong with a request, or None."""
    for name in body:
        if name not in _FIELDS and name not in _OTHERS:
            return Problem("unknown_parameter", name, f"Nothing is called {name}")
    for name in ("model", "messages"):
        if body.get(name) is None:
            return Problem("missing_required_parameter", name, f"{name} is required")
    for name, checks in _FIELDS.items():
        value = body.get(name)
        if value is not None:
            problem = checks(name, value)
            if problem is not None:
                return problem
    return _together(body)


def _together(body: Mapping[str, Any]) -> Problem | None:
    if body.get("stream_options") is not None and not body.get("stream"):
        return Problem("invalid_value", "stream_options", "stream_options are for streams alone")
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        return Problem("invalid_parameter_combination", "max_tokens", "Send one of the two limits")
    if not str(body["model"]).startswith(("gpt-5", "gpt-6", "o1", "o3", "o4")):
        return None
    for name in ("max_tokens", "stop", "presence_penalty", "frequency_penalty", "logit_bias"):
        if body.get(name) is not None:
            return Problem("unsupported_parameter", name, f"This model takes no {name}")
    if body.get("reasoning_effort") != "none":
        for name in ("temperature", "top_p", "logprobs", "top_logprobs"):
            if body.get(name) is not None:
                return Problem("unsupported_value", name, f"This model takes {name} without reasoning alone")
    return None


def _whole(least: int, most: int) -> Check:
    def checked(name: str, value: Any) -> Problem | None:
        if type(value) is not int:
            return Problem("invalid_type", name, f"{name} must be a whole number")
        if value < least:
            return Problem("integer_below_min_value", name, f"{name} must be at least {least}")
        if value > most:
            return Problem("integer_above_max_value", name, f"{name} must be at most {most}")
        return None

    return checked


def _number(least: float, most: float) -> Check:
    def checked(name: str, value: Any) -> Problem | None:
        if type(value) not in (int, float):
            return Problem("invalid_type", name, f"{name} must be a number")
        if value < least:
            return Problem("decimal_below_min_value", name, f"{name} must be at least {least}")
        if value > most:
            return Problem("decimal_above_max_value", name, f"{name} must be at most {most}")
        return None

    return checked


def _text(least: int = 0, most: int = 10_485_760) -> Check:
    def checked(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if len(value) < least:
            return Problem("string_below_min_length", name, f"{name} is too short")
        if len(value) > most:
            return Problem("string_above_max_length", name, f"{name} is too long")
        return None

    return checked


def _one_of(*allowed: str) -> Check:
    def checked(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if value not in allowed:
            return Problem("invalid_value", name, f"{name} must be one of {', '.join(allowed)}")
        return None

    return checked


def _flag(name: str, value: Any) -> Problem | None:
    return None if isinstance(value, bool) else Problem("invalid_type", name, f"{name} must be true or false")


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


def _messages(name: str, value: Any) -> Problem | None:
    if not isinstance(value, list):
        return Problem("invalid_type", name, f"{name} must be a list")
    if not value:
        return Problem("empty_array", name, f"{name} must not be empty")
    for index, message in enumerate(value):
        problem = _message(f"{name}[{index}]", message)
        if problem is not None:
            return problem
    return None


def _message(name: str, message: Any) -> Problem | None:
    if not isinstance(message, dict):
        return Problem("invalid_type", name, f"{name} must be an object")
    role = message.get("role")
    if role is None:
        return Problem("missing_required_parameter", f"{name}.role", "role is required")
    known = _MESSAGE_FIELDS.get(role) if isinstance(role, str) else None
    if known is None:
        return Problem("invalid_value", f"{name}.role", "There is no such role")
    for key in message:
        if key not in known:
            return Problem("unknown_parameter", f"{name}.{key}", f"Nothing is called {key}")
    content = message.get("content")
    if content is None:
        if role == "assistant":
            return None
        return Problem("missing_required_parameter", f"{name}.content", "content is required")
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return Problem("invalid_type", f"{name}.content", "content must be a string or a list of parts")
    if not content:
        return Problem("empty_array", f"{name}.content", "content must not be empty")
    for index, part in enumerate(content):
        problem = _part(f"{name}.content[{index}]", part, _PARTS.get(role, {"text"}))
        if problem is not None:
            return problem
    return None


def _part(name: str, part: Any, allowed: set[str]) -> Problem | None:
    if not isinstance(part, dict):
        return Problem("invalid_type", name, f"{name} must be an object")
    kind = part.get("type")
    if kind not in allowed:
        return Problem("invalid_value", f"{name}.type", f"A part here is one of {', '.join(sorted(allowed))}")
    if set(part) != {"type", kind}:
        return Problem("unknown_parameter", name, f"A {kind} part has type and {kind}")
    value = part[kind]
    if kind in ("text", "refusal"):
        return _text()(f"{name}.{kind}", value)
    if kind != "image_url":
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
    "model": _text(1),
    "messages": _messages,
    "max_tokens": _whole(1, 2**31 - 1),
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "stop": _stop,
    "n": _whole(1, 128),
    "seed": _whole(-(2**63), 2**63 - 1),
    "logprobs": _flag,
    "top_logprobs": _whole(0, 20),
    "stream": _flag,
    "stream_options": _stream_options,
    "reasoning_effort": _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "service_tier": _one_of("auto", "default", "flex", "scale", "priority", "fast"),
    "safety_identifier": _text(0, 64),
    "prompt_cache_key": _text(),
    "user": _text(),
    "store": _flag,
    "parallel_tool_calls": _flag,
}

_OTHERS = frozenset(
    (
        "audio",
        "function_call",
        "functions",
        "logit_bias",
        "metadata",
        "modalities",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "response_format",
        "tool_choice",
        "tools",
        "verbosity",
        "web_search_options",
    )
)
