"""JSON schemas, headers and responses, from which the OpenAPI description is composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pomelo.errors import RETRY_AFTER, TABLE

Schema = dict[str, Any]


class KnownModel(NamedTuple):
    """A model that the description lists. `max_characters` limits its input; 0: its task type has no such
    limit, or none is known."""

    task_type: int
    max_characters: int = 0


Models = Mapping[str, KnownModel]
"""Models by name."""


class Section(NamedTuple):
    """The operations of one tag, by path and method, and the schemas that they add."""

    tag: str
    description: str
    paths: Schema
    schemas: Mapping[str, Schema]


JSON = "application/json"

TEXT: Schema = {"type": "string"}
LABEL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}

COMMON_ERRORS = (
    "invalid_api_key",
    "invalid_parameter",
    "rate_limit_exceeded",
    "concurrency_limit_exceeded",
    "overloaded",
    "store_unavailable",
    "shutting_down",
    "server_unavailable",
    "internal_error",
)


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(properties: Schema, required: Iterable[str] | None = None, **more: Any) -> Schema:
    """Returns a schema of objects. All properties are required, or those that `required` names."""
    names = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": names, **more}


def closed(properties: Schema, required: Iterable[str] | None = None, **more: Any) -> Schema:
    """Returns a schema of objects that have no other properties."""
    return object_of(properties, required, additionalProperties=False, **more)


def union(description: str, members: Mapping[str, str], property_name: str = "type") -> Schema:
    """Returns a schema of alternatives: `members` has the schema's name for each value of the property."""
    return {
        "description": description,
        "oneOf": [ref(name) for name in dict.fromkeys(members.values())],
        "discriminator": {
            "propertyName": property_name,
            "mapping": {value: ref(name)["$ref"] for value, name in members.items()},
        },
    }


def parameter(name: str, location: str, schema: Schema, description: str = "", **more: Any) -> Schema:
    described = {"description": description} if description else {}
    return {"name": name, "in": location, "schema": schema, **described, **more}


def operation(
    operation_id: str,
    summary: str,
    responses: Schema,
    *parameters: Schema,
    description: str = "",
    request: Schema | None = None,
) -> Schema:
    """Returns an operation by its method: POST with a `request`, its contents by media type, else GET."""
    described: Schema = {"operationId": operation_id, "summary": summary}
    if description:
        described["description"] = description
    if parameters:
        described["parameters"] = list(parameters)
    if request is not None:
        described["requestBody"] = {"required": True, "content": request}
    return {"get" if request is None else "post": described | {"responses": responses}}


def responses(
    ok: Mapping[str, Any], *codes: str, more: frozenset[str] = frozenset(), openai: bool = False
) -> Schema:
    """Returns the responses of an operation: `ok` by media type, and the errors `codes` by HTTP status.
    `more` are its headers beside those of every operation. `openai`: the errors are those of the paths
    under /v1."""
    described: Schema = {"200": {"description": "Done.", "headers": headers(more), "content": dict(ok)}}
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(TABLE[code].http, []).append(code)
    for status, listed in sorted(by_status.items()):
        sent, error = headers(more, status), {"schema": ref("OpenAIError" if openai else "Error")}
        if openai:
            sent = {name: sent[name] for name in _OPENAI_ERROR_HEADERS if name in sent}
            sent["X-Should-Retry"] = {"schema": {"enum": ["true", "false"]}}
        else:
            error["examples"] = {code: {"$ref": f"#/components/examples/{code}"} for code in listed}
        described[str(status)] = {
            "description": ", ".join(listed),
            "headers": sent,
            "content": {JSON: error},
        }
    return described


def headers(more: frozenset[str] = frozenset(), status: int = 200) -> Schema:
    """Returns the headers of a response with an HTTP status: those of every operation, and `more`."""
    left_out = TASK_HEADERS - more
    if status not in RETRY_AFTER:
        left_out = left_out | {"Retry-After"}
    if status != 401:
        left_out = left_out | {"WWW-Authenticate"}
    return {
        name: {"$ref": f"#/components/headers/{name}"} for name in RESPONSE_HEADERS if name not in left_out
    }


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
    "WWW-Authenticate": {"schema": {"const": "Bearer"}, "description": "With 401: send a key as Bearer."},
}
"""By name. Limits are present if the plan has them; without a valid key there is only the first header."""

_OPENAI_ERROR_HEADERS = ("X-Request-Id", "Retry-After", "WWW-Authenticate")

MODEL_HEADERS = frozenset(
    {"X-RateLimit-Limit-Tokens", "X-RateLimit-Remaining-Tokens", "X-RateLimit-Reset-Tokens"}
)
"""The headers of operations that name a model."""

TASK_HEADERS = MODEL_HEADERS | {
    *("X-Credits-Charged", "Idempotent-Replayed", "X-Pomelo-Adjusted", "Preference-Applied"),
    *("Deprecation", "Sunset"),
}
"""The headers of operations that run a task."""
