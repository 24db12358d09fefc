"""The messages of a conversation, as OpenAI's chat completions have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openapi.schema import TEXT, Schema, closed, ref, union
from gateway.types import fields
from gateway.types.text.tools import function_of
from pomelo.errors import invalid, missing
from pomelo.fields import MAX_CALL_CHARACTERS, MAX_PARTS
from pomelo.gen.v1.text_pb2 import ImageDetail, ImagePart, Message, Role

_ROLES = {
    "system": Role.ROLE_SYSTEM,
    "developer": Role.ROLE_SYSTEM,
    "user": Role.ROLE_USER,
    "assistant": Role.ROLE_ASSISTANT,
    "tool": Role.ROLE_TOOL,
}
_TEXT_ROLES = {name: role for name, role in _ROLES.items() if name != "tool"}
"""The roles whose messages may be nothing but a text."""

_PARTS = ("text", "image_url")
_RESPONSE_PARTS = (*_PARTS, "refusal")
"""The types of parts that a message of the assistant may have. What it refused with is a text of it."""

_COPIED = ("role", "annotations", "tool_calls")
"""Members of a message of the assistant that some SDKs copy into its parts, where they have no effect."""

_THOUGHTS = ("reasoning", "reasoning_content", "reasoning_details", "thinking_blocks")
"""What models of other providers thought, as frameworks send it back. No model takes it."""

CACHE_HINTS = ("cache_control", "prompt_cache_breakpoint")
"""Members of parts that say where a provider may cache the input. They do not change the output."""

_DETAILS = {
    **fields.enum_values(ImageDetail, ("auto", "low", "high")),
    "original": ImageDetail.IMAGE_DETAIL_HIGH,
}


def assign_messages(task_input: Any, value: Any) -> None:
    if type(value) is not list:
        raise invalid("messages", "a list of messages")
    add = task_input.messages.add
    for i, item in enumerate(value):
        if type(item) is dict and len(item) == 2:
            # A fast path for the common shape, with as few checks as possible.
            role, content = item.get("role"), item.get("content")
            number = _TEXT_ROLES.get(role) if type(role) is str else None
            if number is not None and type(content) is str:
                message = add()
                message.role = number
                message.content.add().text = content
                continue
        _fill_message(add(), f"messages[{i}]", item)


def _fill_message(message: Message, label: str, item: Any) -> None:
    """Fills a message. One without a role or content is refused by the engine, which checks them in order."""
    if type(item) is not dict:
        raise invalid(label, "an object with role and content")
    role = item.get("role")
    if role is None:
        return
    number = _ROLES.get(role) if type(role) is str else None
    if number is None:
        raise invalid(f"{label}.role", "system, user, assistant or tool")
    message.role = number
    if item.get("name") is not None:
        message.name = fields.check_text(f"{label}.name", item["name"])
    if number == Role.ROLE_TOOL:
        _fill_result(message, label, item)
    elif number == Role.ROLE_ASSISTANT:
        _fill_response(message, label, item)
    else:
        fields.check_names(item, ("role", "content", "name"), label)
        _add_content(message, f"{label}.content", item.get("content"))


def _fill_response(message: Message, label: str, item: dict[str, Any]) -> None:
    """Fills a message of the assistant from an earlier response. SDKs send back all of its members, and what
    they have parsed of them."""
    known = ["role", "content", "refusal", "parsed", "name", "tool_calls", *_THOUGHTS]
    if item.get("annotations") == []:
        known.append("annotations")
    fields.check_names(item, known, label)
    calls, content, refusal = item.get("tool_calls"), item.get("content"), item.get("refusal")
    if not ((calls or refusal) and content in (None, "")):
        _add_content(message, f"{label}.content", content, _RESPONSE_PARTS)
    if refusal is not None and fields.check_text(f"{label}.refusal", refusal):
        message.content.add(text=refusal)
    if calls is None:
        return
    if type(calls) is not list:
        raise invalid(f"{label}.tool_calls", "a list of tool calls")
    for i, each in enumerate(calls):
        call_label = f"{label}.tool_calls[{i}]"
        function = function_of(each, call_label, ("name", "arguments", "parsed_arguments"), "id", "index")
        # A call that was joined from the pieces of a stream has their index. The order of the list applies.
        if each.get("index") is not None and type(each["index"]) is not int:
            raise invalid(f"{call_label}.index", "a whole number")
        call = message.content.add().tool_call
        call.id = fields.required_text(each, "id", call_label)
        call.name = fields.required_text(function, "name", f"{call_label}.function")
        call.arguments_json = fields.required_text(function, "arguments", f"{call_label}.function")


def _fill_result(message: Message, label: str, item: dict[str, Any]) -> None:
    fields.check_names(item, ("role", "content", "name", "tool_call_id"), label)
    result = message.content.add().tool_result
    result.tool_call_id = fields.required_text(item, "tool_call_id", label)
    content = item.get("content")
    if type(content) is list:
        texts = Message()
        _add_parts(texts, f"{label}.content", content, ("text",))
        content = "".join([part.text for part in texts.content])
    result.content = fields.required_text({"content": content}, "content", label)


def _add_content(message: Message, label: str, content: Any, part_types: tuple[str, ...] = _PARTS) -> None:
    if type(content) is list:
        _add_parts(message, label, content, part_types)
    elif type(content) is str:
        message.content.add(text=content)
    elif content is not None:
        raise invalid(label, "a text or a list of parts")


def _add_parts(message: Message, label: str, items: list[Any], part_types: tuple[str, ...]) -> None:
    for i, item in enumerate(items):
        part_label = f"{label}[{i}]"
        if type(item) is not dict:
            raise invalid(part_label, "an object with type")
        part_type = item.get("type")
        if part_type is None:
            raise missing(f"{part_label}.type")
        if part_type not in part_types:
            raise invalid(f"{part_label}.type", f"one of {', '.join(part_types)}")
        more = _COPIED if part_types is _RESPONSE_PARTS else ()
        fields.check_names(item, ("type", part_type, *CACHE_HINTS, *more), part_label)
        value = item.get(part_type)
        if value is None:
            raise missing(f"{part_label}.{part_type}")
        if part_type != "image_url":
            message.content.add(text=fields.check_text(f"{part_label}.{part_type}", value))
        else:
            _fill_image(message.content.add().image, f"{part_label}.image_url", value)


def _fill_image(image: ImagePart, label: str, value: Any) -> None:
    if type(value) is not dict:
        image.source.url = fields.check_text(label, value)
        return
    fields.check_names(value, ("url", "detail", "format"), label)
    if value.get("format") is not None:  # frameworks add the media type here; the bytes decide
        fields.check_text(f"{label}.format", value["format"])
    image.source.url = fields.required_text(value, "url", label)
    detail = value.get("detail")
    if detail is not None:
        number = _DETAILS.get(detail) if type(detail) is str else None
        if number is None:
            raise invalid(f"{label}.detail", f"one of {', '.join(_DETAILS)}")
        image.detail = number


_NAME = {"type": ["string", "null"], "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_TEXT_PARTS = {"type": "array", "items": ref("TextPart"), "minItems": 1, "maxItems": MAX_PARTS}
_TEXT = {"anyOf": [TEXT, _TEXT_PARTS]}
_TEXT_AND_IMAGES = {"anyOf": [TEXT, {**_TEXT_PARTS, "items": ref("Part")}]}
_TEXT_OR_NULL = {
    "anyOf": [{"type": ["string", "null"]}, {**_TEXT_PARTS, "items": ref("AssistantPart")}],
    "description": "Absent or null only with tool_calls or refusal.",
}
_URL = {"type": "string", "description": "A data: URI with a base64 image."}
DETAIL: Schema = {"enum": [*_DETAILS, None], "description": "How closely the model looks at it."}
_FORMAT = {"type": ["string", "null"], "description": "A media type. No effect: the bytes decide."}
PARSED: Schema = {"description": "What SDKs have read from it. No effect."}
_FUNCTION_CALL = {
    "name": {"type": "string", "minLength": 1, "maxLength": MAX_CALL_CHARACTERS},
    "arguments": {"type": "string", "description": "JSON, as the model wrote it."},
}
_INDEX = {"type": ["integer", "null"], "description": "Of a call from a stream. No effect."}
_CALL = {
    "id": {"type": "string", "minLength": 1, "maxLength": MAX_CALL_CHARACTERS},
    "type": {"const": "function"},
    "function": closed({**_FUNCTION_CALL, "parsed_arguments": PARSED}, _FUNCTION_CALL),
}


def _message_schema(roles: tuple[str, ...], required: tuple[str, ...], **members: Schema) -> Schema:
    properties = {"role": {"type": "string", "enum": list(roles)}, "name": _NAME, **members}
    return closed(properties, ("role", *required))


SCHEMAS: Mapping[str, Schema] = {
    "Message": union(
        "A message; its role decides what it may have.",
        {
            "system": "SystemMessage",
            "developer": "SystemMessage",
            "user": "UserMessage",
            "assistant": "AssistantMessage",
            "tool": "ToolMessage",
        },
        "role",
    ),
    "SystemMessage": _message_schema(("system", "developer"), ("content",), content=_TEXT),
    "UserMessage": _message_schema(("user",), ("content",), content=_TEXT_AND_IMAGES),
    "AssistantMessage": _message_schema(
        ("assistant",),
        (),
        content=_TEXT_OR_NULL,
        refusal={"type": ["string", "null"], "description": "What the assistant refused with."},
        parsed=PARSED,
        tool_calls={
            "type": ["array", "null"],
            "items": ref("ToolCall"),
            "description": "Each is answered by a message of the role tool, right after this one.",
        },
        annotations={"type": ["array", "null"], "items": {}, "maxItems": 0},
    ),
    "ToolMessage": _message_schema(
        ("tool",),
        ("content", "tool_call_id"),
        content=_TEXT,
        tool_call_id={"type": "string", "description": "The id of the call."},
    ),
    "Part": union("A part of a message.", {"text": "TextPart", "image_url": "ImagePart"}),
    "AssistantPart": union(
        "A part of a message of the assistant.", {"text": "TextPart", "refusal": "RefusalPart"}
    ),
    "RefusalPart": closed({"type": {"const": "refusal"}, "refusal": TEXT}),
    "TextPart": closed({"type": {"const": "text"}, "text": TEXT}),
    "ImagePart": closed({"type": {"const": "image_url"}, "image_url": {"anyOf": [ref("ImageUrl"), _URL]}}),
    "ImageUrl": closed({"url": _URL, "detail": DETAIL, "format": _FORMAT}, ("url",)),
    "ToolCall": closed({**_CALL, "index": _INDEX}, _CALL),
}
