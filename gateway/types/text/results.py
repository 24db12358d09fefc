"""The results of text tasks: `task.completion` objects and their chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from gateway.openapi.schema import Schema, object_of, ref
from gateway.types.base import Link, StreamObjects, open_object, result_schema
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, ToolCall, ToolCallDelta
from pomelo.gen.v1.usage_pb2 import Usage

_FINISH_REASONS: Mapping[int, str] = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
    FinishReason.FINISH_REASON_CONTENT_FILTER: "content_filter",
    FinishReason.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

_CHUNK = "task.completion.chunk"


def render_result(result: TaskResult, link: Link) -> bytes:
    text = result.text
    parts = text.message.content
    content = parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if parts and parts[-1].HasField("tool_call"):  # calls come last
        message["content"] = content or None
        message["tool_calls"] = [_render_call(part.tool_call) for part in parts if part.HasField("tool_call")]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": _FINISH_REASONS.get(text.finish_reason),
    }
    usage = _render_usage(result.usage)
    return open_object(result, "task.completion", choices=[choice], usage=usage) + b"}"


def render_delta(objects: StreamObjects, delta: TextDelta) -> tuple[bytes, ...]:
    """Returns a `task.completion.chunk` of text."""
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    return (b'%b"content":%b},"finish_reason":null}]}' % (opening, to_json(delta.text)),)


def render_tool_call(objects: StreamObjects, delta: ToolCallDelta) -> tuple[bytes, ...]:
    """Returns a `task.completion.chunk` of a piece of a tool call; the first has its id, type and name."""
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments_json}}
    if delta.id:
        call = {"index": delta.index, **_render_call(delta)}
    return (b'%b"tool_calls":[%b]},"finish_reason":null}]}' % (opening, to_json(call)),)


def _render_call(call: ToolCall | ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def render_last(objects: StreamObjects, result: TaskResult) -> bytes:
    """Returns the last `task.completion.chunk`, with finish_reason and usage."""
    has_text = not objects.is_first
    return b"".join(
        (
            _open_chunk(objects),
            b"" if has_text else b'"content":""',
            b'},"finish_reason":',
            to_json(_FINISH_REASONS.get(result.text.finish_reason)),
            b'}],"usage":',
            to_json(_render_usage(result.usage)),
            b"}",
        )
    )


def _open_chunk(objects: StreamObjects) -> bytes:
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
    cached, written = usage.cached_input_tokens, usage.cache_write_input_tokens
    if cached or written:
        counts["prompt_tokens_details"] = {"cached_tokens": cached, "cache_write_tokens": written}
    if usage.reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return counts


_COUNT = {"type": "integer", "minimum": 0}
_USAGE = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT)
_CACHE_USAGE = dict.fromkeys(("cached_tokens", "cache_write_tokens"), _COUNT)
_REASONING = {"reasoning_tokens": _COUNT}
_RESPONSE_MESSAGE = {
    "role": {"const": "assistant"},
    "content": {"type": ["string", "null"], "description": "Null if there are only tool calls."},
}
_TOOL_CALLS = {"tool_calls": {"type": "array", "items": ref("ToolCall")}}
_CHOICE = {
    "index": {"const": 0},
    "message": object_of({**_RESPONSE_MESSAGE, **_TOOL_CALLS}, _RESPONSE_MESSAGE),
    "finish_reason": {"enum": [*_FINISH_REASONS.values(), None]},
}

SCHEMAS: Mapping[str, Schema] = {
    "TaskCompletion": result_schema(
        "task.completion",
        "task",
        choices={"type": "array", "items": object_of(_CHOICE, _CHOICE), "minItems": 1, "maxItems": 1},
        usage=object_of(
            {
                **_USAGE,
                "prompt_tokens_details": ref("PromptTokensDetails"),
                "completion_tokens_details": object_of(_REASONING, _REASONING),
            },
            _USAGE,
        ),
    ),
    "PromptTokensDetails": object_of(
        _CACHE_USAGE,
        _CACHE_USAGE,
        description="The input tokens that the provider read from its cache and wrote to it.",
    ),
}
