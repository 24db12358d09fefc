"""The messages of chat completions, from those of a text task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pomelo.gen.v1.text_pb2 import ImageDetail, ImagePart, Message, Role
from pomelo.protobuf.enums import enum_names
from pomelo.providers.text.call_ids import CallIds

_ROLES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}

_DETAILS = enum_names(ImageDetail.DESCRIPTOR)


def convert_messages(
    messages: Iterable[Message],
    *,
    call_ids: re.Pattern[str],
    names: bool,
    strict_order: bool,
    text_lists: bool,
) -> list[dict[str, Any]]:
    """Return messages as a host takes them.

    Ids of tool calls that do not match `call_ids` are replaced. Without `names`, authors' names are left out.
    `strict_order` and `text_lists` are those of a `Profile`.
    """
    ids: CallIds | None = None
    converted: list[dict[str, Any]] = []
    for message in messages:
        content = message.content
        role = _ROLES.get(message.role)
        if role is None:
            ids = ids or CallIds(call_ids)
            converted += _tool_messages(message, ids)
            continue
        if len(content) == 1 and content[0].HasField("text"):
            one: dict[str, Any] = {"role": role, "content": content[0].text}
        elif content[-1].HasField("tool_call"):
            ids = ids or CallIds(call_ids)
            one = _calling_message(message, ids)
        elif not text_lists and all(part.HasField("text") for part in content):
            between = "" if role == "assistant" else "\n"  # an answer may be split anywhere
            one = {"role": role, "content": between.join([part.text for part in content])}
        else:
            one = {"role": role, "content": list(map(_part, content))}
        if message.name and names:
            one["name"] = message.name
        converted.append(one)
    return _in_strict_order(converted) if strict_order else converted


def _in_strict_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move system messages before the conversation, leave out empty messages of the assistant, and put one of
    the assistant between the result of a tool and a message of the user's."""
    system: list[dict[str, Any]] = []
    ordered: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role == "system":
            system.append(message)
            continue
        if role == "assistant" and not message["content"] and "tool_calls" not in message:
            continue
        if role == "user" and ordered and ordered[-1]["role"] == "tool":
            ordered.append({"role": "assistant", "content": "OK."})
        ordered.append(message)
    return system + ordered


def _part(part: Any) -> dict[str, Any]:
    if part.HasField("image"):
        return {"type": "image_url", "image_url": _image(part.image)}
    return {"type": "text", "text": part.text}


def _image(image: ImagePart) -> dict[str, str]:
    url = {"url": image.source.url}
    return url | {"detail": _DETAILS[image.detail]} if image.detail else url


def _calling_message(message: Message, ids: CallIds) -> dict[str, Any]:
    """A message of the assistant that calls tools. Its texts are one, which all hosts take."""
    calls = [part.tool_call for part in message.content if part.HasField("tool_call")]
    return {
        "role": "assistant",
        "content": "".join([part.text for part in message.content]) or None,
        "tool_calls": [
            {
                "id": ids.of_call(call.id),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json or "{}"},
            }
            for call in calls
        ],
    }


def _tool_messages(message: Message, ids: CallIds) -> Iterator[dict[str, Any]]:
    for part in message.content:
        result = part.tool_result
        call_id = ids.of_result(result.tool_call_id)
        yield {"role": "tool", "tool_call_id": call_id, "content": result.content}
