"""The results of text tasks: `task.completion` objects and their chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from gateway.openapi.schema import COUNT, Schema, object_of, ref
from gateway.types.base import Link, StreamObjects, open_object, result_schema
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, Message, TextDelta, ToolCall, ToolCallDelta
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.protobuf.enums import enum_names

FINISH_REASONS: Mapping[int, str] = enum_names(FinishReason.DESCRIPTOR)

_CHUNK = "task.completion.chunk"


def render_result(result: TaskResult, link: Link) -> bytes:
    text = result.text
    choice = {
        "index": 0,
        "message": render_message(text.message),
        "finish_reason": FINISH_REASONS.get(text.finish_reason),
    }
    usage = _render_usage(result.usage)
    return open_object(result, "task.completion", choices=[choice], usage=usage) + b"}"


def render_message(message: Message) -> dict[str, Any]:
    """Returns the message of a response. Its content is null if there are only tool calls."""
    parts = message.content
    content = parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])
    rendered: dict[str, Any] = {"role": "assistant", "content": content}
    if parts and parts[-1].HasField("tool_call"):  # calls come last
        rendered["content"] = content or None
        rendered["tool_calls"] = [
            _render_call(part.tool_call) for part in parts if part.HasField("tool_call")
        ]
    return rendered


def render_delta(objects: StreamObjects, delta: TextDelta) -> tuple[bytes, ...]:
    """Returns a `task.completion.chunk` of text."""
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    return (b'%b"content":%b},"finish_reason":null}]}' % (opening, to_json(delta.text)),)


def render_tool_call(objects: StreamObjects, delta: ToolCallDelta) -> tuple[bytes, ...]:
    """Returns a `task.completion.chunk` of a piece of a tool call; the first has its id, type and name."""
    call: dict[str, Any] = {"function": {"arguments": delta.arguments_json}}
    if delta.id:
        call = _render_call(delta)
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    return (
        b'%b"tool_calls":[%b]},"finish_reason":null}]}' % (opening, to_json({"index": delta.index, **call})),
    )


def _render_call(call: ToolCall | ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def render_last(objects: StreamObjects, result: TaskResult) -> bytes:
    """Returns the last `task.completion.chunk`, with finish_reason and usage."""
    return b'%b,"usage":%b}' % (open_last_chunk(objects, result), to_json(_render_usage(result.usage)))


def open_last_chunk(objects: StreamObjects, result: TaskResult) -> bytes:
    """Returns the last chunk, with finish_reason, without its closing brace, so that more can be appended."""
    content = b'"content":""' if objects.is_first else b""
    reason = to_json(FINISH_REASONS.get(result.text.finish_reason))
    return b'%b%b},"finish_reason":%b}]' % (_open_chunk(objects), content, reason)


def _open_chunk(objects: StreamObjects) -> bytes:
    """Returns the beginning of a chunk, up to the members of its delta."""
    # Only the first chunk has the role.
    role = b'"role":"assistant",' if objects.is_first else b""
    return objects.prefix(_CHUNK, b',"choices":[{"index":0,"delta":{') + role


def _render_usage(usage: Usage) -> dict[str, Any]:
    """Returns the token counts; those of the vendor's cache and of reasoning only if there are any."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_input_tokens or usage.cache_write_input_tokens:
        counts["prompt_tokens_details"] = cached_counts(usage)
    if usage.reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts


def cached_counts(usage: Usage) -> dict[str, int]:
    """Returns the input tokens that the provider read from its cache and wrote to it, as JSON."""
    return {"cached_tokens": usage.cached_input_tokens, "cache_write_tokens": usage.cache_write_input_tokens}


def exactly_one(item: Schema) -> Schema:
    """Returns the schema of an array of one item."""
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 1}


_USAGE = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
RESPONSE_MESSAGE = {
    "role": {"const": "assistant"},
    "content": {"type": ["string", "null"], "description": "Null if there are only tool calls."},
}
TOOL_CALLS = {"tool_calls": {"type": "array", "items": ref("ToolCall")}}
_FINISH_REASON = {"enum": [*FINISH_REASONS.values(), None]}
CHOICE = {
    "index": {"const": 0},
    "message": object_of({**RESPONSE_MESSAGE, **TOOL_CALLS}, RESPONSE_MESSAGE),
    "finish_reason": _FINISH_REASON,
}
_DELTA = {
    "role": {"const": "assistant", "description": "In the first chunk."},
    "content": {"type": "string", "description": "Text to append."},
    "tool_calls": exactly_one(ref("ToolCallDelta")),
}
CHUNK_CHOICE = {"index": {"const": 0}, "delta": object_of(_DELTA, ()), "finish_reason": _FINISH_REASON}
_ARGUMENTS = {"arguments": {"type": "string", "description": "JSON text to append."}}
_CALL_DELTA = {
    "index": {**COUNT, "description": "Which call it is a piece of."},
    "function": object_of(
        {"name": {"type": "string", "description": "In the first piece of a call."}, **_ARGUMENTS}, _ARGUMENTS
    ),
}
_FIRST_PIECE = {
    "id": {"type": "string", "description": "In the first piece of a call."},
    "type": {"const": "function", "description": "In the first piece of a call."},
}


SCHEMAS: Mapping[str, Schema] = {
    "TaskCompletion": result_schema(
        "task.completion", "task", choices=exactly_one(object_of(CHOICE)), usage=ref("TokenUsage")
    ),
    "TaskCompletionChunk": result_schema(
        _CHUNK,
        "task",
        choices=exactly_one(object_of(CHUNK_CHOICE)),
        optional={"usage": ref("TokenUsage")},
    ),
    "ToolCallDelta": object_of(
        {**_CALL_DELTA, **_FIRST_PIECE}, _CALL_DELTA, description="A piece of a tool call."
    ),
    "TokenUsage": object_of(
        {
            **_USAGE,
            "prompt_tokens_details": ref("PromptTokensDetails"),
            "completion_tokens_details": ref("CompletionTokensDetails"),
        },
        _USAGE,
    ),
    "PromptTokensDetails": object_of(
        dict.fromkeys(("cached_tokens", "cache_write_tokens"), COUNT),
        description="The input tokens that the provider read from its cache and wrote to it.",
    ),
    "CompletionTokensDetails": object_of(
        {"reasoning_tokens": COUNT}, description="The output tokens that the model thought with."
    ),
}
