"""The checks that the wires' own checks of requests are made of, and who is let in at all.

`openai_checks` and its like compose the first; the wires ask `turned_away` before anything else. No vendor is
known here: codes are OpenAI's, which have a word for each case, and a wire translates them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.reply import Received


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request is refused: the vendor's `code` and `param`, and a message in our words."""

    code: str
    param: str | None
    message: str


Check = Callable[[str, Any], Problem | None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call isn't let in, before its body is looked at."""

    status: int
    code: str | None
    message: str


def turned_away(received: Received, path: str, api_key: str | None, *, header: str = "") -> Refusal | None:
    """Why a call isn't let in, or None; with `api_key` None any key will do, but there must be one.

    The key is the bearer of Authorization, or else stands in `header`.
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
        return Refusal(400, None, "The body is no JSON object")
    return None


def whole(least: int, most: int) -> Check:
    """Checks for a whole number within bounds."""

    def checked(name: str, value: Any) -> Problem | None:
        if type(value) is not int:
            return Problem("invalid_type", name, f"{name} must be a whole number")
        if value < least:
            return Problem("integer_below_min_value", name, f"{name} must be at least {least}")
        if value > most:
            return Problem("integer_above_max_value", name, f"{name} must be at most {most}")
        return None

    return checked


def number(least: float, most: float) -> Check:
    """Checks for a number within bounds."""

    def checked(name: str, value: Any) -> Problem | None:
        if type(value) not in (int, float):
            return Problem("invalid_type", name, f"{name} must be a number")
        if value < least:
            return Problem("decimal_below_min_value", name, f"{name} must be at least {least}")
        if value > most:
            return Problem("decimal_above_max_value", name, f"{name} must be at most {most}")
        return None

    return checked


def text(least: int = 0, most: int = 10_485_760) -> Check:
    """Checks for a string of a length within bounds."""

    def checked(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if len(value) < least:
            return Problem("string_below_min_length", name, f"{name} is too short")
        if len(value) > most:
            return Problem("string_above_max_length", name, f"{name} is too long")
        return None

    return checked


def one_of(*allowed: str) -> Check:
    """Checks for one of the given strings."""

    def checked(name: str, value: Any) -> Problem | None:
        if not isinstance(value, str):
            return Problem("invalid_type", name, f"{name} must be a string")
        if value not in allowed:
            return Problem("invalid_value", name, f"{name} must be one of {', '.join(allowed)}")
        return None

    return checked


def flag(name: str, value: Any) -> Problem | None:
    """Checks for true or false."""
    return None if isinstance(value, bool) else Problem("invalid_type", name, f"{name} must be true or false")


def declared(
    body: Mapping[str, Any],
    fields: Mapping[str, Check],
    others: Collection[str],
    *,
    required: Collection[str],
) -> Problem | None:
    """The first thing that is wrong with a body's fields: a name that is neither in `fields` nor in `others`,
    a required one that is missing, a value that its check doesn't take; None where all is well."""
    for name in body:
        if name not in fields and name not in others:
            return Problem("unknown_parameter", name, f"Nothing is called {name}")
    for name in required:
        if body.get(name) is None:
            return Problem("missing_required_parameter", name, f"{name} is required")
    for name, checks in fields.items():
        value = body.get(name)
        if value is not None:
            problem = checks(name, value)
            if problem is not None:
                return problem
    return None


def conversation(
    fields: Mapping[str, Collection[str]],
    part: Callable[[str, Any, str], Problem | None],
    *,
    silent: Collection[str] = (),
    content: Check | None = None,
) -> Check:
    """Checks for a list of messages: a known role each, the role's `fields` alone, and content that is a
    string, which `content` checks, or a list of parts, which `part` checks with their role. Roles in `silent`
    may have no content."""
    said = content or text()

    def checked(name: str, value: Any) -> Problem | None:
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
        inside = value.get("content")
        if inside is None:
            if role in silent:
                return None
            return Problem("missing_required_parameter", f"{name}.content", "content is required")
        if isinstance(inside, str):
            return said(f"{name}.content", inside)
        if not isinstance(inside, list):
            return Problem("invalid_type", f"{name}.content", "content must be a string or a list of parts")
        if not inside:
            return Problem("empty_array", f"{name}.content", "content must not be empty")
        for index, one in enumerate(inside):
            problem = part(f"{name}.content[{index}]", one, role)
            if problem is not None:
                return problem
        return None

    return checked
