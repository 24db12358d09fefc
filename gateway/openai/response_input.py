"""The input of OpenAI's responses: its items, and the messages of a task that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gateway.types.fields import check_names, required_text
from gateway.types.text.messages import CACHE_HINTS
from pomelo.errors import invalid, missing

_PART = re.compile(r"messages\[\d+\](?:\.content|\.tool_calls\[\d+\])?")
"""A message of a task, its content or one of its tool calls."""

_MEMBERS: Mapping[str, str] = {
    ".id": ".call_id",
    ".function.name": ".name",
    ".function.arguments": ".arguments",
    ".tool_call_id": ".call_id",
}
"""The members of items whose names are not those of a task's messages."""

_IMAGE = re.compile(r"(\[\d+\])\.image_url\.(url|detail)")
"""A member of an image in the content of a message, which has no such members in an item."""

_IMAGE_MEMBERS = {"url": "image_url", "detail": "detail"}

_PARTS = ("input_text", "input_image", "output_text", "refusal")
_OUTPUT_PARTS = ("input_text", "output_text")
"""The types of parts that an output of a function may have."""


class Conversation:
    """The messages of a task, made from the items of an input. `ignored` is the caller's name of the first
    item without effect, or empty; a long conversation may have thousands of them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ignored = ""
        self._labels: dict[str, str] = {}
        """The caller's names of messages, of their contents and of their tool calls."""

    def caller_name(self, field: str) -> str:
        """Returns the caller's name of a field of a message."""
        part = _PART.match(field)
        if part is None or (label := self._labels.get(part[0])) is None:
            return field
        rest = _IMAGE.sub(lambda image: f"{image[1]}.{_IMAGE_MEMBERS[image[2]]}", field[part.end() :])
        return label + _MEMBERS.get(rest, rest)

    def add_instructions(self, text: Any) -> None:
        if text is not None:
            self._add("instructions", {"role": "system", "content": text}, "instructions")

    def add_input(self, value: Any) -> None:
        """Adds a text, or a list of items.

        Raises:
            PomeloError: invalid_parameter, missing_parameter.
        """
        if value is None:
            raise missing("input")
        if type(value) is not list:
            self._add("input", {"role": "user", "content": value}, "input")
            return
        for i, item in enumerate(value):
            self._add_item(f"input[{i}]", item)

    def _add(self, label: str, message: dict[str, Any], content_label: str) -> None:
        field = f"messages[{len(self.messages)}]"
        self._labels[field], self._labels[f"{field}.content"] = label, content_label
        self.messages.append(message)

    def _add_item(self, label: str, item: Any) -> None:
        if type(item) is not dict:
            raise invalid(label, "an object")
        match item.get("type"):
            case None | "message":
                check_names(item, ("type", "id", "role", "content", "status", "phase"), label)
                content = _to_content(f"{label}.content", item.get("content"), _PARTS)
                self._add_message(label, item.get("role"), content)
            case "function_call":
                self._add_call(label, item)
            case "function_call_output":
                check_names(item, ("type", "id", "call_id", "output", "status"), label)
                if item.get("call_id") is None:
                    raise missing(f"{label}.call_id")
                output_label = f"{label}.output"
                content = _to_content(output_label, item.get("output"), _OUTPUT_PARTS)
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
                self._add(label, message, output_label)
            case "reasoning":  # of another provider: no model takes it
                self.ignored = self.ignored or label
            case "item_reference":
                expected = "that of a whole item: nothing is stored. Set store to false in your client"
                raise invalid(f"{label}.type", expected)
            case _:
                raise invalid(f"{label}.type", "message, function_call or function_call_output")

    def _add_message(self, label: str, role: Any, content: Any) -> None:
        """Adds a message, or what an answer says after calls of tools, which come last in a message."""
        content_label = f"{label}.content"
        last = self.messages[-1] if self.messages else {}
        if role != "assistant" or "tool_calls" not in last:
            self._add(label, {"role": role, "content": content}, content_label)
            return
        if last["content"] is None:
            self._labels[f"messages[{len(self.messages) - 1}].content"] = content_label
        last["content"] = parts = _to_parts(last["content"])
        parts += _to_parts(content)  # in place: thousands may follow

    def _add_call(self, label: str, item: dict[str, Any]) -> None:
        """Adds a call of a tool to the answer that it belongs to."""
        names = ("type", "id", "call_id", "name", "arguments", "parsed_arguments", "status")
        check_names(item, names, label)
        for name in ("call_id", "name"):
            if item.get(name) is None:
                raise missing(f"{label}.{name}")
        function = {"name": item["name"], "arguments": item.get("arguments")}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add(label, {"role": "assistant", "content": None}, f"{label}.content")
        calls = self.messages[-1].setdefault("tool_calls", [])
        self._labels[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = label
        calls.append(call)


def _to_content(label: str, value: Any, part_types: tuple[str, ...]) -> Any:
    if type(value) is not list:
        return value
    return [_to_part(f"{label}[{i}]", part, part_types) for i, part in enumerate(value)]


def _to_parts(content: Any) -> list[Any]:
    if content is None or type(content) is list:
        return content or []
    return [{"type": "text", "text": content}]


def _to_part(label: str, part: Any, part_types: tuple[str, ...]) -> dict[str, Any]:
    if type(part) is not dict:
        raise invalid(label, "an object with type")
    part_type = part.get("type")
    if part_type not in part_types:
        raise invalid(f"{label}.type", f"one of {', '.join(part_types)}")
    if part_type == "input_image":
        check_names(part, ("type", "image_url", "detail", *CACHE_HINTS), label)
        image = {"url": required_text(part, "image_url", label), "detail": part.get("detail")}
        return {"type": "image_url", "image_url": image}
    if part_type == "refusal":
        check_names(part, ("type", "refusal"), label)
        return {"type": "text", "text": required_text(part, "refusal", label)}
    check_names(part, ("type", "text", "parsed", "annotations", "logprobs", *CACHE_HINTS), label)
    return {"type": "text", "text": part.get("text")}
