"""The messages, tools and formats of text tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from pomelo.gen.v1 import text_pb2
from pomelo.gen.v1.media_pb2 import Media, MediaSource
from pomelo.gen.v1.text_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    ContentPart,
    ImageDetail,
    ImagePart,
    Message,
    TextFormat,
    ToolCall,
    ToolChoice,
    ToolResult,
)

_ROLES = {"system": ROLE_SYSTEM, "developer": ROLE_SYSTEM, "user": ROLE_USER, "assistant": ROLE_ASSISTANT}
_MODES = {
    "auto": ToolChoice.MODE_AUTO,
    "none": ToolChoice.MODE_NONE,
    "required": ToolChoice.MODE_REQUIRED,
}


class MessageDict(TypedDict):
    """A message of plain text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


Messages = str | Sequence[Message | MessageDict]
"""A conversation, oldest first; a text is one message of the user."""

Image = bytes | str | os.PathLike[str] | Media
"""An image: its bytes, the path of its file, or what was uploaded or generated before."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function of the caller's that the model may call. `parameters` is the JSON Schema of its arguments;
    `strict` makes them always match it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A format: JSON that matches `schema`. `name` and `description` tell the model what it is for; `strict`
    makes it always match."""

    schema: Mapping[str, Any]
    name: str = "output"
    description: str = ""
    strict: bool | None = None


def user(
    text: str,
    *,
    images: Iterable[Image] = (),
    detail: Literal["auto", "low", "high"] | None = None,
    name: str = "",
) -> Message:
    """Returns a message of the user: a text, and images for models that accept them. `detail` is how closely
    the model looks at the images; `name` distinguishes several users.

    Raises:
        OSError: an image can't be read.
        ValueError: there is no such `detail`; TypeError: `images` is no list of images.
    """
    level = to_enum(ImageDetail, "detail", detail)
    check_list(images, "images must be a list of images")
    parts = [ContentPart(image=ImagePart(source=_image_source(image), detail=level)) for image in images]
    if text or not parts:
        parts.insert(0, ContentPart(text=text))
    return Message(role=ROLE_USER, content=parts, name=name)


def system(text: str) -> Message:
    """Returns a message with instructions to the model."""
    return Message(role=ROLE_SYSTEM, content=[ContentPart(text=text)])


def assistant(text: str, *, name: str = "") -> Message:
    """Returns a message of the model. `TextResult.message` already is one."""
    return Message(role=ROLE_ASSISTANT, content=[ContentPart(text=text)], name=name)


def tool_result(call: ToolCall, content: str, *, is_error: bool = False) -> Message:
    """Returns a message with what a tool returned; `is_error` says that it failed, and `content` why."""
    result = ToolResult(tool_call_id=call.id, content=content, is_error=is_error)
    return Message(role=ROLE_TOOL, content=[ContentPart(tool_result=result)])


def arguments(call: ToolCall) -> Any:
    """Returns the parsed arguments of a tool call: usually a dict. Check them: the model wrote them.

    Raises:
        ValueError: they are not JSON.
    """
    return json.loads(call.arguments_json or "{}")


def to_messages(messages: Messages, instructions: str | None) -> list[Message]:
    """Returns the messages of a conversation, after one with the instructions.

    Raises:
        ValueError: the role of a dict is unknown, or it has other keys; TypeError: a message is none.
    """
    if not isinstance(messages, str):
        check_list(messages, "messages must be a text or a list of messages")
    first = [system(instructions)] if instructions else []
    rest = [user(messages)] if isinstance(messages, str) else messages
    return first + [one if isinstance(one, Message) else _from_dict(one) for one in rest]


def check_list(values: object, expected: str) -> None:
    """Refuses a single value where a list is needed, also one whose parts Python would take for the list.

    Raises:
        TypeError: the message is `expected` and the type of the value.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{expected}, not {type(values).__name__}")


def to_tool(tool: Tool) -> text_pb2.Tool:
    """Returns the message of a tool.

    Raises:
        TypeError: it is no Tool.
    """
    if not isinstance(tool, Tool):
        raise TypeError(f"tools must be a list of Tool, not of {type(tool).__name__}")
    return text_pb2.Tool(
        name=tool.name,
        description=tool.description,
        parameters_json="" if tool.parameters is None else json.dumps(tool.parameters, ensure_ascii=False),
        strict=tool.strict,
    )


def to_enum(enum: Any, argument: str, name: str | None) -> Any:
    """Returns the value of a protobuf enumeration, by its name without the prefix. None: unspecified.

    Raises:
        ValueError: there is no such value. The message names the `argument`.
    """
    prefix = enum.keys()[0].removesuffix("UNSPECIFIED")
    if name is None:
        return enum.values()[0]
    try:
        return enum.Value(f"{prefix}{str(name).upper()}")
    except ValueError:
        known = ", ".join(each.removeprefix(prefix).lower() for each in enum.keys()[1:])
        raise ValueError(f"{argument} must be one of {known}, not {name!r}") from None


def to_tool_choice(choice: Literal["auto", "none", "required"] | Tool | None) -> ToolChoice | None:
    """Returns the message of a choice.

    Raises:
        ValueError: it is unknown.
    """
    if choice is None:
        return None
    if isinstance(choice, Tool):
        return ToolChoice(tool=choice.name)
    if choice not in _MODES:
        raise ValueError(f"tool_choice must be auto, none, required or a Tool, not {choice!r}")
    return ToolChoice(mode=_MODES[choice])


def to_format(form: Literal["text", "json"] | JsonSchema | None) -> TextFormat | None:
    """Returns the message of a format; None for any text.

    Raises:
        ValueError: it is unknown.
    """
    if isinstance(form, JsonSchema):
        schema = text_pb2.JsonSchema(
            name=form.name,
            description=form.description,
            schema_json=json.dumps(form.schema, ensure_ascii=False),
            strict=form.strict,
        )
        return TextFormat(json_schema=schema)
    if form == "json":
        return TextFormat(json_object=TextFormat.JsonObject())
    if form in (None, "text"):
        return None
    raise ValueError(f"format must be text, json or a JsonSchema, not {form!r}")


def _from_dict(message: MessageDict) -> Message:
    if not isinstance(message, Mapping):
        made = "user, system, assistant or tool_result"
        raise TypeError(f"A message is a dict or what {made} returns, not {type(message).__name__}")
    role = _ROLES.get(message.get("role", ""))
    if role is None:
        raise ValueError(
            f"The role of a dict is system, developer, user or assistant, not {message.get('role')!r}"
        )
    if unknown := message.keys() - MessageDict.__required_keys__:
        raise ValueError(
            f"A dict has role and content, not {min(unknown)!r}. See user, assistant and tool_result"
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise TypeError(f"The content of a dict is a text, not {type(content).__name__}. See user for images")
    return Message(role=role, content=[ContentPart(text=content)])


def _image_source(image: Image) -> MediaSource:
    if isinstance(image, Media):
        return MediaSource(media_id=image.id)
    return MediaSource(data=image if isinstance(image, bytes) else Path(image).read_bytes())
