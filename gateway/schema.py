"""The pieces of the OpenAPI description: JSON schemas of values, and the answers of an operation.

Used by `gateway.openapi` and `gateway.described_account`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.described_headers import HEADERS
from pomelo.errors import TABLE

Schema = dict[str, Any]

NUMBER = {"type": "number"}


def ranged(kind: str, least: float, most: float | None = None, **more: Any) -> Schema:
    schema: Schema = {"type": [kind, "null"], "minimum": least, **more}
    if most is not None:
        schema["maximum"] = most
    return schema


def text(least: int = 0, most: int | None = None, **more: Any) -> Schema:
    schema: Schema = {"type": ["string", "null"], "minLength": least, **more}
    if most is not None:
        schema["maxLength"] = most
    return schema


def one_of(*values: str, **more: Any) -> Schema:
    return {"type": ["string", "null"], "enum": [*values, None], **more}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(properties: Schema, required: Iterable[str] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


JSON = "application/json"


def responses(ok: Mapping[str, Any], *codes: str, status: int = 200) -> Schema:
    """The answers of an operation: `ok` by media type, and the errors by their status."""
    answers: Schema = {str(status): {"description": "Done.", "headers": HEADERS, "content": dict(ok)}}
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(TABLE[code].http, []).append(code)
    for http, listed in sorted(by_status.items()):
        answers[str(http)] = {
            "description": ", ".join(listed),
            "headers": HEADERS,
            "content": {JSON: {"schema": ref("Error")}},
        }
    return answers


ANY = (
    "invalid_api_key",
    "invalid_parameter",
    "overloaded",
    "store_unavailable",
    "shutting_down",
    "server_unavailable",
    "internal_error",
)
