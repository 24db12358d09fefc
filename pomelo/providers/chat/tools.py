"""The tools and the output format of chat completions, from those of a text task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import to_json

from pomelo.gen.v1.text_pb2 import TextFormat, Tool, ToolChoice
from pomelo.protobuf.enums import enum_names
from pomelo.providers.text.raw_json import array, declaration, with_member

_MODES = enum_names(ToolChoice.Mode.DESCRIPTOR)


def tools_json(tools: Iterable[Tool], no_parameters: str) -> bytes:
    """Return the field `tools` as JSON. `no_parameters` is the schema of a tool without parameters; "": the
    host needs none."""
    return array(_tool(tool, no_parameters) for tool in tools)


def tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.HasField("tool"):
        return {"type": "function", "function": {"name": choice.tool}}
    return _MODES[choice.mode]


def response_format_json(text_format: TextFormat) -> bytes:
    """Return the field `response_format` as JSON."""
    if text_format.HasField("json_object"):
        return b'{"type":"json_object"}'
    given = text_format.json_schema
    schema = with_member(declaration(given), "schema", given.schema_json)
    return with_member({"type": "json_schema"}, "json_schema", schema)


def _tool(tool: Tool, no_parameters: str) -> bytes:
    function = declaration(tool)
    schema = tool.parameters_json or no_parameters
    if not schema:
        return to_json({"type": "function", "function": function})
    return with_member({"type": "function"}, "function", with_member(function, "parameters", schema))
