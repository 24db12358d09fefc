"""A fake of OpenAI's chat completions, from the vendor's published API description: most tests script an
`Answer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.broken import BODY
from pomelo.testing.checks import access_refusal
from pomelo.testing.openai_checks import check
from pomelo.testing.reply import Received, Reply, VendorProtocol, json_reply
from pomelo.testing.text_answer import (
    DONE,
    TextAnswer,
    data_event,
    pieces,
    text_faults,
    token_counts,
    whole_calls,
)

PATH = "/v1/chat/completions"

_ID = "chatcmpl-test0001"
_CALL_ID = "call_test{:04}"
_CREATED = 1_790_000_000


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script that answers a conversation.

    A stream has a chunk for the role, one for each word, one for the finish_reason, one for the usage (if the
    request asks for it), and the end marker. Tool calls are in pieces. A `refusal` replaces the text.
    """

    refusal: str | None = None

    def output(self) -> str:
        return self.text if self.refusal is None else self.refusal

    def body(self, received: Received) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        if self.tool_calls:
            message |= {"content": self.text or None, "tool_calls": whole_calls(self.tool_calls, _CALL_ID)}
        if self.refusal is not None:
            message["content"] = None
        return {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": received.body["model"],
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
            ],
            "service_tier": "default",
            "system_fingerprint": None,
            **self.usage_field(received),
        }

    def beginning(self, received: Received) -> list[bytes]:
        role = {"role": "assistant", "content": "", "refusal": None}
        return [chunk(role, model=received.body["model"])]

    def event(self, received: Received, number: int, word: str) -> bytes:
        obfuscated = _options(received).get("include_obfuscation", True)
        padding = {"obfuscation": "x" * (number % 7)} if obfuscated else {}
        key = "content" if self.refusal is None else "refusal"
        return chunk({key: word}, model=received.body["model"], **padding)

    def call_events(self, received: Received) -> list[bytes]:
        model = received.body["model"]
        events = []
        for index, call in enumerate(whole_calls(self.tool_calls, _CALL_ID)):
            arguments = call["function"]["arguments"]
            begun = call | {"index": index, "function": call["function"] | {"arguments": ""}}
            events.append(chunk({"tool_calls": [begun]}, model=model))
            for piece in pieces(arguments):
                more = {"index": index, "function": {"arguments": piece}}
                events.append(chunk({"tool_calls": [more]}, model=model))
        return events

    def ending(self, received: Received) -> list[bytes]:
        model = received.body["model"]
        events = []
        if self.finish_reason is not None:
            events.append(chunk({}, finish_reason=self.finish_reason, model=model))
        if _options(received).get("include_usage") and (usage := self.usage_field(received)):
            events.append(chunk(None, model=model, **usage))
        return [*events, DONE] if self.done else events

    def true_usage(self, received: Received, prompt: int, completion: int) -> dict[str, Any]:
        return token_counts(prompt, completion) | {
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens, "audio_tokens": 0},
        }


def chunk(
    delta: Mapping[str, Any] | None,
    *,
    finish_reason: str | None = None,
    usage: Any = None,
    model: str = "gpt-4.1",
    **more: Any,
) -> bytes:
    """Return an event of a stream. With `delta` None it has no choices, like the event with the usage."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [] if delta is None else [choice],
        "usage": usage,
    }
    return data_event(body | more)


def error_event(
    error_type: str = "server_error", code: str | None = None, message: str = "It broke"
) -> bytes:
    """Return an error event for `at` of an Answer; only Stop.END should follow."""
    return data_event(_error(message, error_type, None, code))


def broken_json() -> bytes:
    """Return an event whose data is not JSON."""
    return b'data: {"choices":[{"delta":\n\n'


def huge_line(size: int) -> bytes:
    """Return an event with a text of `size` bytes in one line."""
    return chunk({"content": "x" * size})


def error_reply(
    status: int,
    error_type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal with the vendor's error body; `error_type` is its `type`."""
    head = {"x-request-id": "req_test0001", **(headers or {})}
    return json_reply(_error(message, error_type, param, code), status, head)


def page(status: int = 200) -> Reply:
    """Return an HTML page, as a proxy sends it."""
    return Reply(
        status=status,
        headers={"Content-Type": "text/html; charset=utf-8"},
        steps=(b"<!doctype html><title>Welcome</title><p>Sign in to the network.\n\n",),
    )


def redirect(location: str, status: int = 307) -> Reply:
    """Return a redirect to `location`."""
    return Reply(status=status, headers={"Location": location})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    refusal = access_refusal(received, PATH, api_key)
    if refusal is not None:
        return error_reply(refusal.status, code=refusal.code, message=refusal.message)
    problem = check(received.body)
    if problem is not None:
        return error_reply(400, code=problem.code, param=problem.param, message=problem.message)
    return None


def _error(message: str, error_type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def _options(received: Received) -> Mapping[str, Any]:
    return received.body.get("stream_options") or {}


_TEXT = text_faults(
    Answer(),
    token_counts,
    error_event("server_error", message=BODY),
    error_event("strange", message=BODY),
    {
        "out of money": error_reply(429, "insufficient_quota", "credit_balance_exhausted", message=BODY),
        "too many concurrent tasks": error_reply(429, "requests", "rate_limit_exceeded", message=BODY),
        "unknown key": error_reply(401, code="invalid_api_key", message=BODY),
        "unknown model": error_reply(404, code="model_not_found", param="model", message=BODY),
        "against the policy": error_reply(400, code="content_policy_violation", message=BODY),
        "too long": error_reply(400, code="context_length_exceeded", param="messages", message=BODY),
        "an invalid value": error_reply(400, code="unsupported_value", param="temperature", message=BODY),
    },
)

PROTOCOL = VendorProtocol(
    "openai",
    lambda received: received.path == PATH,
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
