"""The messages of the Messages API, from those of a text task."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pydantic_core import from_json

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, ToolResult
from pomelo.providers.text.call_ids import CallIds

_CALL_ID = re.compile(r"[A-Za-z0-9_-]+")

_MAX_VALUES = 65_536
"""Values in the arguments of all calls that are parsed, as parsing holds up other tasks."""


class Conversation:
    """Messages as the API takes them: the texts of the system's, the turns, and the names of all tools that
    were called. Blank texts, which the vendor refuses, are left out."""

    __slots__ = ("_ids", "_values_left", "called", "system", "turns")

    def __init__(self, messages: Iterable[Message]) -> None:
        self.system: list[str] = []
        self.turns: list[dict[str, Any]] = []
        self.called: dict[str, None] = {}
        self._ids: CallIds | None = None
        self._values_left = _MAX_VALUES
        results: list[dict[str, Any]] | None = None  # of the last turn, if it has any
        for message in messages:
            if message.role == Role.ROLE_SYSTEM:
                self.system += [part.text for part in message.content if part.text.strip()]
            elif content := self._content(message):
                if message.role == Role.ROLE_ASSISTANT:
                    self.turns.append({"role": "assistant", "content": content})
                    results = None
                elif results is not None:  # the results of tools and what follows them must be one turn
                    results += [{"type": "text", "text": content}] if type(content) is str else content
                else:
                    self.turns.append({"role": "user", "content": content})
                    if message.role == Role.ROLE_TOOL:
                        results = content

    def _content(self, message: Message) -> Any:
        """A message's content, as text or blocks; empty if it has none that the vendor would accept."""
        parts = message.content
        if len(parts) == 1 and parts[0].HasField("text"):
            return parts[0].text if parts[0].text.strip() else ""
        return [block for part in parts if (block := self._block(part)) is not None]

    def _block(self, part: ContentPart) -> dict[str, Any] | None:
        if part.HasField("text"):
            return {"type": "text", "text": part.text} if part.text.strip() else None
        if part.HasField("image"):
            return {"type": "image", "source": _source(part.image.source)}
        if self._ids is None:
            self._ids = CallIds(_CALL_ID)
        if part.HasField("tool_call"):
            call = part.tool_call
            self.called[call.name] = None
            call_id = self._ids.of_call(call.id)
            arguments = self._arguments(call.arguments_json)
            return {"type": "tool_use", "id": call_id, "name": call.name, "input": arguments}
        return _tool_result(part.tool_result, self._ids)

    def _arguments(self, text: str) -> dict[str, Any]:
        """The arguments of a call, which must be an object. The vendor's documentation shows invalid ones to
        the model in this form; so are those that have too many values."""
        arguments = None
        values = sum(map(text.count, "[{,"))  # those in strings, too
        if values <= self._values_left:
            self._values_left -= values
            with suppress(ValueError):
                arguments = from_json(text or "{}", allow_inf_nan=False)
        return arguments if isinstance(arguments, dict) else {"INVALID_JSON": text}


def _source(image: MediaSource) -> dict[str, str]:
    head, _, data = image.url.partition(",")
    if not head.startswith("data:"):
        return {"type": "url", "url": image.url}
    return {"type": "base64", "media_type": head[5:].partition(";")[0], "data": data}


def _tool_result(result: ToolResult, ids: CallIds) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": ids.of_result(result.tool_call_id)}
    if result.content.strip():
        block["content"] = result.content
    if result.is_error:
        block["is_error"] = True
    return block
