"""Text generation: its messages, `task.completion` objects and their chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from gateway.openapi import examples
from gateway.openapi.schema import Schema, object_of, ref
from gateway.types import fields
from gateway.types.base import Link, StreamObjects, TaskFormat, open_object, result_schema
from pomelo.errors import invalid, missing
from pomelo.fields import MAX_PARTS, TEXT_FIELDS
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import FinishReason, Message, Role, TextDelta
from pomelo.gen.v1.usage_pb2 import Usage

_ROLES = {"system": Role.ROLE_SYSTEM, "user": Role.ROLE_USER, "assistant": Role.ROLE_ASSISTANT}

_FINISH_REASONS: Mapping[int, str] = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
    FinishReason.FINISH_REASON_CONTENT_FILTER: "content_filter",
}

# --- fields


def _assign_stop(message: Any, value: Any) -> None:
    texts = [value] if type(value) is str else value
    if type(texts) is not list:
        raise invalid("stop", "a text or a list of texts")
    for i, text in enumerate(texts):
        message.stop.append(fields.check_text(f"stop[{i}]", text))


def _assign_messages(task_input: Any, value: Any) -> None:
    if type(value) is not list:
        raise invalid("messages", "a list of messages")
    add = task_input.messages.add
    for i, item in enumerate(value):
        if type(item) is dict and len(item) == 2:
            # A fast path for the common shape, with as few checks as possible.
            role, content = item.get("role"), item.get("content")
            number = _ROLES.get(role) if type(role) is str else None
            if number is not None and type(content) is str:
                message = add()
                message.role = number
                message.content.add().text = content
                continue
        _fill_message(add(), f"messages[{i}]", item)


def _fill_message(message: Message, label: str, item: Any) -> None:
    if type(item) is not dict:
        raise invalid(label, "an object with role and content")
    fields.check_names(item, ("role", "content"), label)
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise missing(f"{label}.role")
    number = _ROLES.get(role) if type(role) is str else None
    if number is None:
        raise invalid(f"{label}.role", "system, user or assistant")
    message.role = number
    if content is None:
        raise missing(f"{label}.content")
    if type(content) is list:
        _add_parts(message, f"{label}.content", content)
    elif type(content) is str:
        message.content.add(text=content)
    else:
        raise invalid(f"{label}.content", "a text or a list of parts")


def _add_parts(message: Message, label: str, items: list[Any]) -> None:
    for i, item in enumerate(items):
        part_label = f"{label}[{i}]"
        if type(item) is not dict:
            raise invalid(part_label, "an object with type")
        part_type = item.get("type")
        if part_type is None:
            raise missing(f"{part_label}.type")
        if part_type not in ("text", "image_url"):
            raise invalid(f"{part_label}.type", "one of text, image_url")
        fields.check_names(item, ("type", part_type), part_label)
        value = item.get(part_type)
        if value is None:
            raise missing(f"{part_label}.{part_type}")
        if part_type == "text":
            message.content.add(text=fields.check_text(f"{part_label}.text", value))
        else:
            message.content.add().image.source.url = _image_url(f"{part_label}.image_url", value)


def _image_url(label: str, value: Any) -> str:
    if type(value) is not dict:
        return fields.check_text(label, value)
    fields.check_names(value, ("url",), label)
    if value.get("url") is None:
        raise missing(f"{label}.url")
    return fields.check_text(f"{label}.url", value["url"])


# --- results

_CHUNK = "task.completion.chunk"


def render_result(result: TaskResult, link: Link) -> bytes:
    text = result.text
    parts = text.message.content
    content = parts[0].text if len(parts) == 1 else "".join([part.text for part in parts])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": _FINISH_REASONS.get(text.finish_reason),
    }
    usage = _render_usage(result.usage)
    return open_object(result, "task.completion", choices=[choice], usage=usage) + b"}"


def render_delta(objects: StreamObjects, delta: TextDelta) -> tuple[bytes, ...]:
    """Returns a `task.completion.chunk` of text."""
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    return (b'%b"content":%b},"finish_reason":null}]}' % (opening, to_json(delta.text)),)


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
    """Returns the token counts; those of the vendor's cache only if it was used."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    cached, written = usage.cached_input_tokens, usage.cache_write_input_tokens
    if cached or written:
        counts["prompt_tokens_details"] = {"cached_tokens": cached, "cache_write_tokens": written}
    return counts


# --- schemas


_COUNT = {"type": "integer", "minimum": 0}
_USAGE = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT)
_CACHE_USAGE = dict.fromkeys(("cached_tokens", "cache_write_tokens"), _COUNT)
_FINISH_REASON = {"enum": ["stop", "length", "content_filter", None]}
_RESPONSE_MESSAGE = {"role": {"const": "assistant"}, "content": {"type": "string"}}
_CHOICE = {
    "index": {"const": 0},
    "message": object_of(_RESPONSE_MESSAGE, _RESPONSE_MESSAGE),
    "finish_reason": _FINISH_REASON,
}
_DELTA = {
    "role": {"const": "assistant", "description": "In the first chunk."},
    "content": {"type": "string", "description": "Text to append."},
}
_CHUNK_CHOICE = {"index": {"const": 0}, "delta": object_of(_DELTA), "finish_reason": _FINISH_REASON}
_PARTS = {"type": "array", "items": ref("Part"), "minItems": 1, "maxItems": MAX_PARTS}
_MESSAGE = {
    "role": {"type": "string", "enum": ["system", "user", "assistant"]},
    "content": {"anyOf": [{"type": "string"}, _PARTS]},
}
_TEXT_PART = {"type": {"const": "text"}, "text": {"type": "string"}}
_IMAGE_PART = {"type": {"const": "image_url"}, "image_url": ref("ImageUrl")}
_URL = {"url": {"type": "string", "description": "A data: URI with a base64 image."}}

_SCHEMAS: Mapping[str, Schema] = {
    "Message": object_of(_MESSAGE, _MESSAGE, additionalProperties=False),
    "Part": {"oneOf": [ref("TextPart"), ref("ImagePart")]},
    "TextPart": object_of(_TEXT_PART, _TEXT_PART, additionalProperties=False),
    "ImagePart": object_of(_IMAGE_PART, _IMAGE_PART, additionalProperties=False),
    "ImageUrl": object_of(_URL, _URL, additionalProperties=False),
    "TaskCompletion": result_schema(
        "task.completion",
        "task",
        choices={"type": "array", "items": object_of(_CHOICE, _CHOICE), "minItems": 1, "maxItems": 1},
        usage=ref("TokenUsage"),
    ),
    "TaskCompletionChunk": result_schema(
        _CHUNK,
        "task",
        choices={
            "type": "array",
            "items": object_of(_CHUNK_CHOICE, _CHUNK_CHOICE),
            "minItems": 1,
            "maxItems": 1,
        },
        optional={"usage": ref("TokenUsage")},
    ),
    "TokenUsage": object_of({**_USAGE, "prompt_tokens_details": ref("PromptTokensDetails")}, _USAGE),
    "PromptTokensDetails": object_of(
        _CACHE_USAGE,
        _CACHE_USAGE,
        description="The input tokens that the provider read from its cache and wrote to it.",
    ),
}

FORMAT = TaskFormat(
    name="text",
    input="text",
    output="text",
    schema_name="TextTask",
    result_schema_name="TaskCompletion",
    schemas=_SCHEMAS,
    stream_schema_names=("TaskCompletionChunk",),
    example_model="gpt-4",
    examples={
        "A question": {
            "model": "gpt-4",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 50,
        },
        "A stream": {
            "model": "claude-3-haiku",
            "messages": [
                {"role": "system", "content": "Answer in one sentence."},
                {"role": "user", "content": "Explain quantum computing."},
            ],
            "stream": True,
        },
        "An image in a message": {
            "model": "gpt-4-turbo",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is in this image?"},
                        {"type": "image_url", "image_url": {"url": examples.IMAGE}},
                    ],
                }
            ],
        },
    },
    result_example={
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 14, "completion_tokens": 2, "total_tokens": 16},
    },
    rules=TEXT_FIELDS,
    fields=fields.by_name(
        fields.Field(
            "messages",
            _assign_messages,
            fields.parse_json_text,
            {"items": ref("Message"), "description": "The conversation, oldest first."},
        ),
        fields.integer("max_tokens", description="The most tokens to generate."),
        fields.number("temperature", description="Randomness."),
        fields.number("top_p", description="Nucleus sampling."),
        fields.Field(
            "stop",
            _assign_stop,
            fields.parse_list_text,
            {
                "type": ["string", "array", "null"],
                "minLength": 1,
                "items": {"type": "string", "minLength": 1},
                "description": "Text that ends the output, or a list of such texts.",
            },
        ),
        fields.integer("seed", description="For repeatable output."),
        fields.number("presence_penalty"),
        fields.number("frequency_penalty"),
        fields.text("user", target="spec", description="Your own name for the end user."),
    ),
    render_result=render_result,
    event="text_delta",
    render_event=render_delta,
    render_last=render_last,
)
