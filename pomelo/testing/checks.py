"""Checks of requests, for the protocols of all vendors. Codes are OpenAI's; protocols translate them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.reply import Received


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request is refused: the vendor's `code` and `param`, and a message."""

    code: str
    param: str | None
    message: str


Check = Callable[[str, Any], Problem | None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is refused before its body is checked."""

    status: int
    code: str | None
    message: str


def access_refusal(received: Received, path: str, api_key: str | None, *, header: str = "") -> Refusal | None:
    """Return why a call is refused, or None. Without `api_key`, any key is valid, but one is required.

    The key is the bearer token of Authorization, or else the value of `header`.
    """
    if received.path != path:
        return Refusal(404, None, "Unknown request URL")
    if received.method != "POST":
        return Refusal(405, "method_not_supported", "Only POST is allowed here")
    scheme, _, key = received.headers.get("Authorization", "").partition(" ")
    if scheme != "Bearer":
        key = received.headers.get(header, "") if header else ""
    if not key:
        return Refusal(401, None, "A key is needed")
    if api_key is not None and key != api_key:
        return Refusal(401, "invalid_api_key", "The key is unknown")
    if received.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return Refusal(415, "unsupported_content_type", "Send JSON")
    if not isinstance(received.body, dict):
        return Refusal(400, None, "The body is not a JSON object")
    return None


def whole(minimum: int, maximum: int) -> Check:
    """Return a check for a whole number within bounds."""
    return _bounded((int,), "integer", "a whole number", minimum, maximum)


def number(minimum: float, maximum: float) -> Check:
    """Return a check for a number within bounds."""
    return _bounded((int, float), "decimal", "a number", minimum, maximum)


def _bounded(types: tuple[type, ...], code: str, noun: str, minimum: float, maximum: float) -> Check:
    def check(name: str, value: Any) -> Problem | None:
        if type(value) not in types:
            return Problem("invalid_type", name, f"{name} must be {noun}")
        if value < minimum:
            return Problem(f"{code}_below_min_value", name, f"{name} must be at least {minimum}")
        if value > maximum:
            return Problem(f"{code}_above_max_value", name, f"{name} must be at most {maximum}")
        return None

    return check


def text(min_length: int = 0, max_length: int = 10_485_760) -> Check:
    """Return a check for a string with a length within bounds."""

    def check(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if len(value) < min_length:
            return Problem("string_below_min_length", name, f"{name} is too short")
        if len(value) > max_length:
            return Problem("string_above_max_length", name, f"{name} is too long")
        return None

    return check


def one_of(*allowed: str) -> Check:
    """Return a check for one of the given strings."""

    def check(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if value not in allowed:
            return Problem("invalid_value", name, f"{name} must be one of {', '.join(allowed)}")
        return None

    return check


def flag(name: str, value: Any) -> Problem | None:
    """Check for true or false."""
    return None if isinstance(value, bool) else Problem("invalid_type", name, f"{name} must be true or false")


def declared(
    body: Mapping[str, Any],
    fields: Mapping[str, Check],
    others: Collection[str],
    *,
    required: Collection[str],
) -> Problem | None:
    """Return the first problem of a body's fields, or None: a name that is neither in `fields` nor in
    `others`, a missing required field, or a value that its check refuses."""
    for name in body:
        if name not in fields and name not in others:
            return Problem("unknown_parameter", name, f"Nothing is called {name}")
    for name in required:
        if body.get(name) is None:
            return Problem("missing_required_parameter", name, f"{name} is required")
    for name, check in fields.items():
        value = body.get(name)
        if value is not None:
            problem = check(name, value)
            if problem is not None:
                return problem
    return None


def conversation(
    fields: Mapping[str, Collection[str]],
    part: Callable[[str, Any, str], Problem | None],
    *,
    content_optional: Collection[str] = (),
    content: Check | None = None,
) -> Check:
    """Return a check for a list of messages. Each has a known role, only the role's `fields`, and content: a
    string, which `content` checks, or a list of parts, which `part` checks with their role. Roles in
    `content_optional` may have no content."""
    check_text = content or text()

    def check(name: str, value: Any) -> Problem | None:
        if not isinstance(value, list):
            return Problem("invalid_type", name, f"{name} must be a list")
        if not value:
            return Problem("empty_array", name, f"{name} must not be empty")
        for index, one in enumerate(value):
            problem = message(f"{name}[{index}]", one)
            if problem is not None:
                return problem
        return None

    def message(name: str, value: Any) -> Problem | None:
        if not isinstance(value, dict):
            return Problem("invalid_type", name, f"{name} must be an object")
        role = value.get("role")
        if role is None:
            return Problem("missing_required_parameter", f"{name}.role", "role is required")
        known = fields.get(role) if isinstance(role, str) else None
        if known is None:
            return Problem("invalid_value", f"{name}.role", "There is no such role")
        for key in value:
            if key not in known:
                return Problem("unknown_parameter", f"{name}.{key}", f"Nothing is called {key}")
        body = value.get("content")
        if body is None:
            if role in content_optional:
                return None
            return Problem("missing_required_parameter", f"{name}.content", "content is required")
        if isinstance(body, str):
            return check_text(f"{name}.content", body)
        if not isinstance(body, list):
            return Problem("invalid_type", f"{name}.content", "content must be a string or a list of parts")
        if not body:
            return Problem("empty_array", f"{name}.content", "content must not be empty")
        for index, one in enumerate(body):
            problem = part(f"{name}.content[{index}]", one, role)
            if problem is not None:
                return problem
        return None

    return check
