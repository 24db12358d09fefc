"""OpenAI's chat completions as the vendor's side speaks them: answers, whole and streamed, and its refusals.

`FaultUpstream` asks `refused` first; what a test scripts is mostly an `Answer`. The facts are those of the
vendor's published API description; what its requests must look like is in `openai_checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.answer import COUNTED, JSON, TextAnswer, wording
from pomelo.testing.broken import BODY
from pomelo.testing.checks import turned_away
from pomelo.testing.openai_checks import check
from pomelo.testing.reply import Received, Reply, Wire

PATH = "/v1/chat/completions"

DONE = b"data: [DONE]\n\n"

_ID = "chatcmpl-test0001"
_CREATED = 1_790_000_000


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script: answers a conversation; see TextAnswer.

    A stream has a chunk for the role, one for each word, one for the finish_reason, one for the usage (where
    the request asks for it), and the end marker. A `refusal` comes in place of the text.
    """

    refusal: str | None = None

    def said(self) -> str:
        """The text, or the refusal."""
        return self.text if self.refusal is None else self.refusal

    def body(self, received: Received) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        if self.refusal is not None:
            message["content"] = None
        answer: dict[str, Any] = {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": received.body["model"],
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
            ],
            "service_tier": "default",
            "system_fingerprint": None,
        }
        usage = self._usage(received)
        if usage is not None:
            answer["usage"] = usage
        return answer

    def beginning(self, received: Received) -> list[bytes]:
        """The chunk of the role."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return [chunk(role, model=received.body["model"])]

    def event(self, received: Received, number: int, word: str) -> bytes:
        """The chunk of a word."""
        veiled = _options(received).get("include_obfuscation", True)
        veil = {"obfuscation": "x" * (number % 7)} if veiled else {}
        key = "content" if self.refusal is None else "refusal"
        return chunk({key: word}, model=received.body["model"], **veil)

    def ending(self, received: Received) -> list[bytes]:
        """The chunks of the finish_reason and the usage, and the end marker."""
        model = received.body["model"]
        events = []
        if self.finish_reason is not None:
            events.append(chunk({}, finish_reason=self.finish_reason, model=model))
        usage = self._usage(received)
        if _options(received).get("include_usage") and usage is not None:
            events.append(chunk(None, usage=usage, model=model))
        return [*events, DONE] if self.done else events

    def _usage(self, received: Received) -> Any:
        if self.usage is not COUNTED:
            return self.usage
        prompt, completion = self.counts(received)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }


def chunk(
    delta: Mapping[str, Any] | None,
    *,
    finish_reason: str | None = None,
    usage: Any = None,
    model: str = "gpt-4.1",
    **more: Any,
) -> bytes:
    """One event of a stream; `delta` None makes one without choices, as the one with the usage is."""
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
    return b"data: " + json.dumps(body | more, ensure_ascii=False).encode() + b"\n\n"


def error_event(kind: str = "server_error", code: str | None = None, message: str = "It broke") -> bytes:
    """A failure within a stream, to be put `at` a place of an Answer; nothing should follow but Stop.END."""
    return b"data: " + json.dumps(_error(message, kind, None, code)).encode() + b"\n\n"


def broken_json() -> bytes:
    """An event whose data is no JSON."""
    return b'data: {"choices":[{"delta":\n\n'


def half_character() -> bytes:
    """An event that is cut within a character: no UTF-8, in otherwise sound JSON."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"caf\xc3"},"finish_reason":null}]}\n\n'


def huge_line(size: int = 1_000_000) -> bytes:
    """An event of `size` bytes in one line."""
    return chunk({"content": "x" * size})


def error_reply(
    status: int,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A refusal with the vendor's error body; `kind` is its `type`."""
    body = json.dumps(_error(message, kind, param, code)).encode()
    return Reply(
        status=status, headers={**JSON, "x-request-id": "req_test0001", **(headers or {})}, steps=(body,)
    )


def page(status: int = 200) -> Reply:
    """What a proxy in between answers: a page for people."""
    return Reply(
        status=status,
        headers={"Content-Type": "text/html; charset=utf-8"},
        steps=(b"<!doctype html><title>Welcome</title><p>Sign in to the network.\n\n",),
    )


def redirect(location: str, status: int = 307) -> Reply:
    """Sends the client elsewhere."""
    return Reply(status=status, headers={"Location": location})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """The vendor's refusal of a request that it would not take; None for one that it would.

    With `api_key` None any key will do, but there must be one.
    """
    away = turned_away(received, PATH, api_key)
    if away is not None:
        return error_reply(away.status, code=away.code, message=away.message)
    problem = check(received.body)
    if problem is not None:
        return error_reply(400, code=problem.code, param=problem.param, message=problem.message)
    return None


def counts(prompt: int, completion: int) -> dict[str, int]:
    """A usage with these counts, as chat completions have it."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _options(received: Received) -> Mapping[str, Any]:
    return received.body.get("stream_options") or {}


_TEXT = wording(
    Answer(),
    counts,
    error_event("server_error", message=BODY),
    error_event("strange", message=BODY),
    {
        "out of money": error_reply(429, "insufficient_quota", "credit_balance_exhausted", message=BODY),
        "too many concurrent tasks": error_reply(429, "requests", "rate_limit_exceeded", message=BODY),
        "unknown key": error_reply(401, code="invalid_api_key", message=BODY),
        "unknown model": error_reply(404, code="model_not_found", param="model", message=BODY),
        "against the policy": error_reply(400, code="content_policy_violation", message=BODY),
        "too long": error_reply(400, code="context_length_exceeded", param="messages", message=BODY),
        "refused value": error_reply(400, code="unsupported_value", param="temperature", message=BODY),
    },
)

WIRE = Wire(
    "openai",
    lambda received: received.path == PATH,
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
