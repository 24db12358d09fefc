"""The headers of answers in the OpenAPI description. Used by `gateway.openapi`."""

from __future__ import annotations

from typing import Any


def _whole(description: str) -> dict[str, Any]:
    return {"schema": {"type": "integer", "minimum": 0}, "description": description}


def _credits(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "pattern": r"^\d+(\.\d{1,6})?$"}, "description": description}


HEADERS: dict[str, Any] = {
    "X-Request-Id": {"schema": {"type": "string"}, "description": "Name it when you report a fault."},
    "X-Pomelo-Mode": {"schema": {"enum": ["live", "test"]}, "description": "The key's."},
    "X-RateLimit-Limit": _whole("Requests a minute."),
    "X-RateLimit-Remaining": _whole("Requests that are left of the window."),
    "X-RateLimit-Reset": _whole("Unix seconds when the window ends."),
    "X-RateLimit-Limit-Tokens": _whole("Tokens a minute of the text model."),
    "X-RateLimit-Remaining-Tokens": _whole("Tokens that are left of the window."),
    "X-RateLimit-Reset-Tokens": _whole("Unix seconds when that window ends."),
    "X-RateLimit-Limit-Concurrent": _whole("Tasks at once."),
    "X-RateLimit-Remaining-Concurrent": _whole("Tasks that may be begun now beside those that run."),
    "X-Credits-Remaining": _credits("Credits that are left, without what running tasks hold."),
    "X-Credits-Charged": _credits("What the task cost, where that is known when the headers go out."),
    "Idempotent-Replayed": {
        "schema": {"const": "true"},
        "description": "The answer is that of an earlier request with the same Idempotency-Key.",
    },
    "X-Pomelo-Adjusted": {
        "schema": {"type": "string"},
        "description": "Fields that the model does not take as given: the name alone where it was left out, "
        "name=value where another value was used; such as stop; temperature=1.",
    },
    "Preference-Applied": {
        "schema": {"const": "handling=strict"},
        "description": "The task was handled strictly, as Prefer asked for.",
    },
    "Deprecation": {
        "schema": {"type": "string", "pattern": r"^@\d+$"},
        "description": "Since when the end of the model is announced: `@` and Unix seconds (RFC 9745).",
    },
    "Sunset": {
        "schema": {"type": "string"},
        "description": "The first moment at which the model may be gone, an HTTP date (RFC 8594).",
    },
    "Retry-After": _whole("Seconds to wait; with 409 of a running request, 429 and 503."),
}
"""By name. Limits are there where the plan has them, and nothing but the first for a key that is unknown."""

IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "Your name of the request: sent again within 24 hours, it gets the first one's answer.",
}

PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "schema": {"type": "string"},
    "example": "handling=strict",
    "description": "handling=strict (RFC 7240): a field that the model does not take as given is refused "
    "with invalid_parameter. By default it is adjusted, and listed in X-Pomelo-Adjusted.",
}
