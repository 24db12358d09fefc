"""Text generation: its fields, and what its results and schemas are."""

from __future__ import annotations

from typing import Any

from gateway.openapi import examples
from gateway.openapi.schema import ref
from gateway.types import fields
from gateway.types.base import TaskFormat
from gateway.types.text import messages, results, tools
from pomelo.errors import invalid
from pomelo.fields import TEXT_FIELDS
from pomelo.gen.v1.text_pb2 import ReasoningEffort

_EFFORTS = fields.enum_values(ReasoningEffort, TEXT_FIELDS["reasoning_effort"].choices)


def _assign_stop(message: Any, value: Any) -> None:
    texts = [value] if type(value) is str else value
    if type(texts) is not list:
        raise invalid("stop", "a text or a list of texts")
    for i, text in enumerate(texts):
        message.stop.append(fields.check_text(f"stop[{i}]", text))


_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
_WEATHER = {"name": "get_weather", "description": "Returns the weather of a city.", "parameters": _CITY}

FORMAT = TaskFormat(
    name="text",
    input="text",
    output="text",
    schema_name="TextTask",
    result_schema_name="TaskCompletion",
    schemas={**messages.SCHEMAS, **tools.SCHEMAS, **results.SCHEMAS},
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
        "A tool": {
            "model": "gpt-4",
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [{"type": "function", "function": _WEATHER}],
            "tool_choice": "auto",
        },
        "An answer in JSON": {
            "model": "gpt-4",
            "messages": [{"role": "user", "content": "Name a city in France."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _CITY}},
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
            messages.assign_messages,
            fields.parse_json_text,
            {"items": ref("Message"), "description": "The conversation, oldest first."},
        ),
        fields.integer("max_tokens", TEXT_FIELDS, description="The most tokens to generate."),
        fields.number("temperature", TEXT_FIELDS, description="Randomness."),
        fields.number("top_p", TEXT_FIELDS, description="Nucleus sampling."),
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
        fields.integer("seed", TEXT_FIELDS, description="For repeatable output."),
        fields.number("presence_penalty", TEXT_FIELDS),
        fields.number("frequency_penalty", TEXT_FIELDS),
        fields.Field(
            "tools",
            tools.assign_tools,
            fields.parse_json_text,
            {"items": ref("Tool"), "description": "The functions that the model may call."},
        ),
        fields.Field(
            "tool_choice",
            tools.assign_tool_choice,
            fields.parse_object_text,
            {
                "anyOf": [{"type": "string", "enum": [*tools.MODES]}, ref("ToolChoice"), {"type": "null"}],
                "description": "Whether it calls tools, or which one. Without tools, none or auto.",
            },
        ),
        fields.flag(
            "parallel_tool_calls",
            description="Whether it may call several tools in one response. No effect without tools.",
        ),
        fields.Field(
            "response_format",
            tools.assign_response_format,
            fields.parse_json_text,
            {"anyOf": [ref("ResponseFormat"), {"type": "null"}]},
        ),
        fields.choice(
            "reasoning_effort", _EFFORTS, description="How much the model thinks before it answers."
        ),
        fields.text("user", target="spec", description="Your own name for the end user."),
        fields.METADATA,
        fields.unsupported("n", "1: send a request for each answer", neutral=1),
        fields.unsupported("logprobs", "false: there are no log probabilities", neutral=False),
        fields.unsupported("top_logprobs", "0: there are no log probabilities", neutral=0),
        fields.unsupported("logit_bias", "left out: it is not supported", neutral={}),
    ),
    render_result=results.render_result,
    render_events={"text_delta": results.render_delta, "tool_call_delta": results.render_tool_call},
    render_last=results.render_last,
)
