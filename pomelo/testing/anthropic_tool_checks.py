"""Checks of the tools, the tool calls and the output of a Messages request, as Anthropic makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pomelo.testing.checks import Problem
from pomelo.testing.tool_checks import TOOL_NAME

_CALL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_NO_EFFORT = re.compile(r"claude-(3|haiku-4)")
"""Models that take no effort, and can't think adaptively."""


def tools(name: str, value: Any) -> Problem | None:
    """Check a list of tools."""
    if not isinstance(value, list):
        return Problem("invalid_type", name, "Input should be a valid list")
    for index, tool in enumerate(value):
        label = f"{name}[{index}].custom"
        if not isinstance(tool, dict) or tool.keys() - {"name", "description", "input_schema", "strict"}:
            return Problem("unknown_parameter", label, "Extra inputs are not permitted")
        if not isinstance(tool.get("name"), str) or not TOOL_NAME.fullmatch(tool["name"]):
            return Problem(
                "invalid_value", f"{label}.name", f"String should match pattern {TOOL_NAME.pattern}"
            )
        problem = _schema(f"{label}.input_schema", tool.get("input_schema"), tool.get("strict"))
        if problem is not None:
            return problem
    if len({tool["name"] for tool in value}) < len(value):
        return Problem("invalid_value", name, "Tool names must be unique.")
    return None


def _schema(name: str, schema: Any, strict: Any) -> Problem | None:
    if not isinstance(schema, dict):
        return Problem("invalid_type", name, "Input should be an object")
    if "type" not in schema:
        return Problem("missing_required_parameter", f"{name}.type", "Field required")
    if schema["type"] != "object":
        return Problem("invalid_value", f"{name}.type", "Input should be 'object'")
    if strict and (fault := _fault(schema)):
        return Problem("invalid_value", name, fault)
    return None


def _fault(schema: Any) -> str:
    """Why a schema, or one within it, is not in the part of JSON Schema for strict schemas; "" if it is."""
    if isinstance(schema, list):
        return next(filter(None, map(_fault, schema)), "")
    if not isinstance(schema, dict):
        return ""
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        return "For 'object' type, 'additionalProperties' must be explicitly set to false"
    for keyword in ("minimum", "maximum", "minLength", "maxLength", "maxItems"):
        if isinstance(schema.get(keyword), int | float):
            return f"property '{keyword}' is not supported"
    return next(filter(None, map(_fault, schema.values())), "")


def tool_choice(name: str, value: Any) -> Problem | None:
    """Check a choice between tools."""
    kind = value.get("type") if isinstance(value, dict) else None
    keys = {"auto": set(), "any": set(), "tool": {"name"}, "none": set()}
    if kind not in keys:
        return Problem("invalid_value", name, "Input tag should be auto, any, tool or none")
    allowed = {"type", *keys[kind], *(["disable_parallel_tool_use"] if kind != "none" else [])}
    if value.keys() - allowed or not keys[kind] <= value.keys():
        return Problem("unknown_parameter", f"{name}.{kind}", "Extra inputs are not permitted")
    return None


def output_config(name: str, value: Any) -> Problem | None:
    """Check the effort and the format of the output."""
    if not isinstance(value, dict) or value.keys() - {"effort", "format"}:
        return Problem("unknown_parameter", name, "Extra inputs are not permitted")
    if value.get("effort", "low") not in _EFFORTS:
        return Problem("invalid_value", f"{name}.effort", f"Input should be {', '.join(_EFFORTS)}")
    if "format" not in value:
        return None
    output_format = value["format"]
    if not isinstance(output_format, dict) or output_format.keys() != {"type", "schema"}:
        return Problem("invalid_type", f"{name}.format", "Input should have a type and a schema")
    return _schema(f"{name}.format.schema", output_format["schema"], strict=True)


def thinking(name: str, value: Any) -> Problem | None:
    """Check the configuration of thinking."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("adaptive", "disabled", "enabled"):
        return Problem("invalid_value", name, "Input tag should be adaptive, disabled or enabled")
    return None


def check_thinking(body: Mapping[str, Any]) -> Problem | None:
    """Check what excludes thinking, and whether the model takes an effort."""
    kind = (body.get("thinking") or {}).get("type", "disabled")
    effort = (body.get("output_config") or {}).get("effort")
    if _NO_EFFORT.match(body["model"]) and (effort or kind == "adaptive"):
        return Problem("", None, "This model does not support the effort parameter.")
    if kind == "disabled":
        return None
    for name in ("temperature", "top_p", "top_k"):
        if body.get(name) is not None:
            return Problem("", name, "may only be set when thinking is disabled")
    if kind == "adaptive":
        return None
    if (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
        return Problem("", None, "Thinking may not be enabled when tool_choice forces tool use.")
    for message in body["messages"]:
        blocks = _blocks(message)
        if _of("tool_use", blocks) and blocks[0]["type"] != "thinking":
            return Problem("", "messages", "Expected `thinking`, but found `tool_use`")
    return None


def check_calls(body: Mapping[str, Any]) -> Problem | None:
    """Check that tool calls are complete and different, of a request with tools, and that the next turn
    begins with their results, and has no others."""
    messages: Sequence[Mapping[str, Any]] = body["messages"]
    used: set[str] = set()
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        name, blocks = f"messages[{index}]", _blocks(message)
        results = _of("tool_result", blocks)
        if {block.get("tool_use_id") for block in results} != open_calls or len(results) > len(open_calls):
            return Problem("", name, "`tool_use` ids were found without `tool_result` blocks, or the reverse")
        if results != blocks[: len(results)]:
            return Problem("", name, "`tool_result` blocks must be first")
        calls = _of("tool_use", blocks)
        if (calls or results) and not body.get("tools"):
            return Problem("", None, "Requests which include `tool_use` or `tool_result` must define tools")
        open_calls = set()
        for number, call in enumerate(calls):
            label = f"{name}.content[{number}].tool_use"
            if call.keys() != {"type", "id", "name", "input"} or not isinstance(call["input"], dict):
                return Problem("invalid_type", f"{label}.input", "Input should be a valid dictionary")
            if not _CALL_ID.fullmatch(call["id"]):
                return Problem("invalid_value", f"{label}.id", f"String should match {_CALL_ID.pattern}")
            if call["id"] in used:
                return Problem("invalid_value", f"{label}.id", "`tool_use` ids must be unique")
            used.add(call["id"])
            open_calls.add(call["id"])
    return Problem("", "messages", "`tool_use` ids without `tool_result` blocks") if open_calls else None


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _of(kind: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [block for block in blocks if block["type"] == kind]
