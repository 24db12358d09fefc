"""Tool calls of scripted answers, and the JSON that a model would generate for a schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEEP = 5
"""Levels below which a value is as small as its schema allows, because the schema may contain itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an answer. `id` None: the protocol makes one."""

    name: str
    arguments: str = "{}"
    id: str | None = None


def example(schema: Any) -> Any:
    """Return a value that matches a JSON schema of the usual keywords, without bounds and patterns."""
    return _example(schema, schema, 0)


def _example(schema: Any, root: Any, level: int) -> Any:
    if not isinstance(schema, Mapping):
        return "Paris"
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = target[name]
        return _example(target, root, level + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _example(schema[key][-1 if level > _DEEP else 0], root, level + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            needed = schema.get("required", ()) if level > _DEEP else schema.get("properties", ())
            return {name: _example(schema["properties"][name], root, level + 1) for name in needed}
        case "array":
            items = schema.get("items")
            return [_example(items, root, level + 1)] if items and level <= _DEEP else []
        case "integer" | "number":
            return 7
        case "boolean":
            return True
        case "null":
            return None
    return "Paris"
