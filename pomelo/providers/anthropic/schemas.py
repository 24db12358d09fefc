"""JSON schemas of outputs, in the part of JSON Schema that the vendor takes: there, no object has properties
that the schema does not name, and numbers, texts and lists have no bounds."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json, to_json

from pomelo.gen.v1.text_pb2 import JsonSchema

_BOUNDS = frozenset((
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "maxItems", "uniqueItems", "minProperties", "maxProperties",
))  # fmt: skip
_SCHEMAS_BY_NAME = frozenset(("properties", "$defs", "definitions"))
_LISTS_OF_SCHEMAS = frozenset(("anyOf", "allOf", "oneOf", "prefixItems"))


def output_schema(given: JsonSchema) -> str | bytes | None:
    """Return the schema to send for one of the caller's, as JSON; None if the vendor has no such schemas.

    If it is not strict, bounds are left out, and properties that it allows but does not name: every output
    that matches what is sent also matches the rest of the caller's schema. A strict one is sent unchanged.
    """
    if given.strict:
        return given.schema_json
    schema = from_json(given.schema_json or "{}")  # a task for any JSON object has no schema
    try:
        closed = _closed({"type": "object", **schema} if "properties" in schema else schema)
    except ValueError:
        return None
    return to_json(closed) if closed.get("type") == "object" else None


def _closed(schema: Any) -> Any:
    """Raises ValueError if an object may only have properties without names."""
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BOUNDS or (name == "minItems" and value not in (0, 1)):
            continue
        if name in _SCHEMAS_BY_NAME and isinstance(value, dict):
            closed[name] = {each: _closed(inner) for each, inner in value.items()}
        elif name in _LISTS_OF_SCHEMAS and isinstance(value, list):
            closed[name] = list(map(_closed, value))
        else:
            closed[name] = _closed(value) if name == "items" else value
    if closed.get("type") == "object" or "properties" in closed:
        if not closed.get("properties") and closed.get("additionalProperties") is not False:
            raise ValueError
        closed["additionalProperties"] = False
    return closed
