"""Chat completions and responses in the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openai import chat
from gateway.openai import responses as openai_responses
from gateway.openai import text as openai_text
from gateway.openai.response_events import INCOMPLETE
from gateway.openapi.openai.operations import (
    SAFETY_IDENTIFIER,
    SSE,
    events,
    example,
    nullable,
    only,
    task_operation,
    task_properties,
    without_effect,
)
from gateway.openapi.schema import COUNT, JSON, LABEL, TEXT, Models, Schema, closed, object_of, ref, union
from gateway.openapi.tasks import task_schema
from gateway.types import TASK_FORMATS
from gateway.types.base import result_schema
from gateway.types.text.messages import DETAIL, PARSED
from gateway.types.text.results import CHOICE, CHUNK_CHOICE, RESPONSE_MESSAGE, TOOL_CALLS, exactly_one
from pomelo.gen.v1.task_pb2 import TaskType

# Always null. openapi-generator's Python has no type for a property whose only type is null, and crashes.
_NULL: Schema = {"type": ["string", "null"], "enum": [None]}
_EMPTY: Schema = {"type": "array", "items": {}, "maxItems": 0}
_ANY: Schema = {}

_STREAM_OPTIONS = closed(
    {
        "include_usage": {"type": ["boolean", "null"], "description": "The last chunk has the usage."},
        "include_obfuscation": {"type": ["boolean", "null"], "description": "No effect: nothing is padded."},
    },
    (),
)
_SHARED = {
    **only(openai_text.DEFAULTS),
    **without_effect(openai_text.NO_EFFECT),
    "safety_identifier": SAFETY_IDENTIFIER,
    "stream_options": nullable(ref("StreamOptions")),
}

# --- chat completions

_MESSAGE = {**RESPONSE_MESSAGE, "refusal": _NULL}
_CHOICE = {**CHOICE, "message": object_of({**_MESSAGE, **TOOL_CALLS}, _MESSAGE), "logprobs": _NULL}
_CHAT_USAGE = {
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT),
    "prompt_tokens_details": ref("PromptTokensDetails"),
    "completion_tokens_details": ref("CompletionTokensDetails"),
}


def _chat_request(task: Schema) -> Schema:
    properties = {
        **task["properties"],
        "max_completion_tokens": task["properties"]["max_tokens"],
        **_SHARED,
        **only(chat.DEFAULTS),
        **without_effect(chat.NO_EFFECT),
    }
    return closed(properties, task["required"])


# --- responses

_EASY_CONTENT = {"anyOf": [TEXT, {"type": "array", "items": ref("InputPart")}]}
_MESSAGE_ITEM = {
    "role": {"enum": ["system", "developer", "user", "assistant"]},
    "content": _EASY_CONTENT,
}
_CALL_ITEM = {"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT}
_OUTPUT_ITEM = {
    "type": {"const": "function_call_output"},
    "call_id": TEXT,
    "output": {"anyOf": [TEXT, {"type": "array", "items": ref("InputText")}]},
}
_INPUT_TEXT = {"type": {"enum": ["input_text", "output_text"]}, "text": TEXT}
_INPUT_IMAGE = {
    "type": {"const": "input_image"},
    "image_url": {"type": "string", "description": "A data: URI with a base64 image."},
}
_OUTPUT_TEXT = {
    "type": {"const": "output_text"},
    "text": TEXT,
    **dict.fromkeys(("annotations", "logprobs"), _EMPTY),
}
_STATUS = {"enum": ["in_progress", "completed", "incomplete"]}
_OUTPUT_MESSAGE = {
    "type": {"const": "message"},
    "id": TEXT,
    "status": _STATUS,
    "role": {"const": "assistant"},
    "content": {"type": "array", "items": ref("OutputText")},
}
_FUNCTION = ("name", "description", "parameters", "strict")
_USAGE = {
    "input_tokens": COUNT,
    "input_tokens_details": ref("PromptTokensDetails"),
    "output_tokens": COUNT,
    "output_tokens_details": ref("CompletionTokensDetails"),
    "total_tokens": COUNT,
}
_RESPONSE = {
    "id": {"type": "string", "pattern": "^task_"},
    "object": {"const": "response"},
    "created_at": {"type": "integer", "description": "Unix seconds."},
    "model": TEXT,
    "status": _STATUS,
    "incomplete_details": nullable(object_of({"reason": {"enum": [*INCOMPLETE.values()]}})),
    "output": {"type": "array", "items": ref("OutputItem")},
    "error": _NULL,
    "store": {"const": False},
}
_REPEATED: Schema = {
    "instructions": LABEL,
    "max_output_tokens": {"type": ["integer", "null"]},
    "metadata": {"type": "object", "additionalProperties": TEXT},
    "parallel_tool_calls": {"type": "boolean"},
    "temperature": {"type": ["number", "null"]},
    "top_p": {"type": ["number", "null"]},
    "tools": {"type": "array", "items": ref("FunctionTool")},
    **dict.fromkeys(("tool_choice", "reasoning", "text", "background", "truncation"), _ANY),
    "previous_response_id": _NULL,
}
"""Members that repeat the request."""


def _response_request(task: Schema) -> Schema:
    fields = task["properties"]
    properties = {
        **task_properties(task, "model", "stream", "temperature", "top_p", "parallel_tool_calls"),
        **task_properties(task, "metadata", "user"),
        "input": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": ref("InputItem"), "minItems": 1}],
            "description": "A text, or the conversation, oldest item first.",
        },
        "instructions": {**LABEL, "description": "The first system message."},
        "max_output_tokens": fields["max_tokens"],
        "tools": {**fields["tools"], "items": ref("FunctionTool")},
        "tool_choice": {
            **fields["tool_choice"],
            "anyOf": [fields["tool_choice"]["anyOf"][0], ref("FunctionChoice"), {"type": "null"}],
        },
        "text": nullable(ref("TextOptions")),
        "reasoning": nullable(ref("ReasoningOptions")),
        "include": {
            "type": ["array", "null"],
            "items": {"type": "string", "enum": [*openai_responses.NOT_INCLUDED]},
            "description": "No effect: no response has them.",
        },
        **_SHARED,
        **only(openai_responses.DEFAULTS),
    }
    return closed(properties, ("model", "input"))


def _response_schemas(task: Schema) -> dict[str, Schema]:
    tool = TASK_FORMATS[TaskType.TASK_TYPE_TEXT].schemas["Tool"]["properties"]["function"]["properties"]
    json_schema = TASK_FORMATS[TaskType.TASK_TYPE_TEXT].schemas["JsonSchema"]["properties"]
    function_tool = {"type": {"const": "function"}, **{name: tool[name] for name in _FUNCTION}}
    text_schema = {"type": {"const": "json_schema"}, **json_schema}
    labels = dict.fromkeys(("id", "status"), LABEL)
    return {
        "ResponseRequest": _response_request(task),
        "FunctionTool": closed(function_tool, ("type", "name")),
        "FunctionChoice": closed({"type": {"const": "function"}, "name": TEXT}),
        "TextOptions": closed(
            {"format": nullable(ref("ResponseTextFormat")), **without_effect(chat.NO_EFFECT)}, ()
        ),
        "ResponseTextFormat": union(
            "The form of the output.",
            {"text": "TextFormat", "json_object": "JsonObjectFormat", "json_schema": "NamedJsonSchema"},
        ),
        "NamedJsonSchema": closed(text_schema, ("type", "name", "schema")),
        "ReasoningOptions": closed(
            {
                "effort": task["properties"]["reasoning_effort"],
                **without_effect(openai_responses.REASONING_NO_EFFECT),
            },
            (),
        ),
        "InputItem": {
            "anyOf": [
                ref(f"{name}Item") for name in ("Message", "FunctionCall", "FunctionOutput", "Reasoning")
            ]
        },
        "MessageItem": closed(
            {"type": {"const": "message"}, **_MESSAGE_ITEM, **labels, "phase": LABEL}, _MESSAGE_ITEM
        ),
        "FunctionCallItem": closed({**_CALL_ITEM, **labels, "parsed_arguments": PARSED}, _CALL_ITEM),
        "FunctionOutputItem": closed({**_OUTPUT_ITEM, **labels}, _OUTPUT_ITEM),
        "ReasoningItem": object_of(
            {"type": {"const": "reasoning"}}, ["type"], description="No effect: no model takes it."
        ),
        "InputPart": {"anyOf": [ref("InputText"), ref("InputImage"), ref("RefusalPart")]},
        "InputText": closed(
            {**_INPUT_TEXT, "parsed": PARSED, **dict.fromkeys(("annotations", "logprobs"), _ANY)}, _INPUT_TEXT
        ),
        "InputImage": closed(
            {**_INPUT_IMAGE, "detail": DETAIL},
            _INPUT_IMAGE,
            description="Only a message of the user may have images.",
        ),
        "TextResponse": object_of(
            {**_RESPONSE, **_REPEATED, "user": TEXT, "usage": ref("ResponseUsage")}, (*_RESPONSE, *_REPEATED)
        ),
        "ResponseUsage": object_of(_USAGE),
        "OutputItem": union(
            "An item of an output.", {"message": "OutputMessage", "function_call": "OutputCall"}
        ),
        "OutputMessage": object_of(_OUTPUT_MESSAGE),
        "OutputCall": object_of({**_CALL_ITEM, "id": TEXT, "status": _STATUS}),
        "OutputText": object_of(_OUTPUT_TEXT),
        **_EVENTS,
    }


_ERROR_EVENT = {"code": TEXT, "message": TEXT, "param": LABEL, "error": {"type": "object"}}
_ITEM = {"item_id": TEXT, "output_index": COUNT}
_PART = {**_ITEM, "content_index": COUNT}
_LOGPROBS = {"logprobs": _EMPTY}
_EVENT_TYPES: Mapping[str, tuple[dict[str, Schema], tuple[str, ...]]] = {
    "ResponseEvent": (
        {"response": ref("TextResponse")},
        ("response.created", "response.in_progress", "response.completed", "response.incomplete"),
    ),
    "OutputItemEvent": (
        {"output_index": COUNT, "item": ref("OutputItem")},
        ("response.output_item.added", "response.output_item.done"),
    ),
    "ContentPartEvent": (
        {**_PART, "part": ref("OutputText")},
        ("response.content_part.added", "response.content_part.done"),
    ),
    "TextDeltaEvent": ({**_PART, "delta": TEXT, **_LOGPROBS}, ("response.output_text.delta",)),
    "TextDoneEvent": ({**_PART, "text": TEXT, **_LOGPROBS}, ("response.output_text.done",)),
    "ArgumentsDeltaEvent": ({**_ITEM, "delta": TEXT}, ("response.function_call_arguments.delta",)),
    "ArgumentsDoneEvent": (
        {**_ITEM, "name": TEXT, "arguments": TEXT},
        ("response.function_call_arguments.done",),
    ),
    "ErrorEvent": (_ERROR_EVENT, ("error",)),
}
"""The schemas of the events of a response: their members, and the types of event that have them."""

_EVENT_NAMES = {name: schema for schema, (_, names) in _EVENT_TYPES.items() for name in names}


def _event(types: tuple[str, ...], members: dict[str, Schema]) -> Schema:
    return object_of({"type": {"type": "string", "enum": [*types]}, "sequence_number": COUNT, **members})


_EVENTS: dict[str, Schema] = {
    "TextResponseEvent": union("An event of a response.", _EVENT_NAMES),
    **{name: _event(types, members) for name, (members, types) in _EVENT_TYPES.items()},
}

# --- both


def schemas(models: Models) -> dict[str, Schema]:
    """Returns the schemas; `models` are the models by name."""
    text = TaskType.TASK_TYPE_TEXT
    task = task_schema(text, models)
    return {
        "ChatCompletionRequest": _chat_request(task),
        "StreamOptions": _STREAM_OPTIONS,
        "ChatCompletion": result_schema(
            "chat.completion",
            "task",
            choices=exactly_one(object_of(_CHOICE)),
            usage=ref("ChatUsage"),
        ),
        "ChatCompletionChunk": result_schema(
            "chat.completion.chunk",
            "task",
            choices={"type": "array", "items": object_of(CHUNK_CHOICE), "maxItems": 1},
            optional={"usage": nullable(ref("ChatUsage"))},
        ),
        "ChatUsage": object_of(_CHAT_USAGE),
        **_response_schemas(task),
    }


def _example(title: str, **body: Any) -> Schema:
    return example(title, model="gpt-4", **body)


_QUESTION = "What is the capital of France?"
_CHAT_EXAMPLES = {
    **_example("A question", messages=[{"role": "user", "content": _QUESTION}], max_completion_tokens=50),
    **_example(
        "A stream",
        messages=[{"role": "user", "content": _QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    ),
}
_RESPONSE_EXAMPLES = {
    **_example("A question", input=_QUESTION, instructions="Answer in one sentence."),
    **_example("A conversation", input=[{"role": "user", "content": _QUESTION}], max_output_tokens=50),
}


def paths() -> Schema:
    """Returns the operations."""
    return {
        "/v1/chat/completions": task_operation(
            "createChatCompletion",
            "Run a text task in the form of OpenAI's chat completions.",
            {JSON: {"schema": ref("ChatCompletionRequest"), "examples": _CHAT_EXAMPLES}},
            {JSON: {"schema": ref("ChatCompletion")}, SSE: events("ChatCompletionChunk")},
            'A stream ends with `data: [DONE]`. If it fails, it ends with `data: {"error": …}` instead.',
        ),
        "/v1/responses": task_operation(
            "createResponse",
            "Run a text task in the form of OpenAI's responses.",
            {JSON: {"schema": ref("ResponseRequest"), "examples": _RESPONSE_EXAMPLES}},
            {JSON: {"schema": ref("TextResponse")}, SSE: events("TextResponseEvent", names=[*_EVENT_NAMES])},
            "Nothing is stored: send the whole conversation as `input` each time. A stream ends with "
            "`response.completed`, `response.incomplete` or `error`.",
        ),
    }
