"""Checks of the tools, the output format and the tool calls of chat completions, as OpenAI makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pomelo.testing.checks import Check, Problem

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_MODES = ("none", "auto", "required")


def tools(*, parameters_needed: bool = False) -> Check:
    """Return a check for a list of tools."""

    def check(name: str, value: Any) -> Problem | None:
        if not isinstance(value, list) or not 1 <= len(value) <= 128:
            return Problem("invalid_value", name, f"{name} must be a list of 1 to 128 tools")
        names = []
        for index, tool in enumerate(value):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or tool.keys() != {"type", "function"}:
                return Problem("invalid_type", f"{name}[{index}]", "A tool has a type and a function")
            problem = _function(f"{name}[{index}].function", function, parameters_needed)
            if problem is not None:
                return problem
            names.append(function["name"])
        if len(set(names)) < len(names):
            return Problem("invalid_value", name, "Two tools have the same name")
        return None

    return check


def _function(name: str, function: Mapping[str, Any], parameters_needed: bool) -> Problem | None:
    if unknown := function.keys() - {"name", "description", "parameters", "strict"}:
        return Problem("unknown_parameter", f"{name}.{min(unknown)}", "Nothing is called so")
    if not isinstance(function.get("name"), str) or not TOOL_NAME.fullmatch(function["name"]):
        return Problem("invalid_value", f"{name}.name", "A name has only A-Z, a-z, 0-9, _ and -")
    if not isinstance(function.get("description", ""), str):
        return Problem("invalid_type", f"{name}.description", "description must be a string")
    if not isinstance(function.get("strict", False), bool):
        return Problem("invalid_type", f"{name}.strict", "strict must be true or false")
    if parameters_needed and "parameters" not in function:
        return Problem("missing_required_parameter", f"{name}.parameters", "parameters are required")
    schema = function.get("parameters", {"type": "object", "additionalProperties": False})
    return _schema(f"{name}.parameters", schema, function.get("strict"), "invalid_function_parameters")


def _schema(name: str, schema: Any, strict: Any, code: str) -> Problem | None:
    if not isinstance(schema, dict):
        return Problem("invalid_type", name, "A schema must be an object")
    if schema.get("type", "object") != "object":
        return Problem(code, name, "Invalid schema: its type must be object")
    if strict and schema.get("additionalProperties") is not False:
        return Problem(code, name, "Invalid schema: 'additionalProperties' must be false")
    return None


def tool_choice(*more_modes: str) -> Check:
    """Return a check for a choice between tools; `more_modes` are those that OpenAI does not have."""
    modes = (*_MODES, *more_modes)

    def check(name: str, value: Any) -> Problem | None:
        if isinstance(value, str):
            return None if value in modes else Problem("invalid_value", name, f"one of {', '.join(modes)}")
        function = value.get("function") if isinstance(value, dict) else None
        if (
            not isinstance(function, dict)
            or value.keys() != {"type", "function"}
            or function.keys() != {"name"}
        ):
            return Problem("invalid_type", name, "A choice is a mode, or a type and a function")
        return None

    return check


def response_format(name: str, value: Any) -> Problem | None:
    """Check an output format."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        return Problem("invalid_value", f"{name}.type", "type is text, json_object or json_schema")
    if value["type"] != "json_schema":
        return None if len(value) == 1 else Problem("unknown_parameter", name, "There is only a type")
    schema = value.get("json_schema")
    if not isinstance(schema, dict) or value.keys() != {"type", "json_schema"}:
        return Problem("missing_required_parameter", f"{name}.json_schema", "json_schema is required")
    if unknown := schema.keys() - {"name", "description", "schema", "strict"}:
        return Problem("unknown_parameter", f"{name}.json_schema.{min(unknown)}", "Nothing is called so")
    if not isinstance(schema.get("name"), str) or not TOOL_NAME.fullmatch(schema["name"]):
        return Problem("invalid_value", f"{name}.json_schema.name", "A name has A-Z, a-z, 0-9, _ and -")
    # The vendor names only the parameter here, and gives no code.
    return _schema(name, schema.get("schema"), schema.get("strict"), "")


def check_calls(
    messages: Sequence[Mapping[str, Any]], call_id: re.Pattern[str], *, indexed: bool = False
) -> Problem | None:
    """Check that tool calls are complete, with ids that match `call_id`, and that the results of each
    message's calls, and nothing else, follow it. With `indexed`, calls may have an index."""
    unanswered: set[str] = set()
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if message["role"] == "tool":
            if message.get("tool_call_id") not in unanswered:
                return Problem("", name, "A tool message must follow a message with its tool call")
            unanswered.remove(message["tool_call_id"])
            continue
        if unanswered:
            return Problem("", "messages", "Tool calls must be followed by tool messages")
        for number, call in enumerate(message.get("tool_calls") or ()):
            if indexed and isinstance(call, dict):
                call = {key: value for key, value in call.items() if key != "index"}
            problem = _call(f"{name}.tool_calls[{number}]", call, call_id)
            if problem is not None:
                return problem
            unanswered.add(call["id"])
    return Problem("", "messages", "Tool calls must be followed by tool messages") if unanswered else None


def _call(name: str, call: Any, call_id: re.Pattern[str]) -> Problem | None:
    if not isinstance(call, dict) or call.keys() != {"id", "type", "function"}:
        return Problem("invalid_type", name, "A tool call has an id, a type and a function")
    if not isinstance(call["id"], str) or not call_id.fullmatch(call["id"]):
        return Problem("invalid_value", f"{name}.id", f"An id must match {call_id.pattern}")
    function = call["function"]
    if not isinstance(function, dict) or function.keys() != {"name", "arguments"}:
        return Problem("invalid_type", f"{name}.function", "A function has a name and arguments")
    if not all(isinstance(value, str) for value in function.values()):
        return Problem("invalid_type", f"{name}.function", "The name and the arguments must be strings")
    return None
