"""Mistral's chat completions as the vendor's side speaks them: answers, whole and streamed, and its refusals.

`FaultUpstream` asks `refused` first; what a test scripts is mostly an `Answer`. The facts are those of the
vendor's published API description; what its requests must look like is in `mistral_checks`. The path has a
prefix here, as OpenAI's would be the same without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pomelo.testing.answer import COUNTED, JSON, TextAnswer, wording
from pomelo.testing.broken import BODY
from pomelo.testing.checks import Problem, turned_away
from pomelo.testing.mistral_checks import MESSAGE_ORDER, check
from pomelo.testing.reply import Received, Reply, Wire

PREFIX = "/mistral"
PATH = f"{PREFIX}/v1/chat/completions"

DONE = b"data: [DONE]\n\n"

_ID = "cmpl-test0001"
_CREATED = 1_790_000_000
_STEP = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script: answers a conversation; see TextAnswer.

    A stream has a chunk for the role, one for each word, one for the finish_reason, which bears the usage
    too, and the end marker. With `thinking` the model has thought, and content comes in lists of chunks.
    """

    thinking: str | None = None

    def body(self, received: Received) -> dict[str, Any]:
        """The whole answer."""
        content: Any = self.text
        if self.thinking is not None:
            content = [_thought(self.thinking), {"type": "text", "text": self.text}]
        message = {"role": "assistant", "content": content, "tool_calls": None}
        answer = {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": received.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason}],
        }
        usage = self._usage(received)
        return answer if usage is None else answer | {"usage": usage}

    def beginning(self, received: Received) -> list[bytes]:
        """The chunk of the role, and that of what was thought."""
        model = received.body["model"]
        events = [chunk({"role": "assistant", "content": ""}, model=model)]
        if self.thinking is not None:
            events.append(chunk({"content": [_thought(self.thinking)]}, model=model))
        return events

    def event(self, received: Received, number: int, word: str) -> bytes:
        """The chunk of a word."""
        content = word if self.thinking is None else [{"type": "text", "text": word}]
        return chunk({"content": content}, model=received.body["model"])

    def ending(self, received: Received) -> list[bytes]:
        """The chunk of the finish_reason, and the end marker."""
        more = {} if (usage := self._usage(received)) is None else {"usage": usage}
        model = received.body["model"]
        last = chunk({"content": ""}, finish_reason=self.finish_reason, model=model, **more)
        return [last, DONE] if self.done else [last]

    def _usage(self, received: Received) -> Any:
        if self.usage is not COUNTED:
            return self.usage
        prompt, completion = self.counts(received)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "num_cached_tokens": 0,
        }


def chunk(
    delta: Mapping[str, Any],
    *,
    finish_reason: str | None = None,
    model: str = "mistral-small-latest",
    **more: Any,
) -> bytes:
    """One event of a stream."""
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return b"data: " + json.dumps(body | more, ensure_ascii=False).encode() + b"\n\n"


def error_event(kind: str = "internal_error", code: str | None = None, message: str = "It broke") -> bytes:
    """A failure within a stream, to be put `at` a place of an Answer; nothing should follow but Stop.END."""
    return b"data: " + json.dumps(_error(kind, code, message)).encode() + b"\n\n"


def half_character() -> bytes:
    """An event that is cut within a character: no UTF-8, in otherwise sound JSON."""
    return chunk({"content": "caf?"}).replace(b"?", b"\xc3")


def huge_line(size: int = 1_000_000) -> bytes:
    """An event of `size` bytes in one line."""
    return chunk({"content": "x" * size})


def error_reply(
    status: int,
    kind: str = "invalid_request_error",
    code: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A refusal with the vendor's flat error body; `kind` is its `type`."""
    return _reply(status, _error(kind, code, message), headers)


def fields_reply(place: Sequence[str | int], kind: str, message: str = "It can't be taken") -> Reply:
    """A refusal of a field of the body, at `place`."""
    detail = {"type": kind, "loc": ["body", *place], "msg": message, "input": None}
    return _reply(422, {"detail": [detail]})


def gateway_reply(status: int, message: str = "Unauthorized") -> Reply:
    """A refusal by what stands before the API: a message and a request id alone."""
    return _reply(status, {"message": message, "request_id": "req-test0001"})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """The vendor's refusal of a request that it would not take; None for one that it would.

    With `api_key` None any key will do, but there must be one.
    """
    away = turned_away(received, PATH, api_key)
    if away is not None:
        return gateway_reply(away.status, away.message)
    problem = check(received.body)
    if problem is not None and problem.code == MESSAGE_ORDER:
        return error_reply(400, "invalid_request_message_order", "3230", problem.message)
    return None if problem is None else fields_reply(_place(problem), _kind(problem), problem.message)


def _reply(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status=status, headers={**JSON, **(headers or {})}, steps=(json.dumps(body).encode(),))


def _error(kind: str, code: str | None, message: str) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def _place(problem: Problem) -> list[str | int]:
    return [int(step) if step.isdigit() else step for step in _STEP.findall(problem.param or "")]


def _kind(problem: Problem) -> str:
    kinds = {"unknown_parameter": "extra_forbidden", "missing_required_parameter": "missing"}
    return kinds.get(problem.code, "value_error")


_TEXT = wording(
    Answer(),
    lambda prompt, completion: {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    },
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
        "refused value": fields_reply(("temperature",), "less_than_equal", BODY),
    },
    {"against the policy": "the vendor documents no such refusal"},
)

WIRE = Wire(
    "mistral",
    lambda received: received.path.startswith(PREFIX + "/"),
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
