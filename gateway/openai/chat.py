"""`POST /v1/chat/completions`: runs a text task in the form of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json

from gateway import sse
from gateway.errors import error_body
from gateway.parsing.task import Translation, read_task
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from gateway.types.base import StreamObjects, open_object
from gateway.types.text import FINISH_REASONS
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.gen.v1.text_pb2 import TextDelta
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.service import Visit

_CHUNK = "chat.completion.chunk"


async def create_chat_completion(
    gateway: Gateway, request: Request, call: Call, visit: Visit
) -> Response | None:
    """Runs a text task and sends its result: JSON or server-sent events.

    Raises:
        PomeloError: any error of the table.
    """
    translation = Translation(TaskType.TASK_TYPE_TEXT, _to_fields)
    parsed = await read_task(gateway, request, call, visit, translation)
    tasks = gateway.services.tasks
    try:
        if parsed.stream:
            await sse.stream_task(
                request,
                call,
                tasks,
                parsed.spec,
                parsed.options,
                _STREAM,
                keep_alive=gateway.options.keep_alive,
            )
            return None
        return json_response(call, _render(await tasks.run_task(parsed.spec, parsed.options, call)))
    except PomeloError as error:
        raise await visit.refuse_task(error) from None


# --- request


def _to_fields(body: dict[str, Any]) -> Mapping[str, Any]:
    limit = body.pop("max_completion_tokens", None)
    if limit is not None:
        if body.get("max_tokens") not in (None, limit):
            raise invalid("max_tokens", "left out, or the same as max_completion_tokens")
        body["max_tokens"] = limit
    return body


# --- results


def _render(result: TaskResult) -> bytes:
    text = result.text
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "".join([part.text for part in text.message.content]),
            "refusal": None,
        },
        "logprobs": None,
        "finish_reason": FINISH_REASONS.get(text.finish_reason),
    }
    return open_object(result, "chat.completion", choices=[choice], usage=_usage(result.usage)) + b"}"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
    }


# --- streams


def _open_chunk(objects: StreamObjects) -> bytes:
    # Only the first chunk has the role.
    role = b'"role":"assistant",' if objects.is_first else b""
    return objects.prefix(_CHUNK, b',"choices":[{"index":0,"delta":{') + role


def _render_delta(objects: StreamObjects, delta: TextDelta) -> Iterable[bytes]:
    opening = objects.prefixes.get(_CHUNK) or _open_chunk(objects)
    return (b'%b"content":%b},"finish_reason":null}]}' % (opening, to_json(delta.text)),)


def _render_last(objects: StreamObjects, result: TaskResult) -> bytes:
    content = b'"content":""' if objects.is_first else b""
    reason = to_json(FINISH_REASONS.get(result.text.finish_reason))
    chunk = b'%b%b},"finish_reason":%b}]}' % (_open_chunk(objects), content, reason)
    return sse.encode_event(chunk) + sse.DONE


_STREAM = sse.StreamFormat(
    StreamObjects,
    {"text_delta": _render_delta},
    _render_last,
    lambda objects, error, request: sse.encode_event(error_body(error, request)),
)
