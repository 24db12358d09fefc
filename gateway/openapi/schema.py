"""JSON schemas, headers and responses, from which the OpenAPI description is composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pomelo.errors import TABLE

Schema = dict[str, Any]

JSON = "application/json"

NULL_ONLY: Schema = {"type": "null"}
"""The schema of unknown fields: they are refused, unless they are null."""

COMMON_ERRORS = (
    "invalid_api_key",
    "invalid_parameter",
    "overloaded",
    "store_unavailable",
    "shutting_down",
    "server_unavailable",
    "internal_error",
)


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(properties: Schema, required: Iterable[str] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def parameter(name: str, location: str, schema: Schema, description: str = "", **more: Any) -> Schema:
    described = {"description": description} if description else {}
    return {"name": name, "in": location, "schema": schema, **described, **more}


def operation(operation_id: str, summary: str, responses: Schema, *parameters: Schema) -> Schema:
    """Returns a GET operation."""
    described = {"operationId": operation_id, "summary": summary, "responses": responses}
    return {"get": {**described, "parameters": list(parameters)} if parameters else described}


def responses(ok: Mapping[str, Any], *codes: str) -> Schema:
    """Returns the responses of an operation: `ok` by media type, and the errors `codes` by HTTP status."""
    described: Schema = {"200": {"description": "Done.", "headers": RESPONSE_HEADERS, "content": dict(ok)}}
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(TABLE[code].http, []).append(code)
    for status, listed in sorted(by_status.items()):
        described[str(status)] = {
            "description": ", ".join(listed),
            "headers": RESPONSE_HEADERS,
            "content": {JSON: {"schema": ref("Error")}},
        }
    return described


def _count(description: str) -> Schema:
    return {"schema": {"type": "integer", "minimum": 0}, "description": description}


def _credits(description: str) -> Schema:
    return {"schema": {"type": "string", "pattern": r"^\d+(\.\d{1,6})?$"}, "description": description}


RESPONSE_HEADERS: Mapping[str, Schema] = {
    "X-Request-Id": {"schema": {"type": "string"}, "description": "Quote it when you report a problem."},
    "X-Pomelo-Mode": {"schema": {"enum": ["live", "test"]}, "description": "The mode of the key."},
    "X-RateLimit-Limit": _count("Requests a minute."),
    "X-RateLimit-Remaining": _count("Requests left in the window."),
    "X-RateLimit-Reset": _count("Unix seconds when the window ends."),
    "X-RateLimit-Limit-Tokens": _count("Tokens a minute of the text model."),
    "X-RateLimit-Remaining-Tokens": _count("Tokens left in the window."),
    "X-RateLimit-Reset-Tokens": _count("Unix seconds when that window ends."),
    "X-RateLimit-Limit-Concurrent": _count("Concurrent tasks."),
    "X-RateLimit-Remaining-Concurrent": _count("Tasks that can be started now beside the running ones."),
    "X-Credits-Remaining": _credits("Credits left, without what is reserved for running tasks."),
    "X-Credits-Charged": _credits("The cost of the task, if it is known when the headers are sent."),
    "Idempotent-Replayed": {
        "schema": {"const": "true"},
        "description": "The response repeats that of an earlier request with the same Idempotency-Key.",
    },
    "X-Pomelo-Adjusted": {
        "schema": {"type": "string"},
        "description": "Fields that the model does not accept as they are: the name alone if the field was "
        "left out, name=value if another value was used; such as stop; temperature=1.",
    },
    "Preference-Applied": {
        "schema": {"const": "handling=strict"},
        "description": "The task was handled strictly, as requested by Prefer.",
    },
    "Deprecation": {
        "schema": {"type": "string", "pattern": r"^@\d+$"},
        "description": "When the end of the model was announced: `@` and Unix seconds (RFC 9745).",
    },
    "Sunset": {
        "schema": {"type": "string"},
        "description": "The earliest time at which the model may be removed, an HTTP date (RFC 8594).",
    },
    "Retry-After": _count("Seconds to wait; with 409 if a request still runs, with 429 and 503."),
}
"""By name. Limits are present if the plan has them; without a valid key there is only the first header."""
