"""A fake of Mistral's chat completions, from the vendor's published API description: most tests script an
`Answer`. The path has a prefix, because otherwise it would be the same as OpenAI's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pomelo.testing.broken import BODY
from pomelo.testing.checks import Problem, access_refusal
from pomelo.testing.mistral_checks import MESSAGE_ORDER, check
from pomelo.testing.reply import Received, Reply, VendorProtocol, json_reply
from pomelo.testing.text_answer import (
    DONE,
    TextAnswer,
    data_event,
    text_faults,
    token_counts,
    whole_calls,
)

PREFIX = "/mistral"
PATH = f"{PREFIX}/v1/chat/completions"

_ID = "cmpl-test0001"
_CALL_ID = "test{:05}"
_CREATED = 1_790_000_000
_NAME = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script that answers a conversation.

    A stream has a chunk for the role, one for each word, one for the finish_reason and the usage, and the end
    marker. All tool calls are in one chunk, whole. With `thinking`, content is in lists of chunks.
    """

    thinking: str | None = None

    def body(self, received: Received) -> dict[str, Any]:
        content: Any = self.text
        if self.thinking is not None:
            content = [_thinking_chunk(self.thinking), {"type": "text", "text": self.text}]
        calls = whole_calls(self.tool_calls, _CALL_ID) or None
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        return {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": received.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason}],
            **self.usage_field(received),
        }

    def beginning(self, received: Received) -> list[bytes]:
        model = received.body["model"]
        events = [chunk({"role": "assistant", "content": ""}, model=model)]
        if self.thinking is not None:
            events.append(chunk({"content": [_thinking_chunk(self.thinking)]}, model=model))
        return events

    def event(self, received: Received, number: int, word: str) -> bytes:
        content = word if self.thinking is None else [{"type": "text", "text": word}]
        return chunk({"content": content}, model=received.body["model"])

    def call_events(self, received: Received) -> list[bytes]:
        calls = whole_calls(self.tool_calls, _CALL_ID)
        numbered = [call | {"index": index} for index, call in enumerate(calls)]
        return [chunk({"content": "", "tool_calls": numbered}, model=received.body["model"])] if calls else []

    def ending(self, received: Received) -> list[bytes]:
        more = {"model": received.body["model"], **self.usage_field(received)}
        last = chunk({"content": ""}, finish_reason=self.finish_reason, **more)
        return [last, DONE] if self.done else [last]

    def true_usage(self, received: Received, prompt: int, completion: int) -> dict[str, Any]:
        return token_counts(prompt, completion) | {"num_cached_tokens": 0}


def chunk(
    delta: Mapping[str, Any],
    *,
    finish_reason: str | None = None,
    model: str = "mistral-small-latest",
    **more: Any,
) -> bytes:
    """Return an event of a stream."""
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return data_event(body | more)


def error_event(
    error_type: str = "internal_error", code: str | None = None, message: str = "It broke"
) -> bytes:
    """Return an error event for `at` of an Answer; only Stop.END should follow."""
    return data_event(_error(error_type, code, message))


def huge_line(size: int) -> bytes:
    """Return an event with a text of `size` bytes in one line."""
    return chunk({"content": "x" * size})


def error_reply(
    status: int,
    error_type: str = "invalid_request_error",
    code: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal with the vendor's flat error body; `error_type` is its `type`."""
    return json_reply(_error(error_type, code, message), status, headers)


def fields_reply(path: Sequence[str | int], error_type: str, message: str = "It can't be taken") -> Reply:
    """Return the refusal of the field at a path of the body."""
    detail = {"type": error_type, "loc": ["body", *path], "msg": message, "input": None}
    return json_reply({"detail": [detail]}, 422)


def gateway_reply(status: int, message: str = "Unauthorized") -> Reply:
    """Return a refusal of the vendor's own gateway: only a message and a request id."""
    return json_reply({"message": message, "request_id": "req-test0001"}, status)


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    refusal = access_refusal(received, PATH, api_key)
    if refusal is not None:
        return gateway_reply(refusal.status, refusal.message)
    problem = check(received.body)
    if problem is not None and problem.code == MESSAGE_ORDER:
        return error_reply(400, "invalid_request_message_order", "3230", problem.message)
    return None if problem is None else fields_reply(_path(problem), _error_type(problem), problem.message)


def _error(error_type: str, code: str | None, message: str) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": error_type, "param": None, "code": code}


def _thinking_chunk(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def _path(problem: Problem) -> list[str | int]:
    return [int(name) if name.isdigit() else name for name in _NAME.findall(problem.param or "")]


def _error_type(problem: Problem) -> str:
    error_types = {"unknown_parameter": "extra_forbidden", "missing_required_parameter": "missing"}
    return error_types.get(problem.code, "value_error")


_TEXT = text_faults(
    Answer(),
    token_counts,
    error_event("rate_limited", "1300", message=BODY),
    error_event("strange", message=BODY),
    {
        "out of money": error_reply(402, message=BODY),
        "too many concurrent tasks": error_reply(429, "rate_limited", "1300", message=BODY),
        "unknown key": gateway_reply(401, f"Unauthorized {BODY}"),
        "unknown model": error_reply(400, "invalid_model", "1500", message=BODY),
        "too long": error_reply(
            400, message=f"Prompt contains 40000 tokens, too large for model with 32768. {BODY}"
        ),
        "an invalid value": fields_reply(("temperature",), "less_than_equal", BODY),
    },
    {"against the policy": "the vendor documents no such refusal"},
)

PROTOCOL = VendorProtocol(
    "mistral",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
