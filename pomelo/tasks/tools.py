"""Checks the tools of a text task, the choice between them, and the form of its output."""

from __future__ import annotations

from collections.abc import Collection

from jiter import from_json
from pydantic_core import to_json

from pomelo.errors import invalid, missing
from pomelo.fields import (
    JSON_OBJECT,
    MAX_SCHEMA_CHARACTERS,
    MAX_SCHEMAS_CHARACTERS,
    MAX_TOOLS,
    check_name,
)
from pomelo.gen.v1.text_pb2 import TextFormat, TextInput, ToolChoice

_MAX_DETAIL = 200
"""Characters of a parser's error that a message contains."""

_MODES = (ToolChoice.MODE_NONE, ToolChoice.MODE_AUTO, ToolChoice.MODE_REQUIRED)


def check_tools(task_input: TextInput) -> int:
    """Refuses invalid tools, or a choice between tools that are not there. Replaces each schema by its
    compact form; without tools, removes what says something about them. Returns the bytes of all tools.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    tools = task_input.tools
    if not tools:
        # Clients send these by default; vendors refuse them in a request without tools.
        if task_input.HasField("tool_choice"):
            _check_choice(task_input.tool_choice, ())
            task_input.ClearField("tool_choice")
        task_input.ClearField("parallel_tool_calls")
        return 0
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"at most {MAX_TOOLS} tools", maximum=MAX_TOOLS)
    names: set[str] = set()
    size = schemas = 0
    for index, tool in enumerate(tools):
        label = f"tools[{index}].function"
        if not tool.name:
            raise missing(f"{label}.name")
        check_name(tool.name, f"{label}.name")
        if tool.name in names:
            raise invalid(f"{label}.name", "another name: an earlier tool has it")
        names.add(tool.name)
        schemas += len(tool.parameters_json)
        if schemas > MAX_SCHEMAS_CHARACTERS:
            expected = f"with parameters of at most {MAX_SCHEMAS_CHARACTERS:,} characters in all"
            raise invalid("tools", expected, maximum=MAX_SCHEMAS_CHARACTERS)
        if tool.parameters_json:
            tool.parameters_json = _compact(tool.parameters_json, f"{label}.parameters")
        size += tool.ByteSize()
    if task_input.HasField("tool_choice"):
        _check_choice(task_input.tool_choice, names)
    return size


def _check_choice(choice: ToolChoice, names: Collection[str]) -> None:
    which = choice.WhichOneof("choice")
    if which is None:
        raise missing("tool_choice")
    if which == "mode" and choice.mode not in _MODES:
        raise invalid("tool_choice", "none, auto, required or a tool")
    if which == "tool" and not choice.tool:
        raise missing("tool_choice.function.name")
    if not names and (which == "tool" or choice.mode == ToolChoice.MODE_REQUIRED):
        raise invalid("tool_choice", "none, auto or left out in a task without tools")
    if which == "tool" and choice.tool not in names:
        raise invalid("tool_choice.function.name", "the name of one of the tools")


def check_format(output_format: TextFormat) -> int:
    """Refuses an invalid form of the output. Replaces its schema by the compact form. Returns its bytes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    which = output_format.WhichOneof("format")
    if which is None:
        raise missing("response_format.type")
    if which != "json_schema":
        return 0
    schema, label = output_format.json_schema, "response_format.json_schema"
    if not schema.name:
        raise missing(f"{label}.name")
    check_name(schema.name, f"{label}.name")
    if not schema.schema_json:
        raise missing(f"{label}.schema")
    schema.schema_json = _compact(schema.schema_json, f"{label}.schema")
    return schema.ByteSize()


def _compact(text: str, label: str) -> str:
    """Returns a JSON object without white space, its members in their order. So equal tasks are equal over
    both protocols, and a provider can insert it into its request.

    Raises:
        PomeloError: invalid_parameter, naming `label`: it is not a JSON object, is too long, nested deeper
            than 200 levels, or has a name twice or a number that is too large.
    """
    if len(text) > MAX_SCHEMA_CHARACTERS:
        expected = f"at most {MAX_SCHEMA_CHARACTERS:,} characters"
        raise invalid(label, expected, maximum=MAX_SCHEMA_CHARACTERS)
    try:
        value = from_json(text.encode(), allow_inf_nan=False, catch_duplicate_keys=True)
        compact = to_json(value)
        if b"Infinity" in compact:  # 1e999 is read as infinite
            from_json(compact, allow_inf_nan=False)
    except ValueError as error:  # it may repeat a name of any length
        raise invalid(label, f"{JSON_OBJECT} ({str(error)[:_MAX_DETAIL]})") from None
    if type(value) is not dict:
        raise invalid(label, JSON_OBJECT)
    return compact.decode()
