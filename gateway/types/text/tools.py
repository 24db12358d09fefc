"""The tools of a text task, the choice between them, and the form of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from gateway.openapi.schema import TEXT, Schema, closed, ref, union
from gateway.types import fields
from pomelo.errors import invalid, missing
from pomelo.fields import JSON_OBJECT
from pomelo.gen.v1.text_pb2 import ToolChoice

MODES = fields.enum_values(ToolChoice.Mode, ("none", "auto", "required"))
_FORMATS = ("text", "json_object", "json_schema")


def assign_tools(task_input: Any, value: Any) -> None:
    if type(value) is not list:
        raise invalid("tools", "a list of tools")
    for i, item in enumerate(value):
        label = f"tools[{i}]"
        function = function_of(item, label, ("name", "description", "parameters", "strict"))
        tool = task_input.tools.add()
        _fill_definition(tool, function, f"{label}.function")
        parameters = function.get("parameters")
        if parameters is not None:
            tool.parameters_json = _json_text(parameters, f"{label}.function.parameters")


def assign_tool_choice(task_input: Any, value: Any) -> None:
    choice = task_input.tool_choice
    if type(value) is dict:
        function = function_of(value, "tool_choice", ("name",))
        choice.tool = fields.required_text(function, "name", "tool_choice.function")
        return
    mode = MODES.get(value) if type(value) is str else None
    if mode is None:
        raise invalid("tool_choice", "none, auto, required or a tool")
    choice.mode = mode


def assign_response_format(task_input: Any, value: Any) -> None:
    label = "response_format"
    if type(value) is not dict:
        raise invalid(label, "an object with type")
    kind = value.get("type")
    if kind is None:
        raise missing(f"{label}.type")
    if kind not in _FORMATS:
        raise invalid(f"{label}.type", f"one of {', '.join(_FORMATS)}")
    fields.check_names(value, ("type", "json_schema") if kind == "json_schema" else ("type",), label)
    if kind == "json_object":
        task_input.format.json_object.SetInParent()
    elif kind == "json_schema":
        label += ".json_schema"
        definition = value.get("json_schema")
        if definition is None:
            raise missing(label)
        if type(definition) is not dict:
            raise invalid(label, "an object with name and schema")
        fields.check_names(definition, ("name", "description", "schema", "strict"), label)
        schema = task_input.format.json_schema
        schema.SetInParent()
        _fill_definition(schema, definition, label)
        if definition.get("schema") is not None:
            schema.schema_json = _json_text(definition["schema"], f"{label}.schema")


def function_of(item: Any, label: str, known: tuple[str, ...], *more: str) -> dict[str, Any]:
    """Returns the member `function` of an object whose type is function. It may have the members `known`, the
    object itself also the members `more`.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    if type(item) is not dict:
        raise invalid(label, "an object with type and function")
    if item.get("type") is None:
        raise missing(f"{label}.type")
    if item["type"] != "function":  # an object of another type has no function
        raise invalid(f"{label}.type", "function")
    if item.get("function") is None:
        raise missing(f"{label}.function")
    fields.check_names(item, ("type", "function", *more), label)
    function = item["function"]
    if type(function) is not dict:
        raise invalid(f"{label}.function", "an object")
    fields.check_names(function, known, f"{label}.function")
    return function


def _fill_definition(message: Any, values: Mapping[str, Any], label: str) -> None:
    """Sets the name, description and strictness of a tool or a schema."""
    for name, check in (
        ("name", fields.check_text),
        ("description", fields.check_text),
        ("strict", fields.check_flag),
    ):
        value = values.get(name)
        if value is not None:
            setattr(message, name, check(f"{label}.{name}", value))


def _json_text(value: Any, label: str) -> str:
    """Returns a JSON object as text, with its members in the caller's order."""
    if type(value) is not dict:
        raise invalid(label, JSON_OBJECT)
    return to_json(value).decode()


_DEFINITION: Mapping[str, Schema] = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    "description": {"type": ["string", "null"]},
    "strict": {"type": ["boolean", "null"], "description": "Whether the output always matches the schema."},
}
_ANY_SCHEMA = {"type": "object", "additionalProperties": True, "description": "A JSON Schema."}
_FUNCTION = {**_DEFINITION, "parameters": {**_ANY_SCHEMA, "type": ["object", "null"]}}
_JSON_SCHEMA = {**_DEFINITION, "schema": _ANY_SCHEMA}


def _typed_object(kind: str, **members: Schema) -> Schema:
    return closed({"type": {"const": kind}, **members})


SCHEMAS: Mapping[str, Schema] = {
    "Tool": _typed_object("function", function=closed(_FUNCTION, ["name"])),
    "ToolChoice": _typed_object("function", function=closed({"name": TEXT})),
    "ResponseFormat": union(
        "The form of the output. For json_object, the messages must ask for JSON, too.",
        {"text": "TextFormat", "json_object": "JsonObjectFormat", "json_schema": "JsonSchemaFormat"},
    ),
    "TextFormat": _typed_object("text"),
    "JsonObjectFormat": _typed_object("json_object"),
    "JsonSchemaFormat": _typed_object("json_schema", json_schema=ref("JsonSchema")),
    "JsonSchema": closed(_JSON_SCHEMA, ["name", "schema"]),
}
