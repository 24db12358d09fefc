"""Makes a small value that matches a JSON Schema, for tool calls and JSON output of the sandbox.

It follows type, enum, const, $ref within the schema, properties, required, items, prefixItems, minItems,
anyOf, oneOf, allOf, the common formats, and the ranges of lengths and numbers. It ignores other keywords,
such as pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from pydantic_core import to_json

MAX_DEPTH = 32
MAX_VALUES = 1_000
MAX_CHARACTERS = 100_000
"""Characters of all examples of an answer together, as JSON."""

MAX_STEPS = 20_000
"""Schemas, keywords, names and characters of references that are read for all examples of an answer."""

_SEPARATORS = 4
"""Characters around a value: those after its name and after it, or the brackets of an object or array."""

_FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "email": "user@example.com",
    "uri": "https://example.com/",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_TYPES_BY_KEYWORD = {
    "properties": "object",
    "required": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "minimum": "number",
    "exclusiveMinimum": "number",
}
"""The type that is meant if a schema has none."""


def example_of(schema: Any, number: int = 1) -> Any:
    """Return a value for any schema, valid or not: the same for the same schema. Its depth, values and
    characters are limited; a schema that needs more gets null in their place, or fewer members and items.
    `number` is that of the examples of the answer, which have equal shares of what an answer may take."""
    return _Example(schema, number).value(schema, 0)


class _Example:
    def __init__(self, root: Any, number: int) -> None:
        self._root = root
        self._left = MAX_VALUES
        self._characters = MAX_CHARACTERS // number
        self._steps = MAX_STEPS // number

    def value(self, schema: Any, depth: int) -> Any:
        self._left -= 1
        self._characters -= _SEPARATORS
        if self._left < 0 or depth > MAX_DEPTH or self._steps < 0:
            return None
        schema = self._resolve(schema)
        choices = schema.get("enum")
        if "const" in schema:
            return self._given(schema["const"])
        if isinstance(choices, list) and choices:
            return self._given(choices[0])
        match _type(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "integer":
                return self._given(_number(schema, 1))
            case "number":
                return self._given(_number(schema, 0))
            case "boolean":
                return False
            case "null":
                return None
        return self._given(_string(schema))

    def _given(self, value: Any) -> Any:
        if self._characters >= 0:
            self._characters -= len(to_json(value))
        return value if self._characters >= 0 else None

    def _resolve(self, schema: Any) -> Mapping[str, Any]:
        """The schema with the schemas that it refers to, and the first of its alternatives."""
        merged: dict[str, Any] = {}
        pending = [schema]
        for _ in range(MAX_DEPTH):
            if not pending or self._steps < 0:
                break
            found = pending.pop(0)
            self._steps -= 4  # reading a schema takes the time of as many keywords
            if not isinstance(found, dict):
                continue
            self._steps -= len(found)
            for key in ("properties", "required", "$ref"):
                if isinstance(value := found.get(key), dict | list | str):
                    self._steps -= len(value)
            for key, value in found.items():
                known = merged.get(key)
                if key == "properties" and isinstance(known, dict) and isinstance(value, dict):
                    merged[key] = {**known, **value}
                elif key == "required" and isinstance(known, list) and isinstance(value, list):
                    merged[key] = known + value
                else:
                    merged.setdefault(key, value)
            if isinstance(pointer := found.get("$ref"), str):
                pending.append(self._at(pointer))
            for key in ("anyOf", "oneOf"):
                if isinstance(options := found.get(key), list):
                    pending += options[:1]
            if isinstance(parts := found.get("allOf"), list):
                pending += parts[:MAX_DEPTH]
        return merged

    def _at(self, pointer: str) -> Any:
        """The part of the schema that a reference such as #/$defs/city names; None if it names none."""
        found = self._root
        for step in pointer.removeprefix("#").split("/")[1:]:
            if not isinstance(found, dict):
                return None
            found = found.get(step.replace("~1", "/").replace("~0", "~"))
        return found if pointer.startswith("#") else None

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties"), schema.get("required")
        members: dict[str, Any] = {}
        for name in required if isinstance(required, list) else ():
            if not isinstance(name, str) or name in members:
                continue
            if self._left <= 0 or self._given(name) is None:
                break
            found = properties.get(name) if isinstance(properties, dict) else None
            members[name] = self.value(found, depth + 1)
        return members

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        first = schema.get("prefixItems")
        first = first if isinstance(first, list) else []
        count = _bound(schema, "minItems", MAX_VALUES)
        items: list[Any] = []
        while len(items) < count and self._left > 0 and self._characters >= 0:
            at = len(items)
            items.append(self.value(first[at] if at < len(first) else schema.get("items"), depth + 1))
        return items


def _type(schema: Mapping[str, Any]) -> Any:
    found = schema.get("type")
    if isinstance(found, list):
        return found[0] if found else None
    if found is None:
        return next((_TYPES_BY_KEYWORD[key] for key in schema if key in _TYPES_BY_KEYWORD), None)
    return found


def _bound(schema: Mapping[str, Any], keyword: str, maximum: int) -> int:
    value = schema.get(keyword)
    return min(value, maximum) if type(value) is int and value > 0 else 0


def _string(schema: Mapping[str, Any]) -> str:
    kind = schema.get("format")
    if isinstance(kind, str) and kind in _FORMATS:
        return _FORMATS[kind]
    text = "text".ljust(_bound(schema, "minLength", MAX_CHARACTERS), ".")
    most = schema.get("maxLength")
    return text[:most] if type(most) is int and most >= 0 else text


def _number(schema: Mapping[str, Any], step: float) -> float:
    """A number of the schema's range near 0, a multiple of `step` if that is not 0."""
    low, high = _limit(schema, "inimum", step or 1), _limit(schema, "aximum", -(step or 1))
    number: float = 0
    if low is not None and low > 0:
        number = low
    elif high is not None and high < 0:
        number = high
    if not step and low is not None and high is not None and low > high:
        number = low / 2 + high / 2  # both are exclusive, and less than 2 apart
    multiple = _given_number(schema, "multipleOf")
    if multiple is not None and multiple > 0:
        step = multiple
    try:
        # Away from 0, because towards it is out of the range.
        return ceil(abs(number) / step) * step * (-1 if number < 0 else 1) if step else number
    except (OverflowError, ValueError):
        return 0


def _limit(schema: Mapping[str, Any], ending: str, inwards: float) -> float | None:
    """The minimum or the maximum of a number; an exclusive one is moved `inwards`."""
    exclusive = _given_number(schema, "exclusiveM" + ending)
    return _given_number(schema, "m" + ending) if exclusive is None else exclusive + inwards


def _given_number(schema: Mapping[str, Any], keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
