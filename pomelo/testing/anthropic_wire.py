"""Anthropic's Messages as the vendor's side speaks them: answers, whole and streamed, and its refusals.

`FaultUpstream` asks `refused` first; what a test scripts is mostly an `Answer`. The facts are those of the
vendor's own client and pages; what its requests must look like is in `anthropic_checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.answer import COUNTED, JSON, TextAnswer, wording
from pomelo.testing.anthropic_checks import VERSIONS, check
from pomelo.testing.broken import BODY
from pomelo.testing.checks import Problem, turned_away
from pomelo.testing.reply import Received, Reply, Wire

PATH = "/v1/messages"

PING = b'event: ping\ndata: {"type": "ping"}\n\n'

_ID = "msg_test0001"
_KINDS = {401: "authentication_error", 404: "not_found_error"}
"""What the vendor calls a call that isn't let in; else it is an invalid_request_error."""


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script: answers a conversation; see TextAnswer.

    A stream begins with message_start, the blocks of what the model is `thinking` (where that is set), the
    start of the text's block and a ping; it ends with the end of the block, message_delta and message_stop.
    `usage` counts as the vendor does: input_tokens, output_tokens and those of the cache.
    """

    finish_reason: str | None = "end_turn"
    thinking: str | None = None

    def body(self, received: Received) -> dict[str, Any]:
        """The whole answer."""
        blocks: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.thinking is not None:
            blocks.insert(0, {"type": "thinking", "thinking": self.thinking, "signature": "c2lnbmVk"})
        message = _message(received, blocks) | {"stop_reason": self.finish_reason}
        return message | self._counted(self._usage(received))

    def beginning(self, received: Received) -> list[bytes]:
        """The events up to the first word."""
        usage = self._usage(received)
        first = usage | {"output_tokens": 1} if isinstance(usage, dict) else usage
        message = _message(received, []) | self._counted(first)
        index = 0
        events = [event("message_start", message=message)]
        if self.thinking is not None:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            thought = {"type": "thinking_delta", "thinking": self.thinking}
            signed = {"type": "signature_delta", "signature": "c2lnbmVk"}
            events.append(event("content_block_start", index=0, content_block=block))
            events += [event("content_block_delta", index=0, delta=delta) for delta in (thought, signed)]
            events.append(event("content_block_stop", index=0))
            index = 1
        block = {"type": "text", "text": ""}
        return [*events, event("content_block_start", index=index, content_block=block), PING]

    def event(self, received: Received, number: int, word: str) -> bytes:
        """The event of a word."""
        return words(word, index=self._index)

    def ending(self, received: Received) -> list[bytes]:
        """The events behind the last word."""
        usage = self._usage(received)
        if isinstance(usage, dict) and "output_tokens" in usage:
            usage = {"output_tokens": usage["output_tokens"]}
        delta = {"stop_reason": self.finish_reason, "stop_sequence": None}
        events = [
            event("content_block_stop", index=self._index),
            event("message_delta", delta=delta, **self._counted(usage)),
        ]
        return [*events, event("message_stop")] if self.done else events

    @property
    def _index(self) -> int:
        return 0 if self.thinking is None else 1

    def _usage(self, received: Received) -> Any:
        if self.usage is not COUNTED:
            return self.usage
        prompt, completion = self.counts(received)
        prompt += len(str(received.body.get("system") or "").split())
        return {
            "input_tokens": prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": completion,
            "service_tier": "standard",
        }

    @staticmethod
    def _counted(usage: Any) -> dict[str, Any]:
        return {} if usage is None else {"usage": usage}


def event(name: str, **fields: Any) -> bytes:
    """One event of a stream, whose data has its name as the type."""
    data = json.dumps({"type": name, **fields}, ensure_ascii=False)
    return f"event: {name}\ndata: {data}\n\n".encode()


def words(text: str, index: int = 0) -> bytes:
    """The event that adds text to a block."""
    return event("content_block_delta", index=index, delta={"type": "text_delta", "text": text})


def error_event(kind: str = "overloaded_error", code: str | None = None, message: str = "It broke") -> bytes:
    """A failure within a stream, to be put `at` a place of an Answer; nothing should follow but Stop.END."""
    return event("error", error=_error(kind, code, message))


def half_character() -> bytes:
    """An event that is cut within a character: no UTF-8, in otherwise sound JSON."""
    return words("caf?").replace(b"?", b"\xc3")


def huge_line(size: int = 1_000_000) -> bytes:
    """An event of `size` bytes in one line."""
    return words("x" * size)


def error_reply(
    status: int,
    kind: str = "invalid_request_error",
    code: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A refusal with the vendor's error body; `kind` is its `type`, `code` its detailed error_code."""
    body = {"type": "error", "error": _error(kind, code, message), "request_id": "req_test0001"}
    return Reply(
        status=status,
        headers={**JSON, "request-id": "req_test0001", **(headers or {})},
        steps=(json.dumps(body).encode(),),
    )


def refused(received: Received, api_key: str | None) -> Reply | None:
    """The vendor's refusal of a request that it would not take; None for one that it would.

    With `api_key` None any key will do, but there must be one.
    """
    away = turned_away(received, PATH, api_key, header="x-api-key")
    if away is not None:
        kind = _KINDS.get(away.status, "invalid_request_error")
        return error_reply(away.status, kind, message=away.message)
    version = received.headers.get("anthropic-version", "")
    if version not in VERSIONS:
        return error_reply(400, message="anthropic-version: there is no such version")
    problem = check(received.body, version)
    return None if problem is None else error_reply(400, message=_worded(problem))


def _message(received: Received, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": _ID,
        "type": "message",
        "role": "assistant",
        "model": received.body["model"],
        "content": blocks,
        "stop_reason": None,
        "stop_sequence": None,
    }


def _error(kind: str, code: str | None, message: str) -> dict[str, Any]:
    error: dict[str, Any] = {"type": kind, "message": message}
    return error if code is None else error | {"details": {"error_code": code}}


def _worded(problem: Problem) -> str:
    """A problem as the vendor words it: the place, with dots, and what is wrong there."""
    if problem.param is None:
        return problem.message
    return f"{problem.param.replace('[', '.').replace(']', '')}: {problem.message}"


_TEXT = wording(
    Answer(),
    lambda prompt, completion: {"input_tokens": prompt, "output_tokens": completion},
    error_event("overloaded_error", message=BODY),
    error_event("strange", message=BODY),
    {
        "out of money": error_reply(
            429, "rate_limit_error", "enforced_spend_limit_reached", message=f"No more this month. {BODY}"
        ),
        "too many concurrent tasks": error_reply(429, "rate_limit_error", message=BODY),
        "unknown key": error_reply(401, "authentication_error", message=BODY),
        "unknown model": error_reply(404, "not_found_error", message=BODY),
        "against the policy": error_reply(400, message=f"Output blocked by content filtering policy. {BODY}"),
        "too long": error_reply(400, message=f"prompt is too long: 250000 tokens > 200000 maximum. {BODY}"),
        "refused value": error_reply(400, message=f"temperature: must be at most 1. {BODY}"),
    },
)

WIRE = Wire(
    "anthropic",
    lambda received: received.path == PATH,
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
