"""The tools of the Messages API, from those of a text task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from pomelo.gen.v1.text_pb2 import TextInput, Tool, ToolChoice
from pomelo.providers.text.raw_json import array, declaration, with_member

_MODES = {
    ToolChoice.MODE_AUTO: "auto",
    ToolChoice.MODE_NONE: "none",
    ToolChoice.MODE_REQUIRED: "any",
}

_ANY_OBJECT = '{"type":"object"}'


def tools_json(tools: Iterable[Tool]) -> bytes:
    """Return the field `tools` as JSON."""
    return array(map(_tool, tools))


def undeclared_tools(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the field `tools` for a conversation in which these were called, and a task without tools: the
    vendor refuses calls of tools that a request does not declare."""
    return [{"name": name, "input_schema": {"type": "object"}} for name in names]


def tool_choice(text: TextInput) -> dict[str, Any] | None:
    """Return the field `tool_choice`; None if it is not needed."""
    given = text.tool_choice
    choice: dict[str, Any] = {"type": _MODES.get(given.mode, "auto")}
    if given.HasField("tool"):
        choice = {"type": "tool", "name": given.tool}
    if text.HasField("parallel_tool_calls") and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = not text.parallel_tool_calls
    return choice if len(choice) > 1 or text.HasField("tool_choice") else None


def _tool(tool: Tool) -> bytes:
    return with_member(declaration(tool), "input_schema", _input_schema(tool.parameters_json))


def _input_schema(schema: str) -> str | bytes:
    """A schema with its type, which the vendor requires."""
    given = from_json(schema or "{}")
    if not given:
        return _ANY_OBJECT
    return schema if "type" in given else with_member(schema.strip().encode(), "type", '"object"')
